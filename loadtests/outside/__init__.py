"""Load generators of others against the gateway: they check what this folder's own generator says."""
