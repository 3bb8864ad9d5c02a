"""`python -m bouquet` is `bouquet`."""

from bouquet.launch import main

main()
