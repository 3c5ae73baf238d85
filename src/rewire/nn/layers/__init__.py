"""Sparse layers, twins of those in `torch.nn`."""
