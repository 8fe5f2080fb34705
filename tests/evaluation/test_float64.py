"""Exact priors, their posteriors and metrics return what they are given: float32 or float64."""

import pytest
import torch

from unmurk.evaluation import metrics
from unmurk.evaluation.exact import GaussianMixture, GaussianPrior
from unmurk.evaluation.scale_mixture import ScaleMixture
from unmurk.problem import Problem

SHAPE = (1, 4, 4)
PRIORS = {
    "gaussian": GaussianPrior.exponential(SHAPE),
    "independent": GaussianPrior(torch.zeros(SHAPE), torch.full(SHAPE, 0.04)),
    "mixture": GaussianMixture.example(SHAPE),
    "wavelet": ScaleMixture.example(SHAPE),
}


@pytest.mark.parametrize("name", PRIORS)
def test_priors(name):
    prior = PRIORS[name]
    x = prior.sample(3, 1, dtype=torch.float64)
    single = prior.sample(3, 1)
    assert x.dtype == torch.float64 and torch.equal(x.float(), single)
    clean = prior.denoise(x, 0.2)
    assert clean.dtype == torch.float64 and prior.denoise(single, 0.2).dtype == torch.float32
    h = 1e-4  # Tweedie's formula against finite differences of the density: needs float64
    with torch.no_grad():
        step = torch.zeros_like(x)
        step[..., 1, 2] = h
        slope = (prior.log_prob(x + step, 0.2) - prior.log_prob(x - step, 0.2)) / (2 * h)
    score = (clean - x)[..., 1, 2].flatten() / 0.2**2
    torch.testing.assert_close(score, slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PRIORS)
def test_posteriors(name):
    prior = PRIORS[name]
    problem = Problem("inpaint:random,keep=0.5", 0.3).bind(range(2), SHAPE)
    y = problem.simulate(prior.sample(2, 1, dtype=torch.float64), seed=2)
    assert y.dtype == torch.float64
    found = prior.posterior(y, problem)
    assert {v.dtype for v in (found.mean, found.std, found.sample(3))} == {torch.float64}
    single = prior.posterior(y.float(), problem)
    assert single.mean.dtype == single.sample(1).dtype == torch.float32
    if name != "wavelet":  # closed forms do not depend on the type but by the rounding of y
        torch.testing.assert_close(found.mean.float(), single.mean, rtol=1e-5, atol=1e-6)


def test_metrics():
    x = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ref = (x + 1e-9).clamp(0, 1)
    exact = -10 * (x - ref).square().flatten(1).mean(1).log10()
    assert metrics.psnr(x, ref).dtype == torch.float64 and exact.min() > 170
    torch.testing.assert_close(metrics.psnr(x, ref), exact, rtol=1e-6, atol=0)
    assert metrics.ssim(x, ref).dtype == torch.float64
    assert metrics.ssim(x.float(), ref.float()).dtype == torch.float32
