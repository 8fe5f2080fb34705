"""DDNM, DiffPIR and pseudoinverse guidance against the same algorithms in dense matrices."""

import math

import pytest
import torch

from unmurk.errors import InputError
from unmurk.evaluation.exact import GaussianPrior, operator_matrix
from unmurk.problem import Problem
from unmurk.rng import PerImageGenerator, StreamId
from unmurk.solvers import solve
from unmurk.solvers.null_space import ddnm_correction
from unmurk.solvers.pigdm import pseudoinverse_guidance
from unmurk.solvers.state import CountingDenoiser

SHAPE = (1, 6, 6)
PRIOR = GaussianPrior.exponential(SHAPE, length=4.0)
METHODS = ["ddnm", "diffpir", "pigdm"]
OPERATORS = [
    "inpaint:random,keep=0.5",
    "sr:average,factor=2",
    "identity",
    "blur:gaussian,sigma=0.7,pad=circular",
    "blur:gaussian,sigma=0.7",
]
EVEN = OPERATORS[:3]  # all singular values that are not 0 are equal


def measured(operator, noise, n=2, prior=PRIOR, dtype=torch.float64):
    problem = Problem(operator, noise)
    truth = prior.sample(n, seed=1).to(dtype)
    return problem.simulate(truth, seed=2), problem.bind(range(n), prior.shape), truth


def dense(problem, y, prior=PRIOR):
    """One matrix for each image."""
    return operator_matrix(problem, prior.shape, y).expand(len(y), -1, -1)


def path(y, problem, method, prior=PRIOR, **options):
    """The image after every step."""
    seen = []
    solve(y, problem, prior, method, seed=3, callback=lambda at: seen.append(at["x"]), **options)
    return torch.stack(seen)


def rows(a, x):
    """The matrices a (B, m, d) times the rows of x (B, d)."""
    return (a @ x[..., None])[..., 0]


def denoised(x, t, prior=PRIOR):
    """E[x | x_t] by the dense formula, and the matrix of its derivative."""
    mean, cov = prior.mean.flatten(), prior.covariance
    gain = torch.linalg.solve(cov + t**2 * torch.eye(len(cov)).double(), cov)
    return mean + (x - mean) @ gain, gain


def reference(step, y, problem, steps, first=2.0, last=0.1, prior=PRIOR):
    """x after each of the steps `step(row, x_t, x0, J, t, s, z)`, all of them flat."""
    low, high = last ** (1 / 7), first ** (1 / 7)
    levels = [(high + k / (steps - 1) * (low - high)) ** 7 for k in range(steps)]
    streams = PerImageGenerator(3, range(len(y)), StreamId.SOLVER, 0)
    draw = lambda: streams.randn(*prior.shape).double().flatten(1)  # noqa: E731
    x, visited = 0.5 + levels[0] * draw(), []
    for t, s in zip(levels, [*levels[1:], 0.0], strict=True):
        x0, jacobian = denoised(x, t, prior)
        x = step(x, x0, jacobian, t, s, draw())
        visited.append(x.reshape(len(y), *prior.shape))
    return torch.stack(visited)


GRID = {"steps": 4, "sigma_max": 2.0, "sigma_min": 0.1}


