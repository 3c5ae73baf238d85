"""Sparse fine-tuning of dense models: differences beside frozen weights, their files, merging."""
