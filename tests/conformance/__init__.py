"""The gateway as clients, load generators, models and attackers that others wrote see it.

`make test` runs a part that takes a minute or two, `make conformance` (`pytest tests/conformance --whole`) all.
"""