# -- ddnm ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", EVEN)
@pytest.mark.parametrize("noise, eta", [(0.0, 0.85), (0.05, 1.0), (0.3, 1.0), (0.3, 0.85)])
def test_ddnm_is_the_papers_formula_where_singular_values_are_equal(operator, noise, eta):
    """Sigma and Phi by the SVD. The sign of fresh noise is free: minus where y sees."""
    y, problem, _ = measured(operator, noise)
    a = dense(problem, y)
    u, values, vt = torch.linalg.svd(a, full_matrices=True)
    size, rank = a.shape[-1], values.shape[-1]
    flat = y.flatten(1)

    def step(x, x0, jacobian, t, s, z):
        c = eta * s
        scale, phi = torch.ones(len(y), size).double(), torch.full((len(y), size), c**2).double()
        inverse = torch.zeros(len(y), size, a.shape[1]).double()
        for b in range(len(y)):
            for i in range(rank):
                sv = float(values[b, i])
                if sv < 1e-8:
                    continue
                if noise and c < noise / sv:
                    scale[b, i] = c * sv / noise
                phi[b, i] = max(c**2 - float(scale[b, i]) ** 2 * noise**2 / sv**2, 0.0)
                inverse[b, i, i] = 1 / sv
        into = lambda v: rows(vt, v)  # noqa: E731
        out = lambda v: rows(vt.mT, v)  # noqa: E731
        residual = rows(inverse @ u.mT, flat - rows(a, x0))
        sign = torch.where(inverse.sum(-1) > 0, -1.0 if noise else 1.0, 1.0)
        fresh = out(sign * phi.sqrt() * into(z))
        return x0 + out(scale * residual) + s * math.sqrt(1 - eta**2) * (x - x0) / t + fresh

    expected = reference(step, y, problem, 4)
    torch.testing.assert_close(
        path(y, problem, "ddnm", eta=eta, **GRID), expected, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("c", [0.02, 0.11, 0.5])
def test_ddnm_noise_adds_up_and_the_filter_stays_below_the_papers(operator, c):
    """Response to y and to n as matrices: sigma_y^2 B B^T + M M^T = c^2 I in every direction."""
    y, problem, _ = measured(operator, 0.1, n=1)
    a, (d, m) = dense(problem, y)[0], (36, y[0].numel())
    many = problem.index_select([0] * max(d, m))
    top = torch.linalg.matrix_norm(a, 2)

    def apply(x0, data, n):
        mended, fresh = ddnm_correction(
            many.index_select(range(len(n))), x0, data, n, c, top.expand(len(n))
        )
        return mended.flatten(1).T, fresh.flatten(1).T

    blank = torch.zeros(d, *SHAPE).double()
    eye_x = torch.eye(d).double().reshape(d, *SHAPE)
    eye_y = torch.eye(m).double().reshape(m, *y.shape[1:])
    to_y, _ = apply(blank[:m], eye_y, blank[:m])
    from_x0, to_n = apply(eye_x, torch.zeros(d, *y.shape[1:]).double(), eye_x)

    total = 0.01 * to_y @ to_y.T + to_n @ to_n.T
    torch.testing.assert_close(total, c**2 * torch.eye(d).double(), rtol=0, atol=2e-6)
    torch.testing.assert_close(from_x0, torch.eye(d).double() - to_y @ a, rtol=0, atol=2e-6)

    _, values, vt = torch.linalg.svd(a)
    kept = torch.zeros(d).double()
    kept[: len(values)] = values
    sharp = (c * kept / 0.1).clamp_max(1)  # the paper's, 0 where y sees nothing
    ours = (vt @ to_y @ a @ vt.T).diagonal()
    assert (ours <= sharp + 2e-6).all()
    assert ours[0] == pytest.approx(float(sharp[0]), abs=2e-6)


def test_largest_singular_value():
    for operator in OPERATORS:
        y, problem, _ = measured(operator, 0.1)
        start = PerImageGenerator(0, [0, 1]).randn(*SHAPE).double()
        found = problem.operator.norm(start)
        true = torch.linalg.matrix_norm(dense(problem, y), 2)
        torch.testing.assert_close(found, true, rtol=1e-6 if operator in EVEN else 2e-2, atol=0)
    assert Problem(lambda x: 0 * x).operator.norm(start).max() < 1e-5


@pytest.mark.parametrize("operator", OPERATORS[:2])
def test_ddnm_without_noise_ends_on_the_measurements(operator):
    y, problem, _ = measured(operator, 0.0)
    x = solve(y, problem, PRIOR, "ddnm", steps=5).mean
    torch.testing.assert_close(problem.A(x), y, rtol=0, atol=1e-12)
    float32 = solve(y.float(), problem, PRIOR, "ddnm", steps=5).mean
    torch.testing.assert_close(problem.A(float32), y.float(), rtol=0, atol=1e-6)


def test_ddnm_where_nothing_is_seen_samples_the_prior():
    y, blind = torch.zeros(1, *SHAPE), Problem(lambda x: 0 * x, 0.1)
    x = solve(y, blind, PRIOR, "ddnm", samples=400, batch=400, steps=20)
    assert abs(float(x.mean.mean()) - 0.5) < 0.02
    free = solve(y, Problem(lambda x: 0 * x, 0.0), PRIOR, "ddnm", samples=400, batch=400, steps=20)
    assert float(x.std.mean()) == pytest.approx(float(free.std.mean()), rel=0.05)


# -- diffpir -------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("noise, floor", [(0.0, 1e-2), (0.1, 1e-3)])
def test_diffpir_is_the_papers_algorithm(operator, noise, floor):
    y, problem, _ = measured(operator, noise)
    a, flat, lam, zeta = dense(problem, y), y.flatten(1), 2.5, 0.4

    def step(x, x0, jacobian, t, s, z):
        rho = lam * max(noise, floor) ** 2 / t**2
        normal = a.mT @ a + rho * torch.eye(a.shape[-1]).double()
        fitted = torch.linalg.solve(normal, rows(a.mT, flat) + rho * x0)
        e = (x - fitted) / t
        return fitted + s * (math.sqrt(1 - zeta) * e + math.sqrt(zeta) * z)

    expected = reference(step, y, problem, 4)
    options = {"lam": lam, "zeta": zeta, "noise_floor": floor, **GRID}
    torch.testing.assert_close(path(y, problem, "diffpir", **options), expected, rtol=0, atol=1e-4)


def test_diffpir_fits_nonlinear_operators():
    truth = PRIOR.sample(4, seed=3).clamp(0.05, 1)
    problem = Problem(lambda x: x.sign() * x**2, 0.1)
    y = problem.simulate(truth, seed=4)
    x = solve(y, problem, PRIOR, "diffpir", steps=30, samples=4).mean
    error = (x - truth).square().mean().sqrt()
    assert error < 0.85 * (y.clamp(0).sqrt() - truth).square().mean().sqrt()


def test_diffpir_floor_zero_is_a_projection():
    y, problem, _ = measured("sr:average,factor=2", 0.0)
    x = solve(y, problem, PRIOR, "diffpir", steps=4, noise_floor=0.0).mean
    torch.testing.assert_close(problem.A(x), y, rtol=0, atol=1e-12)


# -- pigdm ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("noise, eta", [(0.0, 1.0), (0.1, 0.3)])
def test_pigdm_is_the_papers_algorithm_in_vp_form(operator, noise, eta):
    """On u in [-1, 1], variance-preserving: DDIM coefficients and a_s a_t g as released."""
    if noise == 0 and operator.startswith("blur"):
        noise = 0.02  # A^+ of a blur leaves weak frequencies out: no dense pinv to compare with
    y, problem, _ = measured(operator, noise)
    a = dense(problem, y)
    y_u = 2 * y.flatten(1) - rows(a, torch.ones(len(y), a.shape[-1]).double())

    def step(x, x0, jacobian, t, s, z):
        abar_t, abar_s = (1 / (1 + 4 * v**2) for v in (t, s))
        u_t, u0 = math.sqrt(abar_t) * (2 * x - 1), 2 * x0 - 1
        c1 = eta * math.sqrt((1 - abar_t / abar_s) * (1 - abar_s) / (1 - abar_t))
        c2 = math.sqrt(1 - abar_s - c1**2)
        e = (u_t - math.sqrt(abar_t) * u0) / math.sqrt(1 - abar_t)
        residual = y_u - rows(a, u0)
        if noise == 0:
            pulled = rows(torch.linalg.pinv(a, rtol=1e-8), residual)
        else:
            r2 = (2 * t) ** 2 / (1 + (2 * t) ** 2)
            gram = r2 * a @ a.mT + (2 * noise) ** 2 * torch.eye(a.shape[1]).double()
            pulled = r2 * rows(a.mT, torch.linalg.solve(gram, residual))
        g = pulled @ jacobian.T / math.sqrt(abar_t)  # du0 / du_t = (dx0 / dx_t) / a_t
        u_s = math.sqrt(abar_s) * u0 + c1 * z + c2 * e + math.sqrt(abar_s * abar_t) * g
        return (u_s / math.sqrt(abar_s) + 1) / 2

    expected = reference(step, y, problem, 4)
    torch.testing.assert_close(
        path(y, problem, "pigdm", eta=eta, **GRID), expected, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("operator", OPERATORS)
def test_pigdm_guidance_is_autograd_of_the_explicit_expression(operator):
    """The likelihood N(A x0, r^2 A A^T + sigma_y^2) differentiated, its covariance held fixed."""

    def bent(x, sigma):
        return PRIOR(torch.tanh(x) + x, sigma)

    y, problem, _ = measured(operator, 0.1)
    a, t = dense(problem, y), 0.3
    r2 = t**2 / (1 + 4 * t**2)
    gram = r2 * a @ a.mT + 0.01 * torch.eye(a.shape[1]).double()
    x = PRIOR.sample(2, seed=8).double().requires_grad_()
    away = y.flatten(1) - rows(a, bent(x, t).flatten(1))
    log_likelihood = -0.5 * (away * torch.linalg.solve(gram, away)).sum()
    expected = r2 * torch.autograd.grad(log_likelihood, x)[0]
    g, x0 = pseudoinverse_guidance(problem, CountingDenoiser(bent), x, y, t)
    torch.testing.assert_close(g, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(x0, bent(x, t).detach())


def test_pigdm_needs_a_gradient():
    y, problem, _ = measured("identity", 0.1)
    with pytest.raises(InputError, match="pigdm needs a prior.*use red-diff or daps"):
        solve(y, problem, lambda x, sigma: PRIOR(x.detach(), sigma), "pigdm", steps=2)


# -- what they share -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("operator, noise", [(OPERATORS[0], 0.1), (OPERATORS[3], 0.02)])
def test_posterior_mean_beats_the_pseudo_inverse(method, operator, noise):
    """Decibels: 9 to 10 over A^+ y here, and 0.3 to 1.3 under the best there is."""
    y, problem, truth = measured(operator, noise, n=8)
    mean = solve(y, problem, PRIOR, method, samples=8, batch=64, steps=50).mean
    db = [
        float(-10 * (x - truth).square().mean().log10())
        for x in (problem.A_dagger(y), mean, PRIOR.map(y, problem))
    ]
    assert db[1] > db[0] + 8
    assert db[1] > db[2] - 1.6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 4, 6)])
