"""`python -m rewire`."""

from rewire.cli import main

main()
