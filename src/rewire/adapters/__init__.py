"""Adapters to other libraries. Nothing in `rewire` imports them, and each imports its library."""
