"""Metrics of images and samples, exact posteriors, and the certification of solvers."""
