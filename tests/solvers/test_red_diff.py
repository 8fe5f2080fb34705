"""RED-diff: optimisers, grids, parallel levels, momentum, spread; and restarts of any solver."""

import math

import pytest
import torch

from tests.solvers.test_solve import (
    PRIOR,
    SHAPE,
    measured,
    vp_levels,
    vp_noise_prediction,
    walk,
)
from unmurk.diffusion.prior import karras
from unmurk.errors import InputError
from unmurk.evaluation.certify import certify
from unmurk.evaluation.exact import GaussianPrior, operator_matrix
from unmurk.operators import Function
from unmurk.problem import Problem
from unmurk.rng import PerImageGenerator, StreamId
from unmurk.solvers import RedDiff, base, solve
from unmurk.solvers.data_term import Adam, Sgd, lbfgs
from unmurk.solvers.posterior_mean import risk

# -- optimisers ----------------------------------------------------------------------------------


def quadratics(n=3, size=6):
    """Losses u H u / 2 - b u of n images, H positive definite: their gradient, H and b."""
    g = torch.Generator().manual_seed(0)
    root = torch.randn(n, size, size, generator=g, dtype=torch.float64)
    h = root @ root.mT + 0.1 * torch.eye(size, dtype=torch.float64)
    b = torch.randn(n, size, generator=g, dtype=torch.float64)
    return lambda u: (h @ u[..., None])[..., 0] - b, h, b


def torchs(optimizer, steps, **options):
    """Every image alone under an optimiser of torch.optim."""
    _, h, b = quadratics()
    found = []
    for row in range(3):
        u = torch.zeros(6, dtype=torch.float64, requires_grad=True)
        optimiser = optimizer([u], **options)

        def closure(u=u, row=row, optimiser=optimiser):
            optimiser.zero_grad()
            loss = u @ h[row] @ u / 2 - b[row] @ u
            loss.backward()
            return loss

        for _ in range(steps):
            optimiser.step(closure)
        found.append(u.detach())
    return torch.stack(found)


ADAM = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}


@pytest.mark.parametrize(
    "ours, theirs, options",
    [
        (Adam(0.1), torch.optim.Adam, ADAM),
        (Adam(0.1, 0.3), torch.optim.AdamW, ADAM | {"weight_decay": 0.3}),
        (Sgd(0.02), torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}),
    ],
)
def test_steps_are_those_of_torch(ours, theirs, options):
    gradient = quadratics()[0]
    u = torch.zeros(3, 6, dtype=torch.float64)
    for _ in range(7):
        u = ours(u, gradient)
    torch.testing.assert_close(u, torchs(theirs, 7, **options))


@pytest.mark.parametrize("iterations", [1, 2, 5, 9])
def test_lbfgs_is_that_of_torch_image_by_image(iterations):
    gradient, h, b = quadratics()
    u = lbfgs(torch.zeros(3, 6, dtype=torch.float64), gradient, 0.7, iterations)
    options = {"lr": 0.7, "max_iter": iterations, "max_eval": 99, "history_size": 99}
    torch.testing.assert_close(u, torchs(torch.optim.LBFGS, 1, **options))
    many = lbfgs(torch.zeros(3, 6, dtype=torch.float64), gradient, 1.0, 40)
    torch.testing.assert_close(many, torch.linalg.solve(h, b), rtol=0, atol=1e-6)


# -- the paper preset ----------------------------------------------------------------------------