def test_results_do_not_depend_on_the_batch(method, shape):
    prior = GaussianPrior(torch.full(shape, 0.5), torch.full(shape, 0.04))
    for operator in OPERATORS[:2]:
        y, problem, _ = measured(operator, 0.1, n=3, prior=prior, dtype=torch.float32)
        options = {"samples": 2, "seed": 4, "steps": 4}
        one, all_ = (solve(y, problem, prior, method, batch=b, **options) for b in (1, 64))
        assert all_.samples.shape == (2, 3, *shape) and all_.samples.dtype == torch.float32
        assert torch.equal(one.samples, all_.samples)
        assert not torch.equal(all_.samples[0], all_.samples[1])
        double = solve(y.double(), problem, prior, method, **options).samples
        assert double.dtype == torch.float64
        torch.testing.assert_close(double.float(), all_.samples, rtol=0, atol=1e-4)
    assert (all_.nfe, all_.claims) == (4, "heuristic")


@pytest.mark.parametrize("method", METHODS)
def test_callback_stops_early_with_what_there_is(method):
    y, problem, _ = measured("identity", 0.1)
    full = path(y, problem, method, steps=4)
    cut = solve(y, problem, PRIOR, method, seed=3, steps=4, callback=lambda at: at["step"] == 2)
    assert torch.equal(cut.mean, full[1]) and len(full) == 4
    assert cut.nfe == 2 == len(cut.trace)


