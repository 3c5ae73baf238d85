"""DEEP R and soft-DEEP R."""