def reference(y, problem, steps, parallel, make):
    """The paper's loop, image by image, with torch's optimiser and `parallel` levels a step."""
    matrix = operator_matrix(problem, SHAPE, y)
    ones, paths = torch.ones(64, dtype=torch.float64), []
    for row in range(len(y)):
        A = matrix[row if len(matrix) > 1 else 0]
        y_u = 2 * y[row].flatten() - A @ ones
        one = problem.index_select([row])
        y_one = 2 * y[row : row + 1] - one.A(torch.ones(1, *SHAPE).double())
        u = one.A_dagger(y_one).clone().requires_grad_()
        streams, path = PerImageGenerator(5, [row], StreamId.SOLVER, 0), []
        optimiser = make(u)
        alphas, sigmas = vp_levels(steps)
        for k in range(0, steps, parallel):
            path.append((u.detach().clone() + 1) / 2)
            slopes = []
            for a, s in zip(alphas[k : k + parallel], sigmas[k : k + parallel], strict=True):
                e = streams.randn(*SHAPE).double()
                eps = vp_noise_prediction((a * u + s * e).detach(), a, s)
                slopes.append(0.3 * s / a * (eps - e))
            if isinstance(optimiser, torch.optim.LBFGS):
                optimiser = make(u)  # the memory is of one level

            def closure(u=u, A=A, y_u=y_u, slopes=slopes, optimiser=optimiser):
                optimiser.zero_grad()
                prior = torch.stack([(slope * u).mean() for slope in slopes]).mean()
                loss = (y_u - A @ u.flatten()).square().mean() / 2 + prior
                loss.backward()
                return loss

            optimiser.step(closure)
        paths.append(torch.cat(path))
    return torch.stack(paths, 1)


MAKE = {
    "adam": lambda u: torch.optim.Adam([u], lr=0.1, betas=(0.9, 0.99)),
    "adamw": lambda u: torch.optim.AdamW([u], lr=0.1, betas=(0.9, 0.99), weight_decay=0.01),
    "lbfgs": lambda u: torch.optim.LBFGS([u], lr=0.1, max_iter=5, max_eval=99),
}


