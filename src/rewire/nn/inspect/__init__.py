"""What a model costs, and a table of its sparse weights."""
