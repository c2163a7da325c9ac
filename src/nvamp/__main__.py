"""`python -m nvamp` is `nvamp`."""

from nvamp.cli import main

main()
