"""Poisson noise in solvers: weighted operators, whitening, and exact posteriors."""

import math

import pytest
import torch

from unmurk.errors import InputError
from unmurk.evaluation.exact import GaussianPrior, operator_matrix
from unmurk.noise import PoissonGaussian
from unmurk.operators import parse
from unmurk.operators.external import Function
from unmurk.operators.weighted import Weighted
from unmurk.problem import Problem
from unmurk.solvers import METHODS, solve
from unmurk.whitening import WINDOW, rates, whiten

FORMS = ["identity", "inpaint:random,keep=0.5", "sr:average,factor=2", "sr:bicubic,factor=2"]
FORMS += ["colour:grey", "blur:gaussian,sigma=0.8", "blur:gaussian,sigma=0.8,pad=circular"]
FORMS += ["blur:motion,length=3,angle=30", "blur:gaussian,sigma=0.6|sr:average,factor=2"]
SHAPE = (3, 6, 4)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weighted(form, rows=3):
    operator = (parse(form) if isinstance(form, str) else form).bind(range(rows), SHAPE)
    weights = (3 * uniform(rows, *operator.y_shape(SHAPE), seed=7) - 1.5).exp()  # 0.2 to 4.5
    return operator, Weighted(operator, weights)


# -- the weighted operator ------------------------------------------------------------------------


@pytest.mark.parametrize("form", [*FORMS, Function(lambda x: x[..., ::2] - 2 * x[..., 1::2])])
def test_weighted_maps_are_those_of_the_dense_matrix(form):
    """A' = W A, its transpose, its prox at weak and strong data, all against linear algebra."""
    operator, scaled = weighted(form)
    problem, size = Problem(operator), math.prod(SHAPE)
    problem.index = [0, 1, 2]
    x, y = uniform(3, *SHAPE), uniform(3, *operator.y_shape(SHAPE), seed=1)
    seen = operator.apply_mask(y)
    a = scaled.weights.flatten(1)[:, :, None] * operator_matrix(problem, SHAPE, y)
    dense = (a @ x.flatten(1)[..., None])[..., 0]
    assert torch.allclose(scaled.A(x).flatten(1), dense, atol=1e-6)
    back = (a.mT @ y.flatten(1)[..., None])[..., 0]
    assert torch.allclose(scaled.A_adjoint(y).flatten(1), back, atol=1e-6)
    for gamma in (torch.zeros(3), torch.tensor([0.1, 1.0, 5.0])):
        z, g = uniform(3, *SHAPE, seed=2), gamma.double()[:, None, None]
        left = torch.eye(size).double() + g * a.mT @ a
        right = z.flatten(1)[..., None] + g * a.mT @ seen.flatten(1)[..., None]
        solved = torch.linalg.solve(left, right).reshape(z.shape)
        assert torch.allclose(scaled.prox_l2(z, y, gamma), solved, atol=1e-4)


@pytest.mark.parametrize("form", FORMS[:5])
def test_weighted_pseudo_inverse(form):
    """Where the rows of A are independent, or zero, A^+ W^-1 is the pseudo-inverse of W A."""
    operator, scaled = weighted(form)
    y = uniform(3, *operator.y_shape(SHAPE), seed=1)
    problem = Problem(operator)
    problem.index = [0, 1, 2]
    a = scaled.weights.flatten(1)[:, :, None] * operator_matrix(problem, SHAPE, y)
    expected = torch.linalg.pinv(a) @ y.flatten(1)[..., None]
    assert torch.allclose(scaled.A_dagger(y).flatten(1), expected[..., 0], atol=1e-5)


