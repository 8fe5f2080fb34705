"""
Test
====

A test.
"""

print(1)
