"""`python -m sparsec.cli`."""

from sparsec.cli import main

main()
