"""Inference copies of models: layers whose weights have no slots."""
