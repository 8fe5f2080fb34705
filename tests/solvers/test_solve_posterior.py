"""Posterior samplers against Gaussian posteriors in closed form, and against dense matrices.

A Gaussian prior makes these solvers affine in their noise. So the mean of their samples is what a
run without noise returns, to rounding, and only the spread has to be measured with draws: 400 of
them give the pooled standard deviation of 8 or more pixels to 1.3 % (one sigma).
"""

import math

import pytest
import torch

from unmurk.diffusion.samplers import Reverse, diffuse
from unmurk.errors import InputError
from unmurk.evaluation.exact import GaussianPrior, operator_matrix
from unmurk.problem import Problem
from unmurk.rng import PerImageGenerator
from unmurk.solvers import METHODS, solve
from unmurk.solvers.coupling import polynomial
from unmurk.solvers.daps import Daps, flow
from unmurk.solvers.mmps import Mmps, conditional_denoiser
from unmurk.solvers.pnp_dm import PnpDm
from unmurk.solvers.snips import Snips
from unmurk.solvers.state import CountingDenoiser

SHAPE = (1, 4, 4)
PRIOR = GaussianPrior.exponential(SHAPE, length=4.0)
MASK, BLUR = "inpaint:random,keep=0.5,seed=3", "blur:gaussian,sigma=1"
PERIODIC = BLUR + ",pad=circular"  # its prox is exact at once, and cheap
DRAWS = 400
QUICK = {
    "mmps": {"steps": 4},
    "pnp-dm": {"iterations": 4, "steps": 2},
    "daps": {"steps": 4},
    "snips": {"steps": 4, "final": 2},
}


class Still(PerImageGenerator):
    """Streams without noise."""

    def randn(self, *shape):
        return super().randn(*shape) * 0


def measured(operator, noise, n=1, prior=PRIOR, dtype=torch.float64):
    problem = Problem(operator, noise)
    truth = prior.sample(n, seed=1).to(dtype)
    return problem.simulate(truth, seed=2), problem.bind(range(n), prior.shape)


def mean_error(solver, y, problem):
    """Distance of the samples' mean from the posterior's, in units of the posterior's width."""
    mean = solver.sample(y, problem, CountingDenoiser(PRIOR), Still(0, [0]))
    exact = PRIOR.posterior(y, problem)
    return float((mean - exact.mean).norm() / exact.std.norm())


def spreads(method, y, problem, **options):
    """Standard deviations over the exact ones: seen and unseen directions; coverage of 90 %."""
    draws = solve(y, problem, PRIOR, method, samples=DRAWS, batch=DRAWS, **options).samples
    flat = draws[:, 0].flatten(1)
    exact = PRIOR.posterior(y, problem)
    matrix = operator_matrix(problem, SHAPE, y)[0]
    power, basis = torch.linalg.eigh(matrix.T @ matrix)
    given = (torch.cov(flat.T) @ basis * basis).sum(0)
    wanted = (exact.covariance[0] @ basis * basis).sum(0)
    seen = power > 0.3 * power.max()
    parts = [seen, ~seen] if not bool(seen.all()) else [seen]
    ratios = [float((given[part].sum() / wanted[part].sum()).sqrt()) for part in parts]
    low, high = torch.quantile(flat, torch.tensor([0.05, 0.95], dtype=flat.dtype), dim=0)
    away = [
        (edge - exact.mean[0].flatten()) / exact.std[0].flatten() / math.sqrt(2)
        for edge in (low, high)
    ]
    return ratios, float((torch.erf(away[1]) - torch.erf(away[0])).mean() / 2)


# -- the reverse diffusion -----------------------------------------------------------------------


def test_first_step_is_the_ancestral_step_and_the_next_looks_ahead():
    noise, same = PerImageGenerator(1, [0, 1]), PerImageGenerator(1, [0, 1])
    x, a, b = PRIOR.sample(6, seed=4).double().split(2)
    reverse = Reverse(noise)
    first = reverse.step(x, a, 2.0, 1.0)
    z = same.randn(*SHAPE).double()
    torch.testing.assert_close(first, a + (x - a) / 4 + math.sqrt(0.75) * z)
    second = reverse.step(x, b, 1.0, 0.25)  # log 4 wide, log 2 before: a line to 1 + 4/4 of it
    ahead, z = b + (b - a), same.randn(*SHAPE).double()
    expected = x / 16 + 15 / 16 * ahead + 0.25 * math.sqrt(15 / 16) * z
    torch.testing.assert_close(second, expected)
    assert reverse.step(x, b, 0.25, 0.0) is b


