"""Scores of images and samples, exact posteriors, and certification."""
