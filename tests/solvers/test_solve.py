"""Solvers against independent derivations, closed forms and finite differences."""

import inspect

import pytest
import torch

import unmurk
from unmurk.diffusion.prior import karras
from unmurk.diffusion.schedules import linear_beta
from unmurk.errors import InputError
from unmurk.evaluation.exact import GaussianPrior, operator_matrix
from unmurk.operators import Function
from unmurk.problem import Problem
from unmurk.rng import PerImageGenerator, StreamId
from unmurk.solvers import METHODS, Dps, RedDiff, base, solve
from unmurk.solvers.data_term import likelihood_grad, prox
from unmurk.solvers.dps import norm_gradient
from unmurk.solvers.red_diff_loss import WEIGHTS
from unmurk.solvers.state import CountingDenoiser

SHAPE = (1, 8, 8)
PRIOR = GaussianPrior.exponential(SHAPE, length=4.0)


def measured(operator, noise, n=3, prior=PRIOR, dtype=torch.float64):
    problem = Problem(operator, noise)
    truth = prior.sample(n, seed=1).to(dtype)
    return problem.simulate(truth, seed=2), problem, truth


def vp_levels(steps):
    """alpha_t and sigma_t of the released schedule, descending."""
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    picked = abar[:: 1000 // steps].flip(0)
    return picked.sqrt(), (1 - picked).sqrt()


def vp_noise_prediction(u_t, a, s, prior=PRIOR):
    """The best prediction of the noise in u_t = a u + s e, u = 2 x - 1, from the score of u_t."""
    size = prior.mean.numel()
    covariance = a**2 * 4 * prior.covariance + s**2 * torch.eye(size, dtype=torch.float64)
    away = u_t.flatten(1) - a * (2 * prior.mean.flatten() - 1)
    return s * torch.linalg.solve(covariance, away.T).T.reshape(u_t.shape)


def noises(seed, rows, draws, sample=0):
    """What a solver draws for these images."""
    streams = PerImageGenerator(seed, rows, StreamId.SOLVER, sample)
    return [streams.randn(*SHAPE).double() for _ in range(draws)]


def walk(y, problem, method="red-diff", prior=PRIOR, **options):
    """The image at every step, and the result."""
    path = []
    result = solve(y, problem, prior, method, callback=lambda at: path.append(at["x"]), **options)
    return path, result


# -- schedules -----------------------------------------------------------------------------------


def test_linear_beta_is_the_released_grid():
    sigma = 2 * linear_beta()
    expected = {0: 0.010, 50: 0.176, 200: 0.724, 500: 3.44, 999: 157.4}
    for t, value in expected.items():
        assert sigma[999 - t].item() == pytest.approx(value, rel=0.01)
    torch.testing.assert_close(linear_beta(100), linear_beta()[9::10])


def test_karras_goes_from_end_to_end():
    levels = karras(7, 5.0, 0.01)
    assert levels[0].item() == pytest.approx(5.0) and levels[-1].item() == pytest.approx(0.01)
    roots = levels ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(6))
    for steps, high, low in ((0, 5.0, 0.1), (3, 0.1, 5.0), (3, 5.0, 0.0)):
        with pytest.raises(InputError):
            karras(steps, high, low)
    with pytest.raises(InputError, match="divisor of 1000"):
        linear_beta(300)


# -- red-diff: the paper preset ------------------------------------------------------------------


@pytest.mark.parametrize("t", [0, 50, 500, 999])
def test_identity_between_noise_and_denoising_residual(t):
    alphas, sigmas = (v.flip(0)[t] for v in vp_levels(1000))
    mu, n = PRIOR.sample(2).double(), noises(0, [0, 1], 1)[0]
    sg = sigmas / alphas
    u_t = alphas * (2 * mu - 1) + sigmas * n
    left = sg * (vp_noise_prediction(u_t, alphas, sigmas) - n)
    right = 2 * (mu - PRIOR(mu + sg / 2 * n, float(sg) / 2))
    torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-8)


REFERENCE_WEIGHTS = {
    "linear": lambda r: r,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "log": lambda r: torch.log(1 + r),
    "trunc_linear": lambda r: torch.clip(r, max=1.0),
    "power2over3": lambda r: torch.pow(r, 2 / 3),
    "const": torch.ones_like,
}


