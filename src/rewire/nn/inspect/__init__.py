"""What a model costs and consists of."""
