"""`python -m piip` is the command `piip`."""

from piip.cli import main

main()
