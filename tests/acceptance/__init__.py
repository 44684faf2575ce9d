"""Whole programs, written against the public face alone, whose results must not depend on what dies meanwhile."""
