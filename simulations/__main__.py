"""`python -m simulations` is `bouquet`."""

from simulations.cli import main

main()
