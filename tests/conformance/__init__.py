"""The gateway as clients, load generators and models that others wrote see it; nothing in here is rtml's own.

`make test` runs a part that takes a minute or two, `make conformance` (`pytest tests/conformance --whole`) all.
"""
