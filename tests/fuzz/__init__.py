"""A seeded fuzzer: bad input ends in one clear line, or not at all (`python -m tests.fuzz`)."""
