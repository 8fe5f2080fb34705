"""Faults that must not come back, one kind a file."""
