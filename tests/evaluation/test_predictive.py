"""Posterior predictive checks against figures by hand."""

import pytest
import torch

from unmurk.evaluation.predictive import measure
from unmurk.problem import Problem


def test_counts_in_the_dark_do_not_decide_chi_square():
    """A draw that misses black by little: the sum of r^2 over its expectation, by hand."""
    problem = Problem("identity", "poisson,gain=0.01")
    x = torch.full((4, 1, 64, 64), 0.5)
    x[..., 32:] = 0.0
    y = problem.simulate(x)
    assert not y[..., 32:].any()  # no photons, no noise
    missed = x - 0.002 * (x == 0)
    value, error = measure(y, missed, problem)["chi2"]
    # half of the values have the variance 0.005, the others a floor of 2 % of the mean, 0.0025
    bright = float((y - x)[..., :32].square().mean()) / 0.005
    assert value == pytest.approx(bright + 0.002**2 / (0.02 * 0.0025), rel=1e-4)
    assert abs(bright - 1) < 4 * error