@pytest.mark.parametrize("optimizer, parallel", [("adam", 4), ("adamw", 1), ("lbfgs", 2)])
def test_paper_preset_steps_with_every_optimiser_and_parallel_levels(optimizer, parallel):
    y, problem, _ = measured("sr:average,factor=2", 0.05, n=2)
    problem = problem.bind(range(2), SHAPE)
    expected = reference(y, problem, 20, parallel, MAKE[optimizer])
    options = {"preset": "paper", "steps": 20, "lam": 0.3, "optimizer": optimizer}
    path, result = walk(y, problem, seed=5, parallel=parallel, **options)
    torch.testing.assert_close(torch.stack(path), expected, rtol=1e-5, atol=1e-6)
    assert (result.nfe, len(result.trace)) == (20, 20 // parallel)


def test_paper_grids():
    y, problem, _ = measured("identity", 0.1)
    trace = solve(y, problem, PRIOR, preset="paper", grid="edm", steps=7).trace
    expected = karras(7, 78.7, 0.005).tolist()
    assert [at["sigma"] for at in trace] == pytest.approx(expected, rel=1e-3)
    last = solve(y, problem, PRIOR, preset="paper", grid="edm", steps=7, parallel=3)
    assert [at["nfe"] for at in last.trace] == [3, 6, 7]


# -- the default ---------------------------------------------------------------------------------


def test_momentum_shortens_the_distance_to_the_best_estimate():
    y, problem, _ = measured("inpaint:random,keep=0.4", 0.1)
    best = PRIOR.map(y, problem)
    slow, fast = (
        (solve(y, problem, PRIOR, momentum=beta, final="mean").mean - best).square().mean().sqrt()
        for beta in (0.0, 0.5)
    )
    assert fast < 0.6 * slow
    wide = GaussianPrior(PRIOR.mean, PRIOR.covariance + 0.04 * torch.eye(64).double())
    held = {"steps": 150, "sigma_max": 0.2, "sigma_min": 0.2, "momentum": 0.5}
    found = solve(y, problem, PRIOR, **held).mean
    torch.testing.assert_close(found, wide.map(y, problem), rtol=0, atol=1e-5)


def test_few_steps_start_lower_and_follow_faster():
    """From 50 on nothing changes; 15 cost less than 0.3 dB of what 50 reach."""
    y, problem, truth = measured("inpaint:random,keep=0.4", 0.02, n=24)
    first = {n: solve(y, problem, PRIOR, steps=n).trace[0]["sigma"] for n in (1, 15, 25, 50, 60)}
    expected = {1: 1.0, 15: 1.0042, 25: 1.9843, 50: 5.0, 60: 5.0}
    assert first == pytest.approx(expected, rel=1e-3)
    kept = solve(y, problem, PRIOR, steps=15, sigma_max=5.0).trace[0]["sigma"]
    assert kept == pytest.approx(5.0)
    many, few = (decibel(solve(y, problem, PRIOR, steps=n).mean, truth) for n in (50, 15))
    assert few > many - 0.3
    old = solve(y, problem, PRIOR, sigma_max=5.0, relax=1.0).mean
    assert torch.equal(old, solve(y, problem, PRIOR).mean)


def decibel(x, truth):
    return float(-10 * (x - truth).square().flatten(1).mean(1).log10().mean())


def test_final_is_the_denoised_measurement_where_that_is_the_best_there_is():
    y, problem, truth = measured("identity", 0.1, n=48)
    result = solve(y, problem, PRIOR)
    assert decibel(result.mean, truth) > decibel(PRIOR(y, 0.1), truth) - 0.02
    assert result.nfe == 100 and result.trace[-1]["sigma"] == pytest.approx(0.1, rel=1e-5)
    few = solve(y, problem, PRIOR, steps=4).mean  # too few to try other labels
    torch.testing.assert_close(few, PRIOR(y, 0.1), rtol=0, atol=1e-6)


def test_a_denoiser_that_takes_too_much_off_is_told_of_less_noise():
    prior = GaussianPrior.exponential((1, 16, 16), std=0.2)
    truth = prior.sample(24, seed=1).double()
    problem = Problem("identity", 0.1)
    y = problem.simulate(truth, seed=2)
    wrong = lambda x, sigma: prior(x, 2 * sigma)  # noqa: E731
    best, plain = decibel(prior(y, 0.1), truth), decibel(prior(y, 0.2), truth)
    found = decibel(solve(y, problem, wrong, steps=8).mean, truth)
    assert best - plain > 1.0
    assert best - found < 0.2 * (best - plain)


def test_weights_are_those_of_steins_estimate():
    """By hand: the exact trace of the linear denoiser stands in for that along one draw."""
    y, problem, _ = measured("identity", 0.1, n=40)
    powers, modes = torch.linalg.eigh(PRIOR.covariance)
    away = (y - PRIOR.mean).flatten(1) @ modes
    logits, means = [], []
    for c, q in zip((1, 0.85, 0.7, 0.5), (0.91, 0.03, 0.03, 0.03), strict=True):
        gain = powers / (powers + (c * 0.1) ** 2)
        misfit = ((1 - gain) * away).square().sum(1) / 0.1**2
        logits.append(math.log(q) - (misfit - 64 + 2 * gain.sum()) / 8)
        means.append((gain * away) @ modes.T)
    weights = torch.stack(logits).softmax(0)
    expected = PRIOR.mean.flatten() + (weights[..., None] * torch.stack(means)).sum(0)
    found = solve(y, problem, PRIOR, samples=32, steps=8).mean.flatten(1)
    # what the draws of the trace and the clipping leave of the correction
    plain = PRIOR(y, 0.1).flatten(1)
    assert (found - expected).norm() < 0.35 * (found - plain).norm()


def test_risk_is_that_of_the_estimate():
    truth = PRIOR.sample(4000, seed=1).double()
    g = torch.Generator().manual_seed(0)
    n, e = (torch.randn(truth.shape, generator=g, dtype=torch.float64) for _ in range(2))
    v, b = truth + 0.1 * n, 0.01 * e
    pair = torch.stack([PRIOR(v + b, 0.07), PRIOR(v - b, 0.07)]).clamp(0, 1)
    true = (pair.mean(0) - truth).square().flatten(1).sum(1) / 0.1**2
    away = risk(v, pair, b, 0.1) - true
    assert abs(away.mean()) < 3 * away.std() / 4000**0.5


def test_labels_are_tried_for_those_images_alone_that_y_holds_whole():
    mask = torch.ones(2, *SHAPE)
    mask[1, :, :, :4] = 0
    truth = PRIOR.sample(2, seed=1).double()
    problem = Problem(Function(lambda x: mask[: len(x)].to(x) * x), 0.1)
    y = problem.simulate(truth, seed=2)
    both = solve(y, problem, PRIOR).samples[0]
    labels = []

    def told(x, sigma):
        labels.append(sigma / 0.1)
        return PRIOR(x, sigma)

    alone = solve(y[:1], problem, told).samples[0]
    torch.testing.assert_close(both[:1], alone)
    assert labels[-8:] == pytest.approx([1, 1, 0.85, 0.85, 0.7, 0.7, 0.5, 0.5])
    # the other is denoised with what it is: noise of y where it is seen, drawn where it is not
    best = PRIOR.map(y[1:], Problem(Function(lambda x: mask[1:].to(x) * x), 0.1))
    assert (both[1] - best[0]).square().mean().sqrt() < 0.03


@pytest.mark.parametrize("gain, level", [(0.5, 0.2), (4.0, 0.025)])
def test_the_last_level_is_that_of_the_noise_on_the_image(gain, level):
    problem = Problem(Function(lambda x: gain * x), 0.1)
    y = problem.simulate(PRIOR.sample(3, seed=1).double(), seed=2)
    result = solve(y, problem, PRIOR)
    assert result.trace[-1]["sigma"] == pytest.approx(level, rel=1e-3)
    best = PRIOR(y / gain, 0.1 / gain)
    assert (result.mean - best).square().mean().sqrt() < 0.02


@pytest.mark.parametrize(
    "operator", ["inpaint:box,size=4", "blur:gaussian,sigma=1", "sr:average,factor=2"]
)
def test_gaussians_lose_next_to_nothing_by_it(operator):
    y, problem, truth = measured(operator, 0.2, n=24)
    found = [truth - PRIOR.map(y, problem), truth - solve(y, problem, PRIOR).mean]
    best, ours = (-10 * error.square().mean().log10() for error in found)
    assert ours > best - 0.1


# -- spread --------------------------------------------------------------------------------------


def test_spread_is_the_posterior_of_the_blurred_prior_when_levels_fall_slowly():
    """With Gaussians and small steps nothing is left but the exact posterior at the last level."""
    prior = GaussianPrior(torch.full(SHAPE, 0.5), torch.full(SHAPE, 0.04))
    problem = Problem("inpaint:box,size=4", 0.1)
    y = problem.simulate(prior.sample(1, seed=1), seed=2)
    options = {"steps": 300, "sigma_min": 0.1, "samples": 200}
    found = solve(y, problem, prior, preset="spread", batch=200, **options)
    seen = problem.bind([0], SHAPE).mask[0].bool()
    blurred = 0.04 + 0.1**2
    expected = torch.where(seen, (1 / blurred + 1 / 0.1**2) ** -1, blurred)
    ratio = found.samples.var(0)[0] / expected
    # 200 draws of 48 seen and 16 hidden pixels: standard errors 0.015 and 0.025
    assert ratio[seen].mean() == pytest.approx(1.0, abs=0.06)
    assert ratio[~seen].mean() == pytest.approx(1.0, abs=0.1)
    gain = torch.where(seen, blurred / (blurred + 0.1**2), 0.0)
    away = found.mean[0] - (0.5 + gain * (y[0] - 0.5))
    assert away.square().mean() < 1.5 * expected.mean() / 200


CASES = [
    ("gaussian", "inpaint:random,keep=0.5", 0.05),
    ("gaussian", "sr:average,factor=2", 0.3),
    ("mixture", "inpaint:box,size=4", 0.05),
]


@pytest.mark.parametrize("case", CASES)
def test_spread_covers(case):
    solver = {"method": "red-diff", "preset": "spread"}
    (row,) = certify({"spread": solver}, draws=64, images=2, problems=[case])
    assert row.claims == "heuristic" and row.evaluations == 100
    assert 0.85 < row.coverage < 0.95
    assert row.mean_error < 0.25
    for spread in (row.spread_observed, row.spread_unobserved):
        assert 0.85 < spread < 1.2


def test_spread_options_are_checked():
    y, problem, _ = measured("identity", 0.1)
    for option in ({"momentum": 1.0}, {"noise_floor": 0.0}):
        with pytest.raises(InputError, match=next(iter(option))):
            solve(y, problem, PRIOR, preset="spread", **option)
    with pytest.raises(InputError, match="parallel must be .* got 0"):
        solve(y, problem, PRIOR, preset="paper", parallel=0)
    with pytest.raises(InputError, match="momentum must be .* got 1"):
        solve(y, problem, PRIOR, momentum=1.0)


# -- restarts ------------------------------------------------------------------------------------

RUNS = [
    {"preset": "spread", "steps": 12},
    {"preset": "spread", "steps": 12, "restarts": 3},
    {"preset": "paper", "steps": 4, "parallel": 2, "optimizer": "lbfgs"},
    {"pairs": False, "steps": 3, "restarts": 2},
]


@pytest.mark.parametrize("options", RUNS)
def test_results_do_not_depend_on_the_batch(options):
    prior = GaussianPrior(torch.full(SHAPE, 0.5), torch.full(SHAPE, 0.04))
    y, problem, _ = measured("inpaint:random,keep=0.5", 0.1, n=5, dtype=torch.float32)
    one, many = (solve(y, problem, prior, samples=2, batch=b, **options) for b in (3, 64))
    torch.testing.assert_close(one.samples, many.samples, rtol=1e-5, atol=1e-6)
    again = solve(y[3:], problem.bind([3, 4], SHAPE), prior, **options)
    torch.testing.assert_close(again.samples[0], many.samples[0, 3:], rtol=1e-5, atol=1e-6)
    trace = [at["chi2"] for at in one.trace]
    assert trace == pytest.approx([at["chi2"] for at in many.trace], rel=1e-4)


class Guess(RedDiff):
    """Guesses; the third guess of image 1 is not finite."""

    name = "guess"

    def start(self, state, init):
        state.levels = [1.0]

    def step(self, state):
        found = state.denoise(state.generator.randn(*SHAPE).to(state.y), 1.0)
        self.seen.append(found)
        if len(self.seen) == 3:
            found[1] = torch.nan
        state.x = state.denoised = found


def test_restarts_keep_the_run_that_fits_best(monkeypatch):
    monkeypatch.setitem(base.REGISTERED, "guess", Guess)
    y, problem, _ = measured("inpaint:random,keep=0.5", 0.1, n=4)
    monkeypatch.setattr(Guess, "seen", [], raising=False)
    result = solve(y, problem, lambda x, sigma: x, "guess", restarts=5)
    runs = torch.stack(Guess.seen)
    mask = problem.bind(range(4), SHAPE).mask
    misfit = (mask * (y - runs)).square().flatten(2).sum(2) / 0.1**2 / mask.flatten(1).sum(1)
    least, chosen = misfit.nan_to_num(torch.inf).min(0)
    assert chosen.unique().numel() > 1
    torch.testing.assert_close(result.mean, runs[chosen, torch.arange(4)])
    assert result.nfe == 5 and result.trace[0]["nfe"] == 1
    assert result.trace[0]["chi2"] == pytest.approx(float(least.mean()))
    monkeypatch.setattr(Guess, "seen", [])
    first = solve(y, problem, lambda x, sigma: x, "guess").mean
    torch.testing.assert_close(first, runs[0])
    with pytest.raises(InputError, match="restarts must be a whole number from 1 to 10000, got 0"):
        solve(y, problem, PRIOR, restarts=0)
