"""TDS, ProjDiff, DDiff and FAST-DIPS against their algorithms in dense matrices and densities."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from unmurk.errors import InputError
from unmurk.evaluation.exact import GaussianMixture, GaussianPrior, operator_matrix
from unmurk.problem import Problem
from unmurk.rng import PerImageGenerator, StreamId
from unmurk.solvers import METHODS, solve
from unmurk.solvers.state import CountingDenoiser
from unmurk.solvers.tds import moment_twist, resample, twist

SHAPE = (1, 4, 4)
PRIOR = GaussianPrior.exponential(SHAPE, length=4.0)
MASK, AVERAGE = "inpaint:random,keep=0.5,seed=3", "sr:average,factor=2"
BLUR = "blur:gaussian,sigma=0.7,pad=circular"
EVEN = [MASK, AVERAGE, "identity"]  # all singular values that are not 0 are equal
GRID = {"steps": 4, "sigma_max": 2.0, "sigma_min": 0.1}
QUICK = {
    "tds": {"steps": 3, "particles": 4},
    "projdiff": {"steps": 4},
    "ddiff": {"steps": 4},
    "fast-dips": {"steps": 4},
}
FREE = ["projdiff", "ddiff", "fast-dips"]  # of gradients


class Still(PerImageGenerator):
    """Streams without noise."""

    def randn(self, *shape):
        return super().randn(*shape) * 0


def measured(operator, noise, n=2, prior=PRIOR, dtype=torch.float64):
    problem = Problem(operator, noise)
    truth = prior.sample(n, seed=1).to(dtype)
    return problem.simulate(truth, seed=2), problem.bind(range(n), prior.shape)


def dense(problem, y):
    """One matrix for each image."""
    return operator_matrix(problem, SHAPE, y).expand(len(y), -1, -1)


def rows(a, x):
    """The matrices a (B, m, d) times the rows of x (B, d)."""
    return (a @ x[..., None])[..., 0]


def denoised(x, t):
    """E[x | x_t] by the dense formula, and the matrix of its derivative."""
    mean, cov = PRIOR.mean.flatten(), PRIOR.covariance
    gain = torch.linalg.solve(cov + t**2 * torch.eye(16).double(), cov)
    return mean + (x - mean) @ gain, gain


def fit(a, z, y, rho, sigma):
    """argmin ||y - A x||^2 / (2 sigma^2) + ||x - z||^2 / (2 rho^2), all of them flat."""
    left = a.mT @ a / sigma**2 + torch.eye(16).double() / rho**2
    return torch.linalg.solve(left, rows(a.mT, y) / sigma**2 + z / rho**2)


def grid(steps=4, first=2.0, last=0.1):
    low, high = last ** (1 / 7), first ** (1 / 7)
    return [(high + k / (steps - 1) * (low - high)) ** 7 for k in range(steps)]


def path(y, problem, method, **options):
    """The image after every step, flat."""
    seen = []
    solve(y, problem, PRIOR, method, seed=3, callback=lambda at: seen.append(at["x"]), **options)
    return torch.stack(seen).flatten(2)


def draws(y):
    """The noise that a solver draws for these images, one flat image a call."""
    streams = PerImageGenerator(3, range(len(y)), StreamId.SOLVER, 0)
    return lambda: streams.randn(*SHAPE).double().flatten(1)


def close(a, b, atol=1e-6):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def mean_error(method, y, problem, **options):
    """Distance from the posterior's mean of a run without noise, in units of its width.

    With a Gaussian prior these methods are affine in their noise, so that this is the mean.
    """
    solver = METHODS[method](**options)
    mean = solver.sample(y, problem, CountingDenoiser(PRIOR), Still(0, range(len(y))))
    exact = PRIOR.posterior(y, problem)
    return float((mean - exact.mean).norm() / exact.std.norm())


# -- tds -----------------------------------------------------------------------------------------


def gaussian_guess(a, missing, spread, gain):
    """log N(y; A x0, 0.1^2 I + A spread A^T) but for its constant, and its gradient in x_t."""
    covariance = 0.01 * torch.eye(a.shape[1]).double() + a @ spread @ a.mT
    law = MultivariateNormal(torch.zeros(a.shape[1]).double(), covariance)
    guess = law.log_prob(missing) - law.log_prob(missing * 0)
    return guess, -rows(a.mT, torch.linalg.solve(covariance, missing)) @ gain


@pytest.mark.parametrize("operator", [MASK, BLUR])
def test_twists_are_gaussian_guesses_and_their_gradients(operator):
    y, problem = measured(operator, 0.1)
    x, t, r = PRIOR.sample(2, seed=5).double(), 0.4, 0.3
    a = dense(problem, y)
    x0, gain = denoised(x.flatten(1), t)
    missing = rows(a, x0) - y.flatten(1)
    twists = [
        (moment_twist(problem, CountingDenoiser(PRIOR), x, y, t, 0.1, 30, 1e-10), t**2 * gain),
        (twist(problem, CountingDenoiser(PRIOR), x, y, t, r, 0.1), r**2 * torch.eye(16).double()),
    ]
    for (guess, likelihood_grad, found), spread in twists:
        wanted, gradient = gaussian_guess(a, missing, spread, gain)
        close(guess, wanted, 1e-5)
        close(likelihood_grad.flatten(1), gradient, 1e-5)
        close(found.flatten(1), x0)


def test_moment_twist_is_the_likelihood_of_the_noisy_image():
    """With a Gaussian prior log f is log p(y | x_t) but for a constant, by the joint density."""
    y, problem = measured(BLUR, 0.1)
    t, eye = 0.4, torch.eye(16).double()
    a, cov = dense(problem, y)[0], PRIOR.covariance
    joint = torch.cat([torch.cat([cov + t**2 * eye, cov @ a.T], 1),
                       torch.cat([a @ cov, a @ cov @ a.T + 0.01 * eye], 1)])  # fmt: skip
    mean = torch.cat([PRIOR.mean.flatten(), a @ PRIOR.mean.flatten()])
    both, alone = MultivariateNormal(mean, joint), MultivariateNormal(mean[:16], joint[:16, :16])
    found, exact = [], []
    for seed in (5, 6):
        x = PRIOR.sample(2, seed=seed).double()
        flat = x.flatten(1)
        found.append(moment_twist(problem, CountingDenoiser(PRIOR), x, y, t, 0.1, 30, 1e-10)[0])
        exact.append(both.log_prob(torch.cat([flat, y.flatten(1)], 1)) - alone.log_prob(flat))
    close(found[1] - found[0], exact[1] - exact[0], 1e-5)


def test_systematic_resampling():
    g = torch.Generator().manual_seed(0)
    weight = 3 * torch.randn(50, 8, generator=g).double()
    u = torch.rand(50, 1, generator=g).double()
    chosen, after = resample(weight, u, 1.1)
    share = weight.softmax(1)
    heirs = torch.stack([(chosen == i).sum() for i in range(400)]).reshape(50, 8)
    assert ((heirs >= (8 * share).floor()) & (heirs <= (8 * share).ceil())).all()
    assert (after == 0).all() and (chosen // 8 == torch.arange(50).repeat_interleave(8)).all()
    poor = 1 / share.square().sum(1) < 4
    chosen, after = resample(weight, u)
    still = chosen.reshape(50, 8) == torch.arange(400).reshape(50, 8)
    assert 0 < poor.sum() < 50 and still[~poor].all() and torch.equal(after[~poor], weight[~poor])
    assert (after[poor] == 0).all() and not still[poor].all(1).any()


def test_tds_is_importance_sampling_of_paths():
    """Without resampling: every density of Algorithm 1 by itself, and draws by their weights."""
    y, problem = measured(MASK, 0.3, n=6)
    a, k, levels = dense(problem, y), 5, grid(3)
    streams = PerImageGenerator(3, range(6), StreamId.SOLVER, 0)
    normal = lambda: streams.randn(k, *SHAPE).double().flatten(2)  # noqa: E731
    a, flat = a[:, None], y.flatten(1)[:, None].expand(-1, k, -1)

    def look(x, t):
        x0, gain = denoised(x, t)
        covariance = 0.09 * torch.eye(16).double() + t**2 * a @ gain @ a.mT
        law = MultivariateNormal(rows(a, x0), covariance, validate_args=False)
        likelihood_grad = (
            rows(a.mT, torch.linalg.solve(law.covariance_matrix, flat - rows(a, x0))) @ gain
        )
        return law.log_prob(flat), x0, x0 + t**2 * likelihood_grad

    x = 0.5 + levels[0] * normal()
    guess, x0, led = look(x, levels[0])
    weight, before, expected = guess, None, []
    for t, s in zip(levels, [*levels[1:], 0.0], strict=True):
        streams.rand(1)
        if s > 0:
            keep, c = (s / t) ** 2, s * math.sqrt(1 - (s / t) ** 2)
            ahead, led_ahead = x0, led
            if before is not None:
                line = math.log(t / s) / (2 * math.log(before[2] / t))
                ahead, led_ahead = x0 + line * (x0 - before[0]), led + line * (led - before[1])
            p = Normal(keep * x + (1 - keep) * ahead, c)
            q = Normal(keep * x + (1 - keep) * led_ahead, c)
            before = x0, led, t
            x = q.loc + c * normal()
            weight = weight + (p.log_prob(x) - q.log_prob(x)).sum(-1) - guess
            guess, x0, led = look(x, s)
            weight = weight + guess
        else:
            x = x0
            likelihood = Normal(rows(a, x), 0.3).log_prob(flat)
            seen = problem.mask.expand(6, *SHAPE).flatten(1)[:, None]
            weight = weight - guess + (likelihood * seen).sum(-1)
        u = streams.rand(1).double()
        pick = (weight.softmax(1).cumsum(1) <= u).sum(1).clamp_max(k - 1)
        expected.append(x[torch.arange(6), pick])
    options = {
        "steps": 3,
        "sigma_max": 2.0,
        "sigma_min": 0.1,
        "iterations": 30,
        "tolerance": 1e-10,
    }
    found = path(y, problem, "tds", particles=k, threshold=0.0, **options)
    close(found, torch.stack(expected))


@pytest.mark.parametrize("operator, noise", [(MASK, 0.1), (BLUR, 0.3)])
def test_tds_samples_gaussian_posteriors(operator, noise):
    """400 draws: the mean is known to 0.05 posterior widths, the spread to 2 %."""
    y, problem = measured(operator, noise, n=1)
    found = solve(y, problem, PRIOR, "tds", samples=400, batch=400).samples
    exact = PRIOR.posterior(y, problem)
    assert float((found.mean(0) - exact.mean).norm() / exact.std.norm()) < 0.12
    spread = float(found.var(0).sum() / exact.std.square().sum()) ** 0.5
    assert spread == pytest.approx(1, abs=0.07)


def test_tds_error_falls_with_particles():
    """With an affine operator, which is not linear, and a twist that trusts D too much. These
    draws know the squares to 0.008."""
    prior = GaussianMixture.example()
    problem = Problem("inpaint:random,keep=0.3", 0.05).bind([1] * 4, prior.shape)
    y = problem.simulate(prior.sample(4, seed=1), seed=2)
    exact, mask = prior.posterior(y, problem), problem.mask[:1]
    affine = Problem(lambda x: x * mask + 1, 0.05)
    assert not affine.bind(range(4), prior.shape).operator.linear
    squares = []
    for particles in (1, 16):
        options = {"particles": particles, "samples": 20, "batch": 80, "steps": 10}
        found = solve(y + 1, affine, prior, "tds", pixel_std=0.15, **options)
        by_chance = found.std.square().sum() / 20
        square = (found.mean - exact.mean).square().sum() - by_chance
        squares.append(float(square / exact.std.square().sum()))
    assert squares[0] > 0.03 and squares[1] < squares[0] / 2


def test_tds_counts_the_evaluations_of_one_sample():
    calls = []

    def prior(x, sigma):
        calls.append(len(x))
        return PRIOR(x, sigma)

    y, problem = measured(MASK, 0.1)
    result = solve(y, problem, prior, "tds", samples=3, steps=5, particles=4)
    assert result.nfe == 20 == result.trace[-1]["nfe"] and calls == [6 * 4] * 5
    with pytest.raises(InputError, match="tds needs a prior.*use red-diff or daps"):
        solve(y, problem, lambda x, sigma: PRIOR(x.detach(), sigma), "tds")


# -- projdiff ------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", EVEN)
@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_projdiff_is_the_papers_with_its_second_image(operator, noise):
    """x_a as in the paper: y where A sees, x0 elsewhere. The sign of fresh noise is free."""
    y, problem = measured(operator, noise)
    a, draw = dense(problem, y), draws(y)
    into = torch.linalg.pinv(a)
    project = lambda x: rows(into @ a, x)  # noqa: E731
    s = float(torch.linalg.matrix_norm(a, 2)[0])
    r, x, expected = noise / s, 0.5 + 2.0 * draw(), []
    for step, t in enumerate(grid()):
        if step > 0:
            n = draw()
            observed = rows(into, y.flatten(1))
            if t >= r:
                x = observed - math.sqrt(t**2 - r**2) * project(n)
            else:
                x = project(x0) + t / r * (observed - project(x0))  # noqa: F821
            x = x + (x0 + t * n) - project(x0 + t * n)  # noqa: F821
        new = denoised(x, t)[0]
        x0 = new if step == 0 or t >= r else x0 + 0.4 * (new - x0)  # noqa: F821
        expected.append(x0)
    close(path(y, problem, "projdiff", rate=0.4, **GRID), torch.stack(expected))


@pytest.mark.parametrize("operator", [*EVEN, BLUR])
def test_projdiff_without_noise_descends_and_projects(operator):
    y, problem = measured(operator, 0.0)
    a, draw = dense(problem, y), draws(y)
    x0, expected = None, []
    for t in grid():
        x = 0.5 + t * draw() if x0 is None else x0 + t * draw()
        x0 = denoised(x, t)[0] if x0 is None else x0 + 1.3 * (denoised(x, t)[0] - x0)
        x0 = x0 + rows(torch.linalg.pinv(a), y.flatten(1) - rows(a, x0))
        expected.append(x0)
    found = path(y, problem, "projdiff", rate=1.3, **GRID)
    close(found, torch.stack(expected), 1e-4 if operator == BLUR else 1e-8)


@pytest.mark.parametrize("operator", [MASK, BLUR])
def test_projdiff_at_full_rate_is_ddnm(operator):
    y, problem = measured(operator, 0.1)
    ours = solve(y, problem, PRIOR, "projdiff", rate=1.0, steps=6).mean
    close(ours, solve(y, problem, PRIOR, "ddnm", steps=6).mean, 1e-10)


# -- ddiff ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", [MASK, BLUR])
@pytest.mark.parametrize("zeta, rescale", [(1.0, 0.0), (0.3, 1.5)])
def test_ddiff_is_admm_with_a_noised_image(operator, zeta, rescale):
    y, problem = measured(operator, 0.1)
    a, draw, levels = dense(problem, y), draws(y), grid()
    x, u, expected = 0.5 + 2.0 * draw(), 0.0, []
    for t, s in zip(levels, [*levels[1:], 0.0], strict=True):
        z = denoised(x, t)[0].clamp(0, 1)
        v = fit(a, z - u, y.flatten(1), t / math.sqrt(2.0), 0.1)
        e = (x - v) / t
        x = v + u + s * (math.sqrt(1 - zeta) * e + math.sqrt(zeta) * draw())
        u = (u + v - z) * (s / t) ** rescale
        expected.append(v)
    options = {"lam": 2.0, "zeta": zeta, "rescale": rescale, **GRID}
    close(path(y, problem, "ddiff", **options), torch.stack(expected))


# -- fast-dips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", [MASK, BLUR])
def test_fast_dips_is_admm_on_a_ball(operator):
    y, problem = measured(operator, 0.1)
    a, draw, levels, flat = dense(problem, y), draws(y), grid(), y.flatten(1)
    seen = (a.abs().sum(-1) > 0).double()
    radius = 0.1 * seen.sum(1).sqrt()

    def ball(w):
        away = (w - flat) * seen
        return flat + away * (radius / away.norm(dim=1)).clamp_max(1)[:, None]

    x, expected = 0.5 + 2.0 * draw(), []
    for t, s in zip(levels, [*levels[1:], 0.0], strict=True):
        x0 = denoised(x, t)[0]
        v, u = ball(rows(a, x0)), 0.0
        for _ in range(3):
            w = fit(a, x0, v - u, t, 1 / math.sqrt(50.0)).clamp(0, 1)
            v = ball(rows(a, w) + u)
            u = u + (rows(a, w) - v) * seen
        expected.append(w)
        x = w + s * draw() if s > 0 else w
    close(path(y, problem, "fast-dips", rho=50.0, radius=1.0, **GRID), torch.stack(expected))


# -- what they leave of a Gaussian posterior -----------------------------------------------------


@pytest.mark.parametrize("operator", [MASK, BLUR, AVERAGE])
@pytest.mark.parametrize(
    "method, off, width", [("projdiff", 0.65, 0.34), ("ddiff", 0.12, 0.66), ("fast-dips", 1, 0.48)]
)
def test_heuristics_are_as_far_from_gaussian_posteriors_as_stated(method, off, width, operator):
    """The mean in units of the posterior's width; the spread over the exact one, to 4 %."""
    y, problem = measured(operator, 0.1)
    assert mean_error(method, y, problem) < off
    draws = solve(y, problem, PRIOR, method, samples=100, batch=200).samples
    exact = PRIOR.posterior(y, problem).std
    spread = (draws.var(0).sum() / exact.square().sum()).sqrt()
    assert float(spread) == pytest.approx(width, abs=0.1)


