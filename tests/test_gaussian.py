"""The Gaussian start: its posteriors against dense closed forms, its fit against a known truth."""

import pytest
import torch

from unmurk.errors import InputError
from unmurk.evaluation.exact import GaussianPrior
from unmurk.flows.posterior import Config, Posterior
from unmurk.gaussian import Wiener, fit, power_law
from unmurk.operators.base import conjugate_gradient
from unmurk.operators.linalg import dct_matrix
from unmurk.problem import Problem
from unmurk.rng import PerImageGenerator

LINEAR = [
    ("inpaint:random,keep=0.5", 0.05),
    ("blur:gaussian,sigma=1", 0.05),
    ("blur:gaussian,sigma=1,pad=circular", 0.02),
    ("sr:average,factor=2", 0.1),
    ("colour:grey", 0.05),
    ("identity", 0.3),
]


def model(shape=(3, 8, 8), size=0.02):
    """A Gaussian whose channels are correlated, no two frequencies alike."""
    g = torch.Generator().manual_seed(0)
    truth = Wiener(shape)
    turn = torch.linalg.qr(torch.randn(shape[0], shape[0], generator=g)).Q
    power = size * power_law(shape) * (0.5 + torch.rand(shape, generator=g))
    power *= torch.tensor([1.0, 0.3, 0.1])[: shape[0], None, None]
    mean = 0.5 + 0.1 * torch.randn(shape, generator=g)
    truth.mean.copy_(mean)
    truth.basis.copy_(turn)
    truth.power.copy_(power)
    return truth


def dense(prior):
    """The same prior as a matrix."""
    d = prior.mean.numel()
    rows = (
        prior.to_images(prior.power.sqrt() * torch.eye(d).view(d, *prior.shape))
        .flatten(1)
        .double()
    )
    # row k is T^-1 sqrt(P) e_k, so that the sum of outer products is the covariance
    return GaussianPrior(prior.mean, rows.T @ rows)


def test_cosines_are_orthogonal_and_the_first_is_constant():
    c = dct_matrix(9)
    torch.testing.assert_close(c @ c.T, torch.eye(9, dtype=torch.float64))
    torch.testing.assert_close(c[0], torch.full((9,), 1 / 3, dtype=torch.float64))


