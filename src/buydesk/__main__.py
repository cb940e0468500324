"""`python -m buydesk` is the command `buydesk`."""

from buydesk.cli import main

main()
