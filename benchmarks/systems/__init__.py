"""Adapters: one file for each measured system, run as a process of its own."""
