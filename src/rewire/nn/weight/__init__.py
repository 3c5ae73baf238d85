"""A sparse weight: its slots and index, its changes and who is told of them, loading."""
