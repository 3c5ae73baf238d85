"""Networks as C source."""