@pytest.mark.parametrize("method", METHODS)
def test_levels_and_init(method):
    class Narrow:
        sigma_max = 0.5

        def denoise(self, x, sigma):
            seen.append((x, sigma))
            return PRIOR(x, sigma)

    seen = []
    y, problem, truth = measured("identity", 0.1)
    trace = solve(y, problem, PRIOR, method, steps=3).trace
    middle = ((20 ** (1 / 7) + 0.005 ** (1 / 7)) / 2) ** 7
    assert [at["sigma"] for at in trace] == pytest.approx([20, middle, 0.005])
    solve(y, problem, Narrow(), method, steps=3)
    assert seen[0][1] == pytest.approx(0.5)
    solve(y, problem, Narrow(), method, steps=3, init=truth, init_sigma=0.2, seed=6)
    noise = PerImageGenerator(6, [0, 1], StreamId.SOLVER, 0).randn(*SHAPE).double()
    torch.testing.assert_close(seen[3][0].detach(), truth + 0.2 * noise)
    assert seen[3][1] == pytest.approx(0.2)


@pytest.mark.parametrize("method", ["ddnm", "diffpir"])
def test_network_runs_without_gradients(method):
    def prior(x, sigma):
        assert not torch.is_grad_enabled() and not x.requires_grad
        return PRIOR(x, sigma)

    for operator in ("sr:average,factor=2", "blur:gaussian,sigma=0.7"):
        y, problem, _ = measured(operator, 0.1)
        solve(y.requires_grad_(), problem, prior, method, steps=2)


@pytest.mark.parametrize("method", METHODS)
def test_hidden_pixels_may_hold_anything(method):
    y, problem, _ = measured("inpaint:random,keep=0.5", 0.1)
    holes = torch.where(problem.mask > 0, y, torch.nan)
    clean, dirty = (solve(v, problem, PRIOR, method, steps=3).mean for v in (y, holes))
    assert torch.equal(clean, dirty)


@pytest.mark.parametrize("method", ["ddnm", "pigdm"])
def test_nonlinear_operators_are_refused_by_name(method):
    y = PRIOR.sample(1)
    with pytest.raises(InputError, match=f"{method} needs a linear.*diffpir") as caught:
        solve(y, Problem(lambda x: x**2, 0.1), PRIOR, method)
    assert "\n" not in str(caught.value)


def test_options_out_of_range_are_named():
    y, problem, _ = measured("identity", 0.1)
    bad = [
        ("ddnm", {"eta": 1.1}),
        ("pigdm", {"eta": -0.1}),
        ("diffpir", {"zeta": 2.0}),
        ("diffpir", {"lam": 0.0}),
        ("diffpir", {"noise_floor": -1.0}),
        ("ddnm", {"steps": 0}),
        ("pigdm", {"sigma_min": 0.0}),
    ]
    for method, options in bad:
        with pytest.raises(InputError, match=f"^{next(iter(options))} must be"):
            solve(y, problem, PRIOR, method, **options)
