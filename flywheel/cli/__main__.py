"""`python -m flywheel.cli`: the command without its script, for child processes."""

from flywheel.cli import main

main()
