"""Converts dense layers to sparse ones and back."""
