"""Draws, estimates and scores against the numbers that they should have."""

import math

import pytest
import torch

from unmurk.samplers import posterior_draw, prior_draw

# -- draws: the spread of a Gaussian posterior, exactly ------------------------------------------


class Basis:
    """Streams whose draw number k is 1 for row k and 0 for all others.

    A sampler with a linear denoiser is linear in its draws: row k of what it makes is the response
    to draw k, and the variance is the sum of their squares. No chance is left in the test.
    """

    def __init__(self, draws):
        self.draws, self.next = draws, 0

    def randn(self, *shape):
        z = torch.zeros(self.draws, *shape, dtype=torch.float64)
        z[self.next] = 1
        self.next += 1
        return z


class Gaussian:
    """The denoiser of N(0, variance I); it counts its evaluations."""

    def __init__(self, variance):
        self.variance, self.calls = variance, 0

    def __call__(self, x, sigma):
        self.calls += 1
        return self.variance / (self.variance + sigma**2) * x


def spread_over_exact(sigma, share, steps):
    """Deviation of a draw over that of p(x | y), for a prior of variance share sigma^2."""
    denoise = Gaussian(share * sigma**2)
    x = posterior_draw(
        denoise, torch.zeros(steps, 1, 1, 1, dtype=torch.float64), sigma, Basis(steps), steps
    )
    assert denoise.calls == steps
    exact = math.sqrt(share / (1 + share)) * sigma
    return float(x.square().sum().sqrt()) / exact


@pytest.mark.parametrize("sigma", [0.005, 0.02, 0.1, 0.3, 1.0, 3.0])
def test_sixteen_evaluations_keep_the_spread(sigma):
    for share in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0):
        assert spread_over_exact(sigma, share, 16) == pytest.approx(1, abs=0.016)


@pytest.mark.parametrize(
    "steps, expected",
    [
        (4, (0.667, 0.910, 0.884, 0.779, 0.761)),
        (6, (0.820, 1.008, 1.010, 0.942, 0.929)),
        (8, (0.904, 1.027, 1.022, 0.977, 0.967)),
        (12, (0.971, 1.022, 1.015, 0.991, 0.985)),
        (16, (0.991, 1.015, 1.010, 0.995, 0.991)),
        (32, (1.001, 1.005, 1.003, 0.998, 0.997)),
    ],
)
def test_the_accuracy_is_the_documented_one(steps, expected):
    found = [spread_over_exact(0.3, share, steps) for share in (0.01, 0.1, 1.0, 10.0, 100.0)]
    assert found == pytest.approx(list(expected), abs=6e-4)
    cells = "".join(f"{value:.3f} " for value in expected).strip()
    assert f"{cells}\n" in posterior_draw.__doc__


def test_more_evaluations_end_at_the_posterior():
    for share in (0.01, 0.1, 1.0, 10.0):
        assert spread_over_exact(0.3, share, 256) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("steps, error", [(15, 0.06), (31, 0.02)])
def test_new_images_have_the_spread_of_the_prior(steps, error):
    """From noise of level 20: the start is N(1/2, 20^2), as for images of a mean of 1/2."""
    for std in (0.03, 0.05, 0.1, 0.3, 1.0, 4.0):
        denoise = Gaussian(std**2)

        def around_grey(x, sigma, denoise=denoise):
            return 0.5 + denoise(x - 0.5, sigma)

        x = prior_draw(around_grey, (1, 1, 1), Basis(steps), steps) - 0.5
        assert denoise.calls == steps
        assert float(x.square().sum().sqrt()) / std == pytest.approx(1, abs=error)


@pytest.mark.parametrize(
    "truth, least, most", [(0.25, 0.9, 1.5), (1.0, 0.97, 1.05), (4.0, 0.98, 1.02)]
)
def test_draw_and_refit_ends_at_the_variance_of_the_truth(truth, least, most):
    """Expectation maximisation on y ~ N(0, truth + 1) with sigma_y = 1, exact but for the draws.

    Of first-order draws the only fixed point is 0 where truth <= 1. (Of these, too, below a
    variance of 0.02: there 1 % of spread is missing.)
    """
    for start in (0.4 * truth, 3 * truth):
        variance = start
        for _ in range(400):
            gain = variance / (variance + 1)
            within = (spread_over_exact(1.0, variance, 16) ** 2) * gain
            before, variance = variance, gain**2 * (truth + 1) + within
            assert (variance - before) * (truth - start) > -1e-9
        assert least < variance / truth < most
