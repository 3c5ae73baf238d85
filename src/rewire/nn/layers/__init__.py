"""Sparse layers, twins of those in `torch.nn`, and what else models are made of here."""