def released_run(y, problem, steps, lam, lr, obs, sigma_x0, weight):
    """The released loop, image by image: VP images in [-1, 1], eps-prediction, torch's Adam."""
    matrix = operator_matrix(problem, SHAPE, y)
    visited = []
    for row in range(len(y)):
        A = matrix[row if len(matrix) > 1 else 0]
        y_u = 2 * y[row].flatten() - A @ torch.ones(64, dtype=torch.float64)
        one = problem.index_select([row])
        u = one.A_dagger(2 * y[row : row + 1] - one.A(torch.ones(1, *SHAPE).double()))
        u = u.detach().clone().requires_grad_()
        adam = torch.optim.Adam([u], lr=lr, betas=(0.9, 0.99), eps=1e-8)
        streams = PerImageGenerator(5, [row], StreamId.SOLVER, 0)
        path = []
        for a, s in zip(*vp_levels(steps), strict=True):
            jitter = (
                streams.randn(*SHAPE).double() if sigma_x0 else torch.zeros(1, *SHAPE).double()
            )
            e = streams.randn(*SHAPE).double()
            u0 = u + sigma_x0 * jitter
            eps = vp_noise_prediction((a * u0 + s * e).detach(), a, s)
            data = (y_u - A @ u0.flatten()).square().mean() / 2
            prior = ((eps - e).detach() * u0).mean()
            loss = obs * data + lam * REFERENCE_WEIGHTS[weight](s / a) * prior
            path.append((u0.detach() + 1) / 2)
            adam.zero_grad()
            loss.backward()
            adam.step()
        visited.append(torch.cat(path))
    return torch.stack(visited, 1)  # (steps, B, C, H, W)


@pytest.mark.parametrize("operator", ["inpaint:random,keep=0.5", "sr:average,factor=2"])
@pytest.mark.parametrize("weight", REFERENCE_WEIGHTS)
def test_paper_preset_is_the_released_algorithm_at_every_step(operator, weight):
    y, problem, _ = measured(operator, 0.05, n=2)
    problem = problem.bind(range(2), SHAPE)
    options = {"lam": 0.3, "lr": 0.15, "obs_weight": 1.5, "sigma_x0": 1e-3, "weight": weight}
    expected = released_run(y, problem, 20, 0.3, 0.15, 1.5, 1e-3, weight)
    path, result = walk(y, problem, seed=5, preset="paper", steps=20, **options)
    error = (torch.stack(path) - expected).flatten(1).norm(dim=1)
    assert (error / expected.flatten(1).norm(dim=1)).max() < 1e-5
    assert torch.equal(result.mean, path[-1])  # the image before the last step of Adam
    assert result.nfe == 20
    assert set(WEIGHTS) == set(REFERENCE_WEIGHTS)


def test_paper_preset_defaults_are_the_released_ones():
    y, problem, _ = measured("sr:average,factor=2", 0.0, n=1)
    given = solve(y, problem, PRIOR, seed=5, preset="paper", steps=10).mean
    expected = released_run(y, problem.bind([0], SHAPE), 10, 0.25, 0.1, 1.0, 0.0, "linear")[-1]
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6)


def test_paper_orders_and_optimisers():
    y, problem, _ = measured("inpaint:box,size=3", 0.05)
    seen = {}
    for order in ("descending", "ascending", "random"):
        trace = solve(y, problem, PRIOR, preset="paper", steps=50, order=order).trace
        seen[order] = [at["sigma"] for at in trace]
    assert seen["ascending"] == seen["descending"][::-1] == sorted(seen["descending"])
    assert seen["random"] != seen["descending"]
    assert set(seen["random"]) <= set(seen["descending"])

    sgd = {"preset": "paper", "optimizer": "sgd", "lr": 3.0, "lam": 0.0}
    path, _ = walk(y, problem, steps=10, **sgd)
    first, second = (problem.A_adjoint(problem.residual(x, y)) / 32 for x in path[:2])  # -loss'(u)
    torch.testing.assert_close(path[1] - path[0], 1.5 * first)
    torch.testing.assert_close(path[2] - path[1], 0.9 * 1.5 * first + 1.5 * second)


