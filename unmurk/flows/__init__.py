"""Normalizing flows: the posterior q(x | y) and a prior p(x) with an exact density."""
