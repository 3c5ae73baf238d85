"""What to drop and what to grow, and how scores of connections are found."""