# -- red-diff: the default -----------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["inpaint:random,keep=0.4", "blur:gaussian,sigma=1"])
@pytest.mark.parametrize("relax", [1.0, 0.5])
def test_fixed_point_is_the_map_under_the_blurred_prior(operator, relax):
    """At one level sg, held for long, the optimum is the MAP of a prior blurred by sg.

    The exact denoiser of a Gaussian is linear, so pairs cancel the noise exactly and every step is
    a deterministic proximal gradient step. Its objective is -log p_sg(x) - log p(y | x), with p_sg
    the Gaussian of covariance S + sg^2: the closed form to compare with, for any `relax`.
    """
    y, problem, _ = measured(operator, 0.1)
    sg = 0.2
    wide = PRIOR.covariance + sg**2 * torch.eye(64, dtype=torch.float64)
    x = solve(y, problem, PRIOR, steps=300, sigma_max=sg, sigma_min=sg, relax=relax).mean
    torch.testing.assert_close(
        x, GaussianPrior(PRIOR.mean, wide).map(y, problem), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    "operator",
    ["inpaint:random,keep=0.4", "blur:uniform,size=3,pad=circular", "sr:average,factor=2"],
)
def test_many_falling_levels_reach_the_map(operator):
    """With levels falling slowly to one far below sigma_y the blur of the prior does not count."""
    y, problem, _ = measured(operator, 0.1)
    x = solve(y, problem, PRIOR, steps=1000, sigma_max=1.0, final="mean").mean
    torch.testing.assert_close(x, PRIOR.map(y, problem), rtol=0, atol=5e-3)


@pytest.mark.parametrize("noise", [0.01, 0.2])
@pytest.mark.parametrize("operator", ["inpaint:random,keep=0.4", "sr:average,factor=2"])
def test_default_beats_the_paper_preset_at_a_tenth_of_the_cost(operator, noise):
    y, problem, truth = measured(operator, noise, n=12, dtype=torch.float32)
    best = -10 * (PRIOR.map(y, problem) - truth).square().mean().log10()
    ours = solve(y, problem, PRIOR)
    paper = solve(y, problem, PRIOR, preset="paper")
    assert (ours.nfe, paper.nfe) == (100, 1000)
    db = [float(-10 * (r.mean - truth).square().mean().log10()) for r in (ours, paper)]
    assert db[0] > db[1] + 1.0
    assert db[0] > best - 0.7


def test_without_pairs_noise_stays_and_costs_half():
    y, problem, _ = measured("inpaint:random,keep=0.4", 0.05)
    single = solve(y, problem, PRIOR, pairs=False, samples=4)
    double = solve(y, problem, PRIOR, samples=4)
    assert (single.nfe, double.nfe) == (50, 100)
    assert double.std.max() < 1e-6 < 1e-2 < single.std.mean()  # linear D: pairs cancel all noise


def test_network_runs_without_gradients():
    def prior(x, sigma):
        assert not torch.is_grad_enabled() and not x.requires_grad
        return PRIOR(x, sigma)

    y, problem, _ = measured("sr:average,factor=2", 0.1)
    solve(y.requires_grad_(), problem, prior, steps=2)
    solve(y, problem, prior, preset="paper", steps=2)


def test_final_denoised_is_what_the_callback_saw():
    y, problem, _ = measured("identity", 0.1)
    seen = []
    options = {"steps": 5, "final": "denoised", "callback": lambda at: seen.append(at["denoised"])}
    assert torch.equal(solve(y, problem, PRIOR, **options).mean, seen[-1])


def test_noise_floor_zero_is_a_projection():
    y, problem, _ = measured("inpaint:random,keep=0.4", 0.0)
    seen = problem.bind(range(3), SHAPE).mask > 0
    exact = solve(y, problem, PRIOR, noise_floor=0.0).mean
    torch.testing.assert_close(exact[seen], y[seen])
    floored = solve(y, problem, PRIOR).mean
    assert (floored - PRIOR.map(y, problem)).square().mean().sqrt() < 0.03


def test_prior_range_bounds_the_levels():
    class Narrow:
        sigma_max = 0.5

        def denoise(self, x, sigma):
            return PRIOR(x, sigma)

    y, problem, _ = measured("identity", 0.1)
    assert solve(y, problem, Narrow(), steps=3).trace[0]["sigma"] == pytest.approx(0.5)
    assert solve(y, problem, PRIOR, steps=50).trace[0]["sigma"] == pytest.approx(5.0)
    begun = solve(y, problem, PRIOR, steps=3, init=y, init_sigma=0.7).trace[0]["sigma"]
    assert begun == pytest.approx(0.7)


