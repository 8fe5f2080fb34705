"""Benchmarks: one folder a suite, with `run.py`, which measures, and the template of its page."""
