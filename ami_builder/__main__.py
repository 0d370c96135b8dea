"""`python -m ami_builder`."""

from ami_builder.cli import main

main()