@pytest.mark.parametrize("form", ["blur:gaussian,sigma=1", "blur:uniform,size=3,pad=circular"])
def test_weighted_prox_of_a_blur_that_trusts_the_data(form):
    """The preconditioner bounds the condition by the weights: no gamma is too high."""
    operator = parse(form)
    weights = (1.5 * uniform(2, 1, 16, 16, seed=7) - 0.75).exp()  # their squares vary 20-fold
    z, y = uniform(2, 1, 16, 16), uniform(2, 1, 16, 16, seed=1)
    found = Weighted(operator, weights).prox_l2(z, y, 1e5)
    a = weights.flatten(1)[:, :, None] * operator_matrix(Problem(operator), (1, 16, 16), y)
    right = z.flatten(1)[..., None] + 1e5 * a.mT @ y.flatten(1)[..., None]
    exact = torch.linalg.solve(torch.eye(256).double() + 1e5 * a.mT @ a, right)[..., 0]
    assert torch.allclose(found.flatten(1), exact, atol=1e-3)


def test_weighted_is_a_value():
    operator, scaled = weighted("inpaint:random,keep=0.5")
    taken = scaled.index_select([2, 0, 2])
    assert torch.equal(taken.weights, scaled.weights[[2, 0, 2]])
    assert torch.equal(taken.mask, operator.mask[[2, 0, 2]])
    assert taken.index_select([1]) == scaled.index_select([0]) != scaled.index_select([1])
    assert scaled == Weighted(operator, scaled.weights) != Weighted(operator, scaled.weights + 1)
    assert hash(scaled) == hash(Weighted(operator, scaled.weights))
    y = torch.full((3, *SHAPE), float("nan"), dtype=torch.float64)
    y = torch.where(operator.mask.expand_as(y) > 0, 1.0, y)
    assert scaled.A_adjoint(y).isfinite().all()
    assert scaled.to("cpu") == scaled and scaled.count(y).equal(operator.count(y))
    with pytest.raises(InputError, match="was a Python object"):
        parse(scaled.spec)
    assert not Weighted(Function(torch.sin, linear=False), scaled.weights).linear


# -- whitening ------------------------------------------------------------------------------------


def test_rates_are_posterior_means_of_windows():
    """(K + 1) / (n + 1 / R), counted pixel by pixel, in holes and at the borders too."""
    gain, (b, c, h, w) = 0.05, (2, 2, 7, 9)
    problem = Problem("inpaint:random,keep=0.5", PoissonGaussian(gain, 0.02)).bind(
        [3, 8], (c, h, w)
    )
    y = problem.simulate(uniform(b, c, h, w))
    found, mask, reach = rates(y, problem), problem.mask.expand(b, c, h, w), WINDOW // 2
    for i in range(b):
        whole = (y[i].sum() / gain).clamp_min(0) + 1
        mean = whole / mask[i].sum()
        for j, p, q in ((0, 0, 0), (1, 3, 4), (0, 6, 2)):
            box = (i, j, slice(max(p - reach, 0), p + reach + 1), slice(max(q - reach, 0), q + 3))
            counts = ((y[box].sum() - y[i, j, p, q]) / gain).clamp_min(0)
            numbers = mask[box].sum() - mask[i, j, p, q]
            assert torch.allclose(found[i, j, p, q], (counts + 1) / (numbers + 1 / mean))
    flat = Problem(Function(lambda x: x.flatten(1), linear=True), "poisson,gain=0.1")
    counts = torch.tensor([[0.0, 0.1, 0.3], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[5 / 3] * 3, [1 / 3] * 3])
    assert torch.allclose(rates(counts, flat), expected)


def test_whitened_noise_is_white():
    """Chi-square at the true image is 1 for a smooth image, though the variance varies 20-fold."""
    ramp = torch.linspace(0.05, 1, 32).expand(40, 1, 32, 32)
    for text in ("poisson,gain=0.02", "poisson-gaussian,gain=0.01,sigma=0.03"):
        problem = Problem("inpaint:random,keep=0.7", text).bind(range(40), (1, 32, 32))
        y, white = whiten(problem.simulate(ramp, seed=1), problem)
        square = white.residual(ramp, y).square() / white.sigma**2
        for columns in (slice(2, 10), slice(10, 20), slice(20, 30)):
            assert abs(square[..., columns].sum() / problem.mask[..., columns].sum() - 1) < 0.06


