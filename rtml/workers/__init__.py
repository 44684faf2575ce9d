"""Processes that run user code: sync and async executors, and the supervisor that forks and watches them."""
