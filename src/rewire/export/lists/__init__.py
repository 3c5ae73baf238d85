"""Sparse weights as lists of connections, in files that other programs read."""