# -- all -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", QUICK)
@pytest.mark.parametrize("channels, dtype", [(1, torch.float64), (3, torch.float32)])
def test_results_do_not_depend_on_the_batch(method, channels, dtype):
    shape = (channels, 4, 6)
    prior = GaussianPrior(torch.full(shape, 0.5), torch.full(shape, 0.04))
    y, problem = measured("inpaint:random,keep=0.5", 0.1, n=3, prior=prior, dtype=dtype)
    one, two, all_ = (
        solve(y, problem, prior, method, samples=2, seed=4, batch=b, **QUICK[method]).samples
        for b in (1, 2, 64)
    )
    assert all_.shape == (2, 3, *shape) and all_.dtype == dtype
    close(one, all_)
    close(two, all_)
    assert not torch.equal(all_[0], all_[1])


@pytest.mark.parametrize("method", QUICK)
def test_callback_stops_early_and_init_is_where_it_starts(method):
    y, problem = measured("identity", 0.1)
    seen = []
    stop = lambda at: seen.append(at) or at["step"] == 2  # noqa: E731
    options = {"init": y, "init_sigma": 0.4, "callback": stop, **QUICK[method]}
    result = solve(y, problem, PRIOR, method, **options)
    assert len(seen) == 2 == len(result.trace) and seen[0]["sigma"] == pytest.approx(0.4)
    assert result.nfe == result.trace[-1]["nfe"]
    close(result.mean, seen[1]["x"])