# -- data terms ----------------------------------------------------------------------------------


def test_pull_is_the_gradient_of_the_misfit():
    y, problem, _ = measured("sr:average,factor=2", 0.1)
    x = PRIOR.sample(3, seed=9).double()
    same = Problem(Function(problem.A, linear=False), 0.1).bind(range(3), SHAPE)
    torch.testing.assert_close(likelihood_grad(problem, x, y), likelihood_grad(same, x, y))


def test_descent_reaches_the_prox():
    y, problem, _ = measured("sr:average,factor=2", 0.1)
    z = PRIOR.sample(3, seed=9).double()
    same = Problem(Function(problem.A, linear=False), 0.1).bind(range(3), SHAPE)
    exact = prox(problem, z, y, 0.3, 0.1)
    torch.testing.assert_close(prox(same, z, y, 0.3, 0.1, steps=40), exact, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="noise_floor"):
        prox(same, z, y, 0.3, 0.0)


def test_nonlinear_operators_are_fitted():
    truth = PRIOR.sample(4, seed=3).clamp(0.05, 1)
    problem = Problem(lambda x: x.sign() * x**2, 0.02)
    y = problem.simulate(truth, seed=4)
    result = solve(y, problem, PRIOR)
    assert result.trace[-1]["chi2"] < 1.2
    error = (result.mean - truth).square().mean().sqrt()
    assert error < (y.clamp(0).sqrt() - truth).square().mean().sqrt()
    with pytest.raises(InputError, match="give init"):
        solve(y, problem, PRIOR, preset="paper", steps=2)
    assert solve(y, problem, PRIOR, preset="paper", steps=2, init=y).nfe == 2


# -- dps -----------------------------------------------------------------------------------------


