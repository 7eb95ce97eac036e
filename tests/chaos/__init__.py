"""Chaos: faults on a simulated cluster of several hosts, and what they cost. See `tests.chaos.__main__`."""
