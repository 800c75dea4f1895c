"""``python -m veneer`` is the command line."""

from veneer.cli import main

main()
