"""The serving gateway's figures, each measured by one command: `python -m loadtests.figures NAME`."""
