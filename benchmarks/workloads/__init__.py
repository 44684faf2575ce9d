"""The papers' own workloads, each one command: `python -m benchmarks.workloads.hotos --help`, `....ray --help`."""
