"""`python -m rlhfjax.cli`."""

from rlhfjax.cli import main

main()