def test_guidance_agrees_with_finite_differences():
    def bent(x, sigma):
        return PRIOR(torch.tanh(x) + x, sigma)

    y, problem, _ = measured("blur:gaussian,sigma=1", 0.1)
    x, direction = PRIOR.sample(3, seed=8).double(), noises(1, [0, 1, 2], 1)[0]
    problem = problem.bind(range(3), SHAPE)

    def norms(x):
        return problem.residual(bent(x, 0.3), y).flatten(1).norm(dim=1)

    gradient, x0 = norm_gradient(problem, CountingDenoiser(bent), x, y, 0.3, clip=False)
    slope = (norms(x + 1e-5 * direction) - norms(x - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close(
        (gradient * direction).flatten(1).sum(1), slope, rtol=1e-6, atol=1e-8
    )
    torch.testing.assert_close(x0, bent(x, 0.3))
    clipped, x0 = norm_gradient(problem, CountingDenoiser(bent), 4 * x, y, 0.3)
    assert x0.max() == 1 and clipped.abs().sum() < gradient.abs().sum()


@pytest.mark.parametrize("clip", [True, False])
def test_dps_is_ancestral_sampling_in_vp_form(clip):
    """In VP images of [-1, 1]: DDPM's posterior mean and variance, minus the gradient."""
    y, problem, _ = measured("sr:average,factor=2", 0.05, n=2)
    A = operator_matrix(problem, SHAPE, y)[0]
    steps = 10
    zeta = 0.4
    y_u = 2 * y.flatten(1) - A @ torch.ones(64, dtype=torch.float64)
    z = noises(7, [0, 1], steps)
    u = z[0]
    a, s = vp_levels(steps)
    abar = a**2
    for k in range(steps):
        before = abar[k + 1] if k + 1 < steps else torch.tensor(1.0).double()
        beta = 1 - abar[k] / before
        u = u.detach().requires_grad_()
        u0 = (u - s[k] * vp_noise_prediction(u, a[k], s[k])) / a[k]
        u0 = u0.clamp(-1, 1) if clip else u0
        norms = (y_u - u0.flatten(1) @ A.T).norm(dim=1)
        gradient = torch.autograd.grad(norms.sum(), u)[0]
        mean = before.sqrt() * beta * u0 + (1 - beta).sqrt() * (1 - before) * u
        mean = mean / (1 - abar[k])
        if k + 1 < steps:
            mean = mean + (beta * (1 - before) / (1 - abar[k])).sqrt() * z[k + 1]
        u = (mean - zeta * gradient).detach()
    x = solve(y, problem, PRIOR, "dps", seed=7, steps=steps, zeta=zeta, clip=clip).mean
    torch.testing.assert_close(x, (u + 1) / 2, rtol=1e-6, atol=1e-7)


def test_dps_without_pull_samples_the_prior():
    prior = GaussianPrior(torch.full(SHAPE, 0.4), torch.linspace(0.01, 0.09, 64).reshape(SHAPE))
    y = torch.zeros(1, *SHAPE)
    options = {"zeta": 0.0, "clip": False, "steps": 500}
    x = solve(y, Problem("identity", 0.1), prior, "dps", samples=1000, batch=1000, **options)
    torch.testing.assert_close(x.mean.mean(), torch.tensor(0.4), atol=5e-3, rtol=0)
    ratio = x.std[0].square().flatten() / torch.linspace(0.01, 0.09, 64)
    assert abs(ratio.mean() - 1) < 0.05


def test_dps_pulls_toward_y_and_needs_a_gradient():
    y, problem, _ = measured("sr:average,factor=2", 0.05)
    free = solve(y, problem, PRIOR, "dps", steps=100, zeta=0.0).trace[-1]["chi2"]
    assert solve(y, problem, PRIOR, "dps", steps=100).trace[-1]["chi2"] < free / 10
    with pytest.raises(InputError, match="use red-diff"):
        solve(y, problem, lambda x, sigma: PRIOR(x.detach(), sigma), "dps", steps=2)


# -- solve ---------------------------------------------------------------------------------------

RUNS = [
    ("red-diff", {"steps": 4}),
    ("red-diff", {"preset": "paper", "steps": 4}),
    ("dps", {"steps": 4}),
]


@pytest.mark.parametrize("method, options", RUNS)
def test_results_do_not_depend_on_the_batch(method, options):
    prior = GaussianPrior(torch.full(SHAPE, 0.5), torch.full(SHAPE, 0.04))
    y, problem, _ = measured("inpaint:random,keep=0.5", 0.1, n=5, dtype=torch.float32)
    one, three, all_ = (
        solve(y, problem, prior, method, samples=3, seed=4, batch=b, **options) for b in (1, 3, 64)
    )
    assert all_.samples.shape == (3, 5, *SHAPE)
    assert torch.equal(one.samples, all_.samples) and torch.equal(three.samples, all_.samples)
    assert one.nfe == all_.nfe
    assert one.trace[-1]["chi2"] == pytest.approx(all_.trace[-1]["chi2"], rel=1e-5)
    again = solve(y, problem, prior, method, seed=4, **options)
    assert torch.equal(again.samples[0], all_.samples[0])
    tail = solve(y[3:], problem.bind([3, 4], SHAPE), prior, method, seed=4, **options)
    assert torch.equal(tail.mean, again.mean[3:])
    if method == "dps":
        assert not torch.equal(all_.samples[0], all_.samples[1])
        assert not torch.equal(again.mean, solve(y, problem, prior, method, **options).mean)


def test_mean_std_and_claims():
    y, problem, _ = measured("identity", 0.1)
    result = solve(y, problem, PRIOR, "dps", samples=3, steps=5)
    torch.testing.assert_close(result.mean, result.samples.mean(0))
    torch.testing.assert_close(result.std, result.samples.std(0))
    assert (result.method, result.claims) == ("dps", "heuristic")
    single = solve(y, problem, PRIOR, steps=2)
    assert single.std.abs().max() == 0 and single.claims == "point"


def test_trace_and_callback():
    y, problem, _ = measured("inpaint:random,keep=0.5", 0.1)
    seen = []
    result = solve(y, problem, PRIOR, steps=5, callback=seen.append)
    assert [at["step"] for at in result.trace] == [1, 2, 3, 4, 5]
    assert [at["nfe"] for at in result.trace] == [2, 4, 6, 8, 10]
    assert set(seen[0]) == {"step", "steps", "sigma", "x", "denoised", "nfe", "chi2"}
    assert [at["sigma"] for at in seen] == [at["sigma"] for at in result.trace]
    bound = problem.bind(range(3), SHAPE)
    square = (bound.mask * (y - result.mean)).square().flatten(1).sum(1)
    chi = (square / 0.01 / bound.mask.flatten(1).sum(1)).mean()
    assert result.trace[-1]["chi2"] == pytest.approx(float(chi))
    kept = solve(y, Problem("inpaint:random,keep=0.5", 0.0), PRIOR, steps=1)
    square = (bound.mask * (y - kept.mean)).square().flatten(1).sum(1)
    rms = (square / bound.mask.flatten(1).sum(1)).sqrt().mean()
    assert kept.trace[0]["chi2"] == pytest.approx(float(rms))


@pytest.mark.parametrize("method, options", RUNS)
def test_callback_stops_early(method, options):
    y, problem, _ = measured("identity", 0.1)
    cut, (full, _) = [], walk(y, problem, method, **options)
    result = solve(
        y, problem, PRIOR, method, callback=lambda at: cut.append(1) or at["step"] == 2, **options
    )
    assert len(cut) == 2 == len(result.trace) and len(full) == 4
    assert result.nfe == result.trace[-1]["nfe"] < 8
    assert torch.equal(result.mean, full[1])


def test_init_images_and_posterior_draws():
    y, problem, truth = measured("sr:average,factor=2", 0.1)
    paper = {"preset": "paper", "steps": 2}
    torch.testing.assert_close(walk(y, problem, init=truth, **paper)[0][0], truth)

    class Posterior:
        def sample(self, y, problem, n, seed):
            return truth + (torch.arange(n).reshape(-1, 1, 1, 1, 1) + seed) / 100

    draws = {"init": "posterior", "posterior": Posterior(), "samples": 2, "seed": 10}
    path, _ = walk(y, problem, **draws, **paper)
    torch.testing.assert_close(path[0], torch.cat([truth + 0.1, truth + 0.11]))
    near = solve(y, problem, PRIOR, "dps", steps=100, init=truth, init_sigma=0.05, zeta=0.0)
    assert (near.mean - truth).square().mean().sqrt() < 0.07
    assert near.nfe < 100


def test_the_public_function_is_a_function():
    y, problem, _ = measured("identity", 0.1)
    expected = solve(y, problem, PRIOR, steps=2).mean
    assert torch.equal(unmurk.solve(y, problem, PRIOR, steps=2).mean, expected)
    assert inspect.isfunction(unmurk.solve) and inspect.isfunction(unmurk.solvers.solve)
    assert "samples" in inspect.signature(unmurk.solve).parameters


def test_bad_input_is_named(monkeypatch):
    y, problem, _ = measured("sr:average,factor=2", 0.1)

    def says(message, *args, **kwargs):
        with pytest.raises(InputError, match=message) as caught:
            solve(*args, **kwargs)
        assert "\n" not in str(caught.value)

    says("choose from auto, red-diff, dps", y, problem, PRIOR, "reddiff")
    says("no option 'stepz': it takes .*steps", y, problem, PRIOR, stepz=3)
    says("preset 'fast'", y, problem, PRIOR, preset="fast")
    says("dps has default", y, problem, PRIOR, "dps", preset="paper")
    says("relax.* got 2", y, problem, PRIOR, relax=2.0)
    says("noise_floor.* got -1", y, problem, PRIOR, noise_floor=-1.0)
    says("zeta.* got -1", y, problem, PRIOR, "dps", zeta=-1.0)
    says("divisor", y, problem, PRIOR, "dps", steps=7)
    for option in ("weight", "order", "optimizer"):
        says(option, y, problem, PRIOR, preset="paper", **{option: "x"})
    says("samples must be a whole number", y, problem, PRIOR, samples=0)
    says("give floats", y.long(), problem, PRIOR)
    says("init has shape", y, problem, PRIOR, init=torch.zeros(2, *SHAPE))
    says("init 'flow'", y, problem, PRIOR, init="flow")
    says("give posterior=", y, problem, PRIOR, init="posterior")
    says("prior is int", y, problem, 3)
    says("keeps the shape", y, problem, lambda x, sigma: x[:1])
    says("diverged on 3", y, problem, lambda x, sigma: x * float("nan"))
    says("bound to 2 images", y, problem.bind([0, 1], SHAPE), PRIOR)

    class Needy(RedDiff):
        name, requires = "needy", "linear"

    monkeypatch.setitem(base.REGISTERED, "needy", Needy)
    says("use red-diff or dps", y, Problem(lambda x: x**2, 0.1), lambda x, s: x, "needy")
    assert METHODS["dps"] is Dps