@pytest.mark.parametrize("method", FREE)
def test_network_runs_without_gradients(method):
    def prior(x, sigma):
        assert not torch.is_grad_enabled() and not x.requires_grad
        return PRIOR(x, sigma)

    y, problem = measured(BLUR, 0.1)
    solve(y.requires_grad_(), problem, prior, method, **QUICK[method])


@pytest.mark.parametrize("method", QUICK)
def test_hidden_pixels_may_hold_anything(method):
    y, problem = measured(MASK, 0.1)
    holes = torch.where(problem.mask > 0, y, torch.nan)
    clean, dirty = (solve(v, problem, PRIOR, method, **QUICK[method]).mean for v in (y, holes))
    assert torch.equal(clean, dirty)


@pytest.mark.parametrize("method", ["tds", "ddiff", "fast-dips"])
def test_nonlinear_operators_are_fitted(method):
    """Where y = x^2 + 0.02 n says much of x, x is known to 0.02 / (2 x), give or take."""
    truth = PRIOR.sample(4, seed=3).clamp(0.05, 1)
    problem = Problem(lambda x: x.sign() * x**2, 0.02)
    y = problem.simulate(truth, seed=4)
    result = solve(y, problem, PRIOR, method, steps=25)
    bright = truth > 0.4
    error = ((result.mean - truth) * 2 * truth / 0.02)[bright]
    assert error.square().mean().sqrt() < 2.0


def test_bad_input_is_named():
    y, problem = measured("identity", 0.1)
    with pytest.raises(InputError, match=r"projdiff needs a linear operator.*ddiff"):
        solve(y, Problem(lambda x: x**2, 0.1), PRIOR, "projdiff")
    wrong = [("tds", "particles"), ("tds", "iterations"), ("tds", "pixel_std"),
             ("tds", "noise_floor"), ("projdiff", "rate"), ("ddiff", "lam"), ("fast-dips", "rho"),
             ("fast-dips", "iterations")]  # fmt: skip
    for method, option in wrong:
        with pytest.raises(InputError, match=f"^{option} must be .* got 0$"):
            solve(y, problem, PRIOR, method, **{option: 0})
    with pytest.raises(InputError, match="zeta must be .* got 2"):
        solve(y, problem, PRIOR, "ddiff", zeta=2)