def test_second_order_keeps_the_spread_of_a_posterior():
    """x | z for white noise of variance v under level t has variance v t^2 / (v + t^2)."""
    prior = GaussianPrior(torch.zeros(SHAPE), torch.full(SHAPE, 0.04))
    z = torch.zeros(DRAWS, *SHAPE, dtype=torch.float64)
    levels = [0.1 * 0.8**k for k in range(14)]
    x = diffuse(prior.denoise, z, levels, PerImageGenerator(0, range(DRAWS)))
    assert x.std() / math.sqrt(0.04 * 0.01 / 0.05) == pytest.approx(1.0, abs=0.06)


# -- mmps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", [MASK, BLUR, "sr:average,factor=2"])
@pytest.mark.parametrize("level", [0.03, 0.5])
def test_informed_denoiser_is_that_of_the_posterior(operator, level):
    """E[x | x_t, y] of a Gaussian prior, from both measurements stacked into one matrix."""
    y, problem = measured(operator, 0.1, n=2)
    x = PRIOR.sample(2, seed=5).double()
    given = conditional_denoiser(problem, PRIOR.denoise, x, y, level, 16, 1e-10)
    A = operator_matrix(problem, SHAPE, y).expand(2, -1, -1)
    eye = torch.eye(16, dtype=torch.float64)
    precision = torch.linalg.inv(PRIOR.covariance) + A.mT @ A / 0.01 + eye / level**2
    data = (A.mT @ y.flatten(1)[..., None])[..., 0] / 0.01 + x.flatten(1) / level**2
    data = data + torch.linalg.solve(PRIOR.covariance, PRIOR.mean.flatten())
    expected = torch.linalg.solve(precision, data)
    torch.testing.assert_close(given.flatten(1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("noise", [0.02, 0.5])
@pytest.mark.parametrize("operator", [MASK, BLUR, "identity"])
def test_mmps_samples_gaussian_posteriors(operator, noise):
    y, problem = measured(operator, noise)
    assert mean_error(Mmps(), y, problem) < 0.05
    ratios, coverage = spreads("mmps", y, problem)
    assert all(0.93 < ratio < 1.1 for ratio in ratios)
    assert 0.85 < coverage < 0.95


def test_mmps_needs_a_gradient():
    y, problem = measured(MASK, 0.1)
    with pytest.raises(InputError, match="mmps needs a prior.*use red-diff or daps"):
        solve(y, problem, lambda x, sigma: PRIOR(x.detach(), sigma), "mmps")


# -- pnp-dm --------------------------------------------------------------------------------------


def test_polynomials_are_exact_for_polynomials():
    _, problem = measured(BLUR, 0.1)
    b = PRIOR.sample(1, seed=8).double()
    A = operator_matrix(problem, SHAPE, b)[0]
    M = A.T @ A
    wanted = (M @ M @ M - 2 * M) @ b.flatten()
    top = torch.linalg.matrix_norm(A, 2)[None]
    for degree in (3, 8):
        found = polynomial(problem.operator.normal, b, lambda s: s**3 - 2 * s, top, degree)
        torch.testing.assert_close(found.flatten(), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "operator, noise", [(MASK, 0.02), (MASK, 0.5), (PERIODIC, 0.05), ("identity", 0.5)]
)
def test_pnp_dm_samples_gaussian_posteriors(operator, noise):
    y, problem = measured(operator, noise)
    assert mean_error(PnpDm(), y, problem) < 0.05
    ratios, coverage = spreads("pnp-dm", y, problem)
    assert all(0.9 < ratio < 1.1 for ratio in ratios)
    assert 0.85 < coverage < 0.95


# -- snips ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", [MASK, PERIODIC, BLUR])
def test_snips_step_is_kinetic_langevin_on_the_noisy_posterior(operator):
    """BAOAB with the force P grad log [p_t(x) N(y; A x, R)], from dense matrices, no noise."""
    y, problem = measured(operator, 0.1)
    A = operator_matrix(problem, SHAPE, y)[0]
    t, h, eye = 0.05, 0.6, torch.eye(16, dtype=torch.float64)
    R = 0.01 * torch.eye(len(A), dtype=torch.float64) - t**2 * A @ A.T
    P = torch.linalg.inv(eye / t**2 + A.T @ torch.linalg.inv(R) @ A)
    given = PRIOR.sample(1, seed=8).double()
    last = 0.05 / 0.1 * float(torch.linalg.matrix_norm(A, 2))
    options = {"steps": 3, "length": h, "friction": 0.7, "coupling": last, "init_sigma": t}
    states = Snips(**options).run(y, problem, CountingDenoiser(PRIOR), Still(0, [0]), given)
    seen = [next(states) for _ in range(3)]
    x, v = given.flatten(), torch.zeros(16, dtype=torch.float64)  # without noise on them
    for step in seen:
        denoised = PRIOR(x.reshape(given.shape), t)
        torch.testing.assert_close(step.x, denoised, rtol=0, atol=1e-6)
        score = (denoised.flatten() - x) / t**2
        score = score + A.T @ torch.linalg.solve(R, (y.flatten() - A @ x))
        v = v + h * P @ score
        x = x + h / 2 * v
        v = math.exp(-0.7) * v  # friction g h = 0.7: one step in three is at the last level
        x = x + h / 2 * v


def test_snips_has_the_exact_variance_at_any_length_of_step():
    """At one level, started in equilibrium: a Gaussian x_t keeps its covariance, step by step."""
    problem = Problem(MASK, 0.1).bind([0], SHAPE)
    A = operator_matrix(problem, SHAPE, torch.zeros(1, *SHAPE).double())[0]
    t, eye = 0.095, torch.eye(16, dtype=torch.float64)
    R = 0.01 * eye - t**2 * A @ A.T
    P = torch.linalg.inv(eye / t**2 + A.T @ torch.linalg.inv(R) @ A)
    K = torch.linalg.inv(PRIOR.covariance + t**2 * eye) + A.T @ torch.linalg.inv(R) @ A
    for h in (0.8, 1.5):
        keep = math.exp(-0.3)
        kick = torch.cat([torch.cat([eye, 0 * eye], 1), torch.cat([-h * P @ K, eye], 1)])  # x, v
        half = torch.cat([torch.cat([eye, h / 2 * eye], 1), torch.cat([0 * eye, eye], 1)])
        rub = torch.block_diag(eye, keep * eye)
        step = half @ rub @ half @ kick
        fresh = half @ torch.block_diag(0 * eye, (1 - keep**2) * P) @ half.T
        law = torch.zeros(32, 32, dtype=torch.float64)
        for _ in range(2000):
            law = step @ law @ step.T + fresh
        torch.testing.assert_close(law[:16, :16], torch.linalg.inv(K), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "operator, noise", [(MASK, 0.02), (MASK, 0.5), (PERIODIC, 0.05), ("identity", 0.5)]
)
def test_snips_samples_gaussian_posteriors(operator, noise):
    y, problem = measured(operator, noise)
    assert mean_error(Snips(), y, problem) < 0.05
    ratios, coverage = spreads("snips", y, problem)
    assert all(0.9 < ratio < 1.1 for ratio in ratios)
    assert 0.85 < coverage < 0.95


# -- daps ----------------------------------------------------------------------------------------


def test_flow_is_the_euler_method():
    x = PRIOR.sample(2, seed=7).double()
    torch.testing.assert_close(flow(PRIOR, x, 0.4, 1), PRIOR(x, 0.4))
    half = x + (0.04 - 0.4) / 0.4 * (x - PRIOR(x, 0.4))
    torch.testing.assert_close(flow(PRIOR, x, 0.4, 2), PRIOR(half, 0.04))
    # the exact flow scales every mode of variance v by sqrt(v / (v + t^2))
    power, modes = torch.linalg.eigh(PRIOR.covariance)
    away = (x - PRIOR.mean).flatten(1) @ modes * (power / (power + 0.16)).sqrt()
    exact = PRIOR.mean + (away @ modes.T).reshape(x.shape)
    errors = [float((flow(PRIOR, x, 0.4, k) - exact).norm()) for k in (4, 16, 64)]
    assert errors[2] < errors[1] < errors[0] and errors[2] < 0.1 * float((x - exact).norm())


@pytest.mark.parametrize("operator, noise", [(MASK, 0.1), (PERIODIC, 0.1)])
def test_daps_is_near_gaussian_posteriors(operator, noise):
    y, problem = measured(operator, noise)
    assert mean_error(Daps(), y, problem) < 0.15
    ratios, _ = spreads("daps", y, problem)
    assert all(0.9 < ratio < 1.15 for ratio in ratios)


def test_daps_fits_nonlinear_operators():
    """Where y = x^2 + 0.02 n says much of x, x is known to 0.02 / (2 x), give or take."""
    truth = PRIOR.sample(4, seed=3).clamp(0.05, 1)
    problem = Problem(lambda x: x.sign() * x**2, 0.02)
    y = problem.simulate(truth, seed=4)
    result = solve(y, problem, PRIOR, "daps", samples=4, steps=25)
    assert 0.7 < result.trace[-1]["chi2"] < 1.3
    bright = truth > 0.4
    error = ((result.mean - truth) * 2 * truth / 0.02)[bright]
    assert error.square().mean().sqrt() < 1.3


# -- all -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", QUICK)
@pytest.mark.parametrize("channels, dtype", [(1, torch.float64), (3, torch.float32)])
def test_results_do_not_depend_on_the_batch(method, channels, dtype):
    shape = (channels, 4, 4)
    prior = GaussianPrior(torch.full(shape, 0.5), torch.full(shape, 0.04))
    y, problem = measured("inpaint:random,keep=0.5", 0.1, n=3, prior=prior, dtype=dtype)
    one, two, all_ = (
        solve(y, problem, prior, method, samples=2, seed=4, batch=b, **QUICK[method]).samples
        for b in (1, 2, 64)
    )
    assert all_.shape == (2, 3, *shape) and all_.dtype == dtype
    torch.testing.assert_close(one, all_, rtol=0, atol=1e-6)
    torch.testing.assert_close(two, all_, rtol=0, atol=1e-6)
    assert not torch.equal(all_[0], all_[1])


@pytest.mark.parametrize("method", QUICK)
def test_callback_stops_early_and_init_is_where_it_starts(method):
    y, problem = measured("identity", 0.1)
    seen = []
    result = solve(
        y,
        problem,
        PRIOR,
        method,
        init=y,
        init_sigma=0.4,
        callback=lambda at: seen.append(at) or at["step"] == 2,
        **QUICK[method],
    )
    assert len(seen) == 2 == len(result.trace) and seen[0]["sigma"] == pytest.approx(0.4)
    assert result.nfe == result.trace[-1]["nfe"]
    torch.testing.assert_close(result.mean, seen[1]["x"])


@pytest.mark.parametrize("method", ["pnp-dm", "daps", "snips"])
def test_network_runs_without_gradients(method):
    def prior(x, sigma):
        assert not torch.is_grad_enabled() and not x.requires_grad
        return PRIOR(x, sigma)

    y, problem = measured(BLUR, 0.1)
    solve(y.requires_grad_(), problem, prior, method, **QUICK[method])


@pytest.mark.parametrize("method", QUICK)
def test_noiseless_pixels_are_kept(method):
    y, problem = measured(MASK, 0.0)
    x = solve(y, problem, PRIOR, method).mean
    seen = problem.mask > 0
    assert (x - y)[seen].abs().max() < 0.02


def test_bad_input_is_named():
    y, problem = measured("identity", 0.1)
    curved = Problem(lambda x: x**2, 0.1)
    for method in ("mmps", "pnp-dm", "snips"):
        with pytest.raises(InputError, match=f"{method} needs a linear operator.*daps"):
            solve(y, curved, PRIOR, method)
    wrong = [("mmps", "iterations"), ("pnp-dm", "iterations"), ("pnp-dm", "steps"),
             ("pnp-dm", "coupling"), ("pnp-dm", "noise_floor"), ("daps", "flow_steps"),
             ("daps", "spread"), ("daps", "noise_floor"), ("snips", "steps"), ("snips", "final"),
             ("snips", "length"), ("snips", "friction"), ("snips", "coupling"),
             ("snips", "noise_floor")]  # fmt: skip
    for method, option in wrong:
        with pytest.raises(InputError, match=f"^{option} must be .* got 0$"):
            solve(y, problem, PRIOR, method, **{option: 0})
    claims = [METHODS[name].claims for name in QUICK]
    assert claims == ["heuristic", "heuristic", "heuristic", "posterior"]