def test_gaussian_noise_stays_and_little_gain_becomes_it():
    x = uniform(2, 1, 8, 8)
    problem = Problem("identity", 0.1).bind(range(2), (1, 8, 8))
    y = problem.simulate(x)
    assert whiten(y, problem) == (y, problem)
    noise = PoissonGaussian(1e-10, 0.1)
    scaled, white = whiten(y, Problem("identity", noise).bind(range(2), (1, 8, 8)))
    assert abs(white.sigma - 0.1) < 1e-8 and torch.allclose(scaled, y, atol=1e-8)
    prior = GaussianPrior.exponential((1, 8, 8))
    plain = solve(y, problem, prior, steps=5, final="mean")
    little = solve(y, Problem("identity", noise), prior, steps=5, final="mean")
    assert torch.allclose(little.mean, plain.mean, atol=1e-6)
    assert abs(little.trace[-1]["chi2"] - plain.trace[-1]["chi2"]) < 1e-5


# -- solvers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_solver_takes_poisson_noise_whatever_the_batch(method):
    prior = GaussianPrior.exponential((1, 8, 8), std=0.15)
    problem = Problem("inpaint:random,keep=0.6", "poisson-gaussian,gain=0.02,sigma=0.02")
    x = prior.sample(4, seed=1).clamp_min(0)
    y = problem.simulate(x)
    steps = {"iterations": 8} if method == "pnp-dm" else {"steps": 8}
    whole = solve(y, problem, prior, method, samples=2, **steps)
    parts = solve(y, problem, prior, method, samples=2, batch=3, **steps)
    assert torch.allclose(whole.samples, parts.samples, atol=1e-4)
    assert whole.samples.isfinite().all() and whole.trace[-1]["chi2"] > 0


def test_nonlinear_operators_and_early_stops():
    prior = GaussianPrior.exponential((1, 8, 8), std=0.15)
    problem = Problem(lambda x: x.clamp_min(0) ** 1.5, "poisson,gain=0.05")
    x = prior.sample(2, seed=1).double().clamp_min(0.1)
    y = problem.simulate(x)
    result = solve(y, problem, prior, steps=30)
    assert (result.mean - x).square().mean() < 0.7 * (y ** (2 / 3) - x).square().mean()
    assert 0.2 < result.trace[-1]["chi2"] < 1
    stopped = solve(y, problem, prior, steps=30, callback=lambda at: at["step"] == 2)
    assert len(stopped.trace) == 2 and stopped.mean.isfinite().all()


def test_a_posterior_flow_refuses_in_one_line():
    class Flow:
        def sample(self, y, problem, n, seed):
            return torch.full((n, *y.shape), problem.sigma)

    problem, y = Problem("identity", "poisson,gain=0.1"), torch.zeros(1, 1, 4, 4)
    prior = GaussianPrior.exponential((1, 4, 4))
    with pytest.raises(InputError, match="'poisson,gain=0.1' is not Gaussian"):
        solve(y, problem, prior, init="posterior", posterior=Flow())


def level_posterior(problem, y, mean=0.5, std=0.15):
    """Mean and spread of the grey level of flat images, (B,), by quadrature over it."""
    levels = torch.linspace(-0.3, 1.4, 3001, dtype=torch.float64)
    flat = levels[:, None].expand(-1, y[0].numel())
    prior = -((levels - mean) ** 2) / (2 * std**2)
    terms = [
        problem.noise.log_likelihood(flat, row.expand_as(flat)).sum(1) for row in y.flatten(1)
    ]
    weights = torch.stack([prior + term for term in terms]).softmax(1)
    found = (weights * levels).sum(1)
    return found, ((weights * levels**2).sum(1) - found**2).sqrt()


