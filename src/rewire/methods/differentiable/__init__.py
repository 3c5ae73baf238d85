"""Differentiable sparsification: gates that learn to close."""
