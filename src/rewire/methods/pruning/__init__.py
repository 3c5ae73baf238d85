"""Methods that start with more connections than their budget and come down to it."""