def test_coordinates_there_and_back():
    prior = model()
    x = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(prior.to_images(prior.to_coefficients(x)), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(prior.to_coefficients(x).square().sum(), x.square().sum())


@pytest.mark.parametrize("operator, noise", LINEAR)
def test_the_wiener_solution_is_the_exact_posterior_mean(operator, noise):
    prior = model()
    problem = Problem(operator, noise).bind([3, 4, 5, 6], prior.shape)
    y = problem.simulate(prior.sample(4))
    exact = dense(prior).posterior(y, problem)
    wrong = (prior.restore(y, problem, 100) - exact.mean).square().mean().sqrt()
    assert wrong < 0.02 * exact.std.square().mean().sqrt()


def test_draws_have_the_moments_of_the_posterior():
    prior = model((1, 6, 6))
    problem = Problem("inpaint:random,keep=0.5", 0.05).bind([1], prior.shape)
    y = problem.simulate(prior.sample(1))
    exact = dense(prior).posterior(y, problem)
    n = 4000
    x = prior.draw(y.repeat(n, 1, 1, 1), problem, PerImageGenerator(0, range(n)))
    away = (x.mean(0) - exact.mean[0]) / exact.std[0]
    assert away.square().mean().sqrt() < 0.04  # 1 / sqrt(n) = 0.016
    covariance = torch.cov(x.flatten(1).double().T)
    wrong = (covariance - exact.covariance[0]).norm() / exact.covariance[0].norm()
    assert wrong < 0.1


def test_its_denoiser_is_that_of_the_matrix():
    prior = model()
    x, sigma = torch.rand(3, 3, 8, 8), torch.tensor([0.1, 0.5, 2.0])
    expected = dense(prior).denoise(x, sigma)
    torch.testing.assert_close(prior.denoise(x, sigma), expected, rtol=0, atol=1e-4)


def test_an_image_does_not_depend_on_its_batch():
    prior = model()
    problem = Problem("inpaint:random,keep=0.5", 0.05)
    bound = problem.bind(range(5), prior.shape)
    y = bound.simulate(prior.sample(5))
    alone = prior.restore(y[2:3], problem.bind([2], prior.shape))
    torch.testing.assert_close(prior.restore(y, bound)[2:3], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("operator", ["inpaint:random,keep=0.5", "blur:gaussian,sigma=0.7"])
def test_a_known_gaussian_is_recovered_from_corrupted_images(operator):
    """Neither mean nor covariance is given, and no image is seen whole and sharp."""
    truth = model((1, 8, 8))
    problem = Problem(operator, 0.02)
    y = problem.simulate(truth.sample(1500))
    found = fit(y, problem, (1, 8, 8), values=2**14)
    assert (found.mean - truth.mean).square().mean().sqrt() < 0.05
    ratio = (found.power / truth.power).log()
    assert ratio.mean().abs() < 0.25
    assert ratio.square().mean().sqrt() < 0.45
    # what it is for: restoring as well as the truth does
    x = truth.sample(100, seed=1)
    held = problem.bind(range(5000, 5100), (1, 8, 8))
    y = held.simulate(x)
    own, best = ((m.restore(y, held) - x).square().mean() for m in (found, truth))
    assert own < 1.1 * best


def test_the_first_guess_stays_where_nothing_is_seen():
    """Channels that are only seen in sum: the unseen differences keep power near the guess."""
    truth = model((1, 8, 8))
    problem = Problem("sr:average,factor=4", 0.02)
    y = problem.simulate(truth.sample(300))
    found = fit(y, problem, (1, 8, 8), rounds=6, values=2**14)
    law = power_law((1, 8, 8))
    ratio = found.power / law
    assert 0.3 < ratio[0, 6:, 6:].mean() / ratio.median() < 3


def test_the_fit_is_the_same_for_the_same_seed():
    problem = Problem("inpaint:random,keep=0.5", 0.05)
    y = problem.simulate(model((1, 8, 8)).sample(64))
    a, b, c = (fit(y, problem, (1, 8, 8), seed=s, rounds=2) for s in (0, 0, 1))
    assert torch.equal(a.power, b.power) and torch.equal(a.mean, b.mean)
    assert not torch.equal(a.power, c.power)


def test_conjugate_gradients_wait_for_the_slowest_image_without_overflow():
    """An image solved at the first step, with a large residual, beside one that takes many."""
    scale = torch.stack([torch.ones(32), torch.linspace(1, 200, 32)])
    b = 1e6 * torch.rand(2, 32, generator=torch.Generator().manual_seed(0))
    x = conjugate_gradient(lambda v: scale * v, b, 100, 1e-5)
    torch.testing.assert_close(x, b / scale, rtol=0, atol=20.0)


@pytest.mark.parametrize(("operator", "sigma"), LINEAR)
def test_the_posterior_mean_in_double_precision(operator, sigma):
    """m + S A^T (A S A^T + sigma^2)^-1 (y - A m), from dense matrices, to seven digits."""
    shape = (1, 8, 8) if "grey" not in operator else (3, 8, 8)
    prior = model(shape) if shape[0] == 1 else Wiener(shape)  # an exact rotation of the channels
    problem = Problem(operator, sigma).bind(range(3), shape)
    d = prior.mean.numel()
    eye = torch.eye(d, dtype=torch.float64).view(d, *shape)
    roots = prior.to_images(prior.power.double().sqrt() * eye).flatten(1)
    covariance, mean = roots.T @ roots, prior.mean.double().expand(3, *shape)
    y = problem.simulate(mean + 0.2 * torch.randn(3, *shape, dtype=torch.float64))
    found = prior.restore(y, problem, iterations=2000)
    assert found.dtype == torch.float64
    for k in range(3):
        one = Problem(operator, sigma).bind([k] * d, shape)
        a = one.A(eye).flatten(1).T
        a = a[(a != 0).any(1)]
        kept = problem.operator.apply_mask(torch.ones_like(y))[k].flatten() != 0
        missed = (y - problem.A(mean))[k].flatten()[kept]
        noisy = a @ covariance @ a.T + sigma**2 * torch.eye(len(a), dtype=torch.float64)
        expected = mean[k].flatten() + covariance @ a.T @ torch.linalg.solve(noisy, missed)
        torch.testing.assert_close(found[k].flatten(), expected, rtol=0, atol=1e-7)


def test_conjugate_gradients_reach_the_rounding_of_double_precision():
    """Condition 1e4: an error of 1e-8 in float64, where float32 stops at a residual of 1e-6."""
    scale = torch.linspace(1e-4, 1, 40, dtype=torch.float64)
    b = torch.rand(1, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = conjugate_gradient(lambda v: scale * v, b, 1000)
    assert float((scale * x - b).norm() / b.norm()) < 2e-12
    assert float((x * scale / b - 1).abs().max()) < 1e-10
    single = conjugate_gradient(lambda v: scale.float() * v, b.float(), 1000)
    assert single.dtype == torch.float32
    assert float((scale * single - b).norm() / b.norm()) > 1e-8


def test_a_nonlinear_operator_is_named():
    problem = Problem("hdr:clip", 0.05)
    with pytest.raises(InputError, match="not linear"):
        fit(torch.rand(64, 1, 8, 8), problem, (1, 8, 8), rounds=1)


def test_a_posterior_keeps_its_start(tmp_path):
    """m(y) is the Wiener solution before any training, also after saving and loading."""
    start = model((1, 8, 8))
    config = Config(1, 8, 8, mean=8, context=8, couplings=2, hidden=8)
    posterior = Posterior(config, start=start)
    problem = Problem("inpaint:random,keep=0.5", 0.05).bind(range(3), (1, 8, 8))
    y = problem.simulate(start.sample(3))
    posterior.save(tmp_path)
    for one in (posterior, Posterior.load(tmp_path)):
        torch.testing.assert_close(one.mean(y, problem), start.restore(y, problem))


def test_the_gaussian_of_another_size_has_the_same_power_at_each_frequency():
    """Power that is log-linear in the frequency is interpolated exactly, for any size."""

    def of(h: int, w: int) -> Wiener:
        prior = Wiener((1, h, w))
        rows, columns = torch.arange(h) / h, torch.arange(w) / w
        prior.power.copy_(torch.exp(-3 * rows[:, None] - 2 * columns))
        return prior

    small = of(16, 12)
    small.mean.copy_(torch.rand(1, 16, 12))
    for shape in ((1, 24, 18), (1, 64, 36), (2, 8, 6)):
        large, expected = small.resized(shape), of(*shape[1:])
        last = shape[1] * 15 // 16 + 1, shape[2] * 11 // 12 + 1  # beyond, the last power is kept
        for power in large.power:
            torch.testing.assert_close(
                power[: last[0], : last[1]], expected.power[0, : last[0], : last[1]]
            )
        assert large.power[0, -1, -1] >= expected.power[0, -1, -1]
        torch.testing.assert_close(large.mean, small.mean.mean().expand(shape))
    assert small.resized((1, 16, 12)) is small
    two = small.resized((2, 16, 12))
    assert torch.equal(two.mean, small.mean.expand(2, -1, -1))
    assert torch.equal(two.power, small.power.expand(2, -1, -1))