@pytest.mark.parametrize("size, gain", [(1, 0.1), (6, 0.02), (6, 0.1)])
def test_grey_level_against_quadrature(size, gain):
    """Flat images of unknown level, p(x | y) by quadrature: errors in posterior deviations.

    Measured: worst of 8 images 0.46, mean -0.19 for a single number, of which nothing but itself
    says how noisy it is; in images of 6 x 6, 0.21 and -0.05 (both: closed form, the worse one).
    """
    d = size**2
    prior = GaussianPrior(torch.full((1, size, size), 0.5), torch.full((d, d), 0.15**2).double())
    x = prior.sample(8, seed=2).double()
    problem = Problem("identity", PoissonGaussian(gain)).bind(range(8), (1, size, size))
    y = problem.simulate(x, seed=1)
    mean, std = level_posterior(problem, y)
    scaled, white = whiten(y, problem)
    exact = prior.posterior(scaled, white)  # of the whitened problem
    for image in (exact.mean, solve(y, problem, prior, batch=8).mean):
        error = (image.flatten(1).mean(1) - mean) / std
        assert error.abs().max() < (0.5 if size == 1 else 0.35)
        assert abs(error.mean()) < (0.25 if size == 1 else 0.1)
    assert abs((exact.std.flatten(1).mean(1) / std).mean() - 1) < (0.1 if size == 1 else 0.03)


def test_blurred_counts_against_importance_sampling():
    """p(x | y) under the exact Poisson likelihood: weighted draws of the whitened posterior.

    Measured root mean square errors in posterior deviations: 0.04 in closed form, 0.09 by
    RED-diff, 0.20 by PnP-DM, whose 64 samples alone make 0.13.
    """
    draws, shape = 4000, (1, 4, 4)
    prior = GaussianPrior.exponential(shape, length=2.0, std=0.12)
    problem = Problem("blur:gaussian,sigma=0.6", "poisson,gain=0.02").bind(range(2), shape)
    y = problem.simulate(prior.sample(2, seed=4).double().clamp_min(0), seed=1)
    scaled, white = whiten(y, problem)
    proposal = prior.posterior(scaled, white).sample(draws)
    found = solve(y, problem, prior).mean
    sampled = solve(y, problem, prior, "pnp-dm", samples=64, batch=1000)
    for row in range(2):
        x, rows = proposal[:, row], [row] * draws
        exact = problem.index_select(rows).log_likelihood(x, y[rows])
        log_weights = exact - white.index_select(rows).log_likelihood(x, scaled[rows])
        weights = log_weights.softmax(0)[:, None, None, None]
        assert 1 / weights.square().sum() > draws / 10
        mean = (weights * x).sum(0)
        std = ((weights * x.square()).sum(0) - mean.square()).sqrt()
        closed = proposal.mean(0)[row]
        for image, most in ((closed, 0.1), (found[row], 0.2), (sampled.mean[row], 0.3)):
            assert ((image - mean) / std).square().mean().sqrt() < most
        assert 0.85 < (sampled.std[row] / std).mean() < 1.15


def test_weighing_beats_one_noise_level_for_all():
    """A ramp of brightness: 0.3 dB over the same solver with the root mean square noise."""
    ramp = torch.linspace(0.02, 1, 16, dtype=torch.float64).expand(1, 16, 16)
    smooth = GaussianPrior.exponential((1, 16, 16), length=3.0, std=0.08).covariance
    prior = GaussianPrior(ramp, smooth)
    x = prior.sample(16, seed=3).clamp_min(0)
    problem = Problem("identity", "poisson,gain=0.01")
    y = problem.simulate(x, seed=1)
    level = float((0.01 * y.mean()) ** 0.5)
    scores = [
        10 * (solve(y, p, prior, steps=30).mean - x).square().flatten(1).mean(1).log10().mean()
        for p in (problem, Problem("identity", level))
    ]
    assert scores[0] < scores[1] - 0.2
