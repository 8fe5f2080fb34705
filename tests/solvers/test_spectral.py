"""Singular value decompositions of operators, and DDRM, TMPD and HRDIS against dense algebra.

The exact claims are held against matrices; where a Gaussian prior makes a solver affine in its
noise, its mean is what a run without noise returns, and only the spread is measured with draws.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmurk.errors import InputError
from unmurk.evaluation.certify import certify
from unmurk.evaluation.exact import GaussianPrior, operator_matrix
from unmurk.operators import Function, parse
from unmurk.operators.linalg import LIMIT
from unmurk.problem import Problem
from unmurk.rng import PerImageGenerator, StreamId
from unmurk.solvers import METHODS, solve
from unmurk.solvers.ddrm import Ddrm, ddrm_step
from unmurk.solvers.hrdis import Hrdis
from unmurk.solvers.mmps import conditional_denoiser
from unmurk.solvers.null_space import ddnm_correction
from unmurk.solvers.state import CountingDenoiser
from unmurk.solvers.tmpd import Tmpd, projected_denoiser

SHAPE = (1, 6, 6)
PRIOR = GaussianPrior.exponential(SHAPE, length=4.0)
WHITE = GaussianPrior(torch.full(SHAPE, 0.5), torch.full(SHAPE, 0.04))
FACTORED = [
    "identity",
    "sr:average,factor=2",
    "sr:bicubic,factor=2",
    "blur:gaussian,sigma=0.7",
    "blur:uniform,size=3x5",
    "blur:motion,length=3",
    "blur:gaussian,sigma=0.7|sr:average,factor=2",
    "blur:gaussian,sigma=0.7,pad=circular|blur:uniform,size=3",
]
STRUCTURED = [
    *("inpaint:random,keep=0.5", "inpaint:box,size=3,seed=1"),
    *("inpaint:freeform,strokes=1,width=2", *FACTORED),
    *("blur:gaussian,sigma=0.7,pad=circular", "blur:motion,length=4,angle=30,pad=circular"),
    "blur:uniform,size=3,pad=circular",  # two frequencies do not pass at all
]
DENSE = [
    "blur:motion,length=4,angle=30",
    "blur:gaussian,sigma=0.7|inpaint:random,keep=0.5",
]
EVEN = ["inpaint:random,keep=0.5", "sr:average,factor=2", "identity"]  # one value, or 0
SOLVED = [*EVEN, "sr:bicubic,factor=2", "blur:gaussian,sigma=0.7,pad=circular", DENSE[0]]
QUICK = {"ddrm": {"steps": 4}, "tmpd": {"steps": 4}, "hrdis": {"steps": 4}}


class Still(PerImageGenerator):
    """Streams without noise."""

    def randn(self, *shape):
        return super().randn(*shape) * 0


def measured(operator, noise, n=2, prior=PRIOR, dtype=torch.float64):
    problem = Problem(operator, noise)
    truth = prior.sample(n, seed=1).to(dtype)
    return problem.simulate(truth, seed=2), problem.bind(range(n), prior.shape), truth


def path(y, problem, method, prior=PRIOR, **options):
    """The image after every step."""
    seen = []
    solve(y, problem, prior, method, seed=3, callback=lambda at: seen.append(at["x"]), **options)
    return torch.stack(seen)


def draws(n, shape=SHAPE):
    """The noise that `path` gives a solver, one batch of images after another."""
    streams = PerImageGenerator(3, range(n), StreamId.SOLVER, 0)
    while True:
        yield streams.randn(*shape).double()


def karras(steps, first, last):
    low, high = last ** (1 / 7), first ** (1 / 7)
    return [(high + k / (steps - 1) * (low - high)) ** 7 for k in range(steps)]


def rows(a, x):
    """The matrices a (B or 1, m, d) times the rows of x (B, d)."""
    return (a @ x[..., None])[..., 0]


def map_matrix(f, n, shape):
    """The matrix of a linear map on batches, from its columns."""
    eye = torch.eye(n, dtype=torch.float64).reshape(n, *shape)
    return f(eye).flatten(1).T


# -- decompositions ------------------------------------------------------------------------------


def check_svd(operator, shape, tolerance=1e-6):
    """V f(s) V^T = f(A^T A), V s U^T = A^T, U^T A = s V^T, and U orthonormal."""
    one, d = operator.bind([5], shape), math.prod(shape)
    y_shape = one.y_shape(shape)
    m, eye = math.prod(y_shape), torch.eye(d).double()
    a = map_matrix(one.A, d, shape)
    spectrum = one.svd(torch.zeros(1, *shape).double())
    s, into, out, back = spectrum.s, spectrum.into, spectrum.out, spectrum.measured

    def agree(f, expected, n=d, take=shape):
        torch.testing.assert_close(map_matrix(f, n, take), expected, rtol=0, atol=tolerance)

    assert not s.is_complex() and (s >= 0).all()
    agree(lambda x: out(into(x)), eye)
    agree(lambda x: out(s**2 * into(x)), a.T @ a)
    agree(lambda x: out(into(x) / (0.1 + s**2)), torch.linalg.inv(0.1 * eye + a.T @ a))
    agree(lambda y: out(s * back(y)), a.T, m, y_shape)
    x = PerImageGenerator(1, [0]).randn(*shape).double()
    torch.testing.assert_close(out(back(one.A(x))), out(s * into(x)), rtol=0, atol=tolerance)
    turn = torch.linalg.svdvals(map_matrix(lambda y: out(back(y)), m, y_shape))
    assert torch.minimum(turn, (turn - 1).abs()).max() < tolerance


@pytest.mark.parametrize("form", STRUCTURED + DENSE)
@pytest.mark.parametrize("shape", [(1, 6, 4), (2, 4, 6)])
def test_decompositions_are_those_of_the_matrix(form, shape):
    check_svd(parse(form), shape)


def test_decompositions_that_change_the_channels():
    check_svd(parse("colour:grey"), (3, 4, 2))
    check_svd(parse("colour:grey|blur:gaussian,sigma=0.5|sr:bicubic,factor=2"), (3, 6, 4))
    check_svd(Function(lambda x: 2 * x[:, :1] - x[:, 1:]), (2, 3, 3))


@settings(max_examples=25, deadline=None)
@given(
    blur=st.one_of(
        st.builds("gaussian,sigma={}".format, st.floats(0.2, 2)),
        st.builds("uniform,size={}x{}".format, *[st.sampled_from([1, 3, 5])] * 2),
        st.builds("motion,length={},angle={}".format, st.floats(1, 5), st.floats(0, 180)),
    ),
    pad=st.sampled_from(["reflect", "circular"]),
    shape=st.tuples(st.just(1), st.integers(1, 7), st.integers(1, 7)),
)
def test_decompositions_of_any_blur(blur, pad, shape):
    operator = parse(f"blur:{blur},pad={pad}")
    spectrum = operator.svd(torch.zeros(1, *shape).double())
    x, y = (PerImageGenerator(seed, [0]).randn(*shape).double() for seed in (1, 2))
    transposed = spectrum.out(spectrum.s * spectrum.measured(y))
    torch.testing.assert_close(transposed, operator.A_adjoint(y), rtol=0, atol=1e-6)
    given = spectrum.out(spectrum.s**2 * spectrum.into(x))
    torch.testing.assert_close(given, operator.A_adjoint(operator.A(x)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", STRUCTURED)
def test_structure_spares_the_matrix(form):
    """Far above the limit of dense matrices, and in the type and for the rows that are given."""
    shape = (1, 60, 48)
    operator = parse(form).bind([0, 1], shape)
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    spectrum = operator.svd(x)
    assert spectrum.s.dtype == torch.float32
    normal = spectrum.out(spectrum.s**2 * spectrum.into(x))
    expected = operator.A_adjoint(operator.A(x))
    torch.testing.assert_close(normal, expected, rtol=0, atol=2e-5)


def test_images_with_their_own_matrices():
    operator = parse(DENSE[1]).bind([0, 1, 2], SHAPE)
    x = PRIOR.sample(3, seed=2).double()
    spectrum = operator.svd(x)
    normal = spectrum.out(spectrum.s**2 * spectrum.into(x))
    torch.testing.assert_close(normal, operator.A_adjoint(operator.A(x)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", DENSE)
def test_large_images_without_structure_are_refused(form):
    y = torch.zeros(1, 1, 64, 33)
    with pytest.raises(InputError, match=f"2112 numbers, above {LIMIT}: use ddnm") as caught:
        solve(y, Problem(form, 0.1), lambda x, sigma: x, "ddrm")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="not linear"):
        Function(lambda x: x**2).svd(y)


# -- ddrm ----------------------------------------------------------------------------------------


def by_direction(a, y, sigma_y, x, x0, t, s, z, eta, eta_b, floor=0.0):
    """The three rules of the paper for one image, direction by direction of a dense SVD."""
    u, values, vt = torch.linalg.svd(a, full_matrices=True)
    old, clean, noise = (vt @ v for v in (x, x0, z))
    new = torch.empty_like(clean)
    for i in range(len(new)):
        sv = float(values[i]) if i < len(values) else 0.0
        fresh = eta * s * noise[i]
        if sv <= max(floor * float(values[0]), 1e-9):
            new[i] = clean[i] + math.sqrt(1 - eta**2) * s * (old[i] - clean[i]) / t + fresh
            continue
        given = (u[:, i] @ y) / sv
        if s < sigma_y / sv:
            e = (given - clean[i]) / (sigma_y / sv)
            new[i] = clean[i] + math.sqrt(1 - eta**2) * s * e + fresh
        else:
            width = math.sqrt(s**2 - (eta_b * sigma_y / sv) ** 2)
            new[i] = (1 - eta_b) * clean[i] + eta_b * given + width * noise[i]
    return vt.T @ new


@pytest.mark.parametrize("operator", SOLVED)
@pytest.mark.parametrize(
    "noise, eta, eta_b", [(0.0, 0.85, 1.0), (0.1, 0.85, 1.0), (0.1, 0.4, 0.7)]
)
def test_ddrm_is_the_papers_rules_in_every_direction(operator, noise, eta, eta_b):
    y, problem, _ = measured(operator, noise)
    a = operator_matrix(problem, SHAPE, y).expand(len(y), -1, -1)
    data, z = y.flatten(1), draws(len(y))
    floor = 0.0 if noise else 3e-2

    def renewed(x, x0, t, s, eta, eta_b):
        noises = next(z).flatten(1)
        return torch.stack([
            by_direction(*row, noise, xi, ci, t, s, zi, eta, eta_b, floor)
            for row, xi, ci, zi in zip(zip(a, data, strict=True), x, x0, noises, strict=True)
        ])  # fmt: skip

    levels = karras(4, 2.0, 0.1)
    grey = torch.full_like(data[:, :1], 0.5).expand(-1, 36)
    x, expected = renewed(grey, grey, 1.0, levels[0], 1.0, 1.0), []
    for t, s in zip(levels, [*levels[1:], 0.0], strict=True):
        x0 = PRIOR(x.reshape(-1, *SHAPE), t).flatten(1)
        x = renewed(x, x0, t, s, eta, eta_b)
        expected.append(x.reshape(-1, *SHAPE))
    options = {"steps": 4, "sigma_max": 2.0, "sigma_min": 0.1, "eta": eta, "eta_b": eta_b}
    options["grid"] = "karras"
    found = path(y, problem, "ddrm", **options)
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("operator", SOLVED[:4])
def test_ddrm_without_noise_ends_on_the_measurements(operator):
    y, problem, _ = measured(operator, 0.0)
    x = solve(y, problem, PRIOR, "ddrm").mean
    torch.testing.assert_close(problem.A(x), y, rtol=0, atol=1e-12)
    single = solve(y.float(), problem, PRIOR, "ddrm").mean
    torch.testing.assert_close(problem.A(single), y.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("operator", EVEN)
@pytest.mark.parametrize("noise, s", [(0.0, 0.3), (0.1, 0.5), (0.1, 0.03)])
def test_ddrm_meets_ddnm(operator, noise, s):
    """Without noise the step is the same; with it, in what y tells of, but for the sign of z."""
    y, problem, _ = measured(operator, noise)
    x0, x, z = (PRIOR.sample(2, seed=k).double() for k in (4, 5, 6))
    spectrum, top = problem.operator.svd(x), torch.linalg.matrix_norm(
        operator_matrix(problem, SHAPE, y), 2
    ).expand(2)  # fmt: skip
    mended, fresh = ddnm_correction(problem, x0, y, z, s, top)
    given = (spectrum, spectrum.measured(y), noise, x, x0, 0.7, s)
    if noise == 0:
        torch.testing.assert_close(ddrm_step(*given, z, 1.0, 1.0), mended + fresh)
    else:
        ddrm = ddrm_step(*given, -z, 0.0, 1.0)
        torch.testing.assert_close(problem.A(ddrm), problem.A(mended + fresh))


def test_ddrm_levels_are_those_of_its_grid():
    y, problem, truth = measured("sr:average,factor=2", 0.1)

    def levels(**options):
        return [at["sigma"] for at in solve(y, problem, PRIOR, "ddrm", **options).trace]

    assert levels() == pytest.approx([1 - 0.99 * k / 19 for k in range(20)])
    assert levels(init=truth)[0] == pytest.approx(0.3)
    span = {"sigma_max": 2.0, "sigma_min": 0.1}
    assert levels(grid="karras", steps=5, **span) == pytest.approx(karras(5, 2.0, 0.1))
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    released = (((1 - abar) / abar).sqrt() / 2)[::50].flip(0).tolist()
    assert levels(preset="paper") == pytest.approx(released)
    few = [level for level in released if level <= 0.3]
    assert levels(preset="paper", init=truth) == pytest.approx(few)


@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_ddrm_spread_is_that_of_its_rules(noise):
    """White prior and a mask: pixels are independent, and the rules are recursions of numbers."""
    y, problem, _ = measured("inpaint:random,keep=0.5", noise, n=1, prior=WHITE)
    solver = Ddrm()
    levels = torch.linspace(solver.sigma_max, solver.sigma_min, 20).tolist()
    keep = math.sqrt(1 - solver.eta**2)
    seen, hidden = levels[0] ** 2 - noise**2, levels[0] ** 2  # variances given y
    for t, s in zip(levels, [*levels[1:], 0.0], strict=True):
        gain = 0.04 / (0.04 + t**2)  # x0 - 1/2 = gain (x - 1/2)
        hidden = (gain + keep * s * (1 - gain) / t) ** 2 * hidden + (solver.eta * s) ** 2
        follow = (gain * (1 - keep * s / noise)) ** 2 * seen + (solver.eta * s) ** 2
        seen = s**2 - noise**2 if s >= noise else follow
    x = solve(y, problem, WHITE, "ddrm", samples=800, batch=800).samples[:, 0]
    shown = (problem.mask[0] > 0).flatten()
    std = x.flatten(1).var(0)
    assert float(std[shown].mean()) == pytest.approx(seen, rel=0.06)
    assert float(std[~shown].mean()) == pytest.approx(hidden, rel=0.06)


# -- tmpd ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", [*SOLVED, "blur:motion,length=3"])
@pytest.mark.parametrize("level", [0.03, 0.5])
def test_projected_denoiser_is_the_papers_formula(operator, level):
    y, problem, _ = measured(operator, 0.1)
    x = PRIOR.sample(2, seed=5).double()
    a = operator_matrix(problem, SHAPE, y)
    eye, power = torch.eye(36).double(), PRIOR.covariance
    v = level**2 * power @ torch.linalg.inv(power + level**2 * eye)  # of x given x_t
    x0 = PRIOR(x, level).flatten(1)
    sums = (a @ v @ a.mT).sum(-1)
    expected = x0 + rows(v @ a.mT, (y.flatten(1) - rows(a, x0)) / (0.01 + sums))
    given = projected_denoiser(problem, PRIOR, x, y, level, 0.1)
    torch.testing.assert_close(given.flatten(1), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("operator", EVEN[:1] + EVEN[2:])
def test_tmpd_is_mmps_where_pixels_are_independent(operator):
    y, problem, _ = measured(operator, 0.1, prior=WHITE)
    x = WHITE.sample(2, seed=5).double()
    given = projected_denoiser(problem, WHITE, x, y, 0.3, 0.1)
    exact = conditional_denoiser(problem, WHITE, x, y, 0.3, 36, 1e-12)
    torch.testing.assert_close(given, exact, rtol=0, atol=1e-9)


def test_tmpd_samples_the_posterior_where_pixels_are_independent():
    y, problem, _ = measured("inpaint:random,keep=0.5", 0.1, n=1, prior=WHITE)
    exact = WHITE.posterior(y, problem)
    mean = Tmpd().sample(y, problem, CountingDenoiser(WHITE), Still(0, [0]))
    assert (mean - exact.mean).norm() < 0.02 * exact.std.norm()
    x = solve(y, problem, WHITE, "tmpd", samples=400, batch=400).samples[:, 0]
    shown = problem.mask > 0
    for part in (shown, ~shown):
        ratio = (x.var(0)[part[0]].mean() / exact.std[part].square().mean()).sqrt()
        assert float(ratio) == pytest.approx(1, abs=0.05)


def test_tmpd_holds_out_against_row_sums_below_zero():
    """A Jacobian of -1: any correction would lead away from y, and none is made."""
    y, problem, _ = measured("identity", 0.1)
    x = PRIOR.sample(2, seed=5).double()
    given = projected_denoiser(problem, lambda x, sigma: 1 - x, x, y, 0.3, 0.1)
    torch.testing.assert_close(given, 1 - x)


def test_tmpd_needs_a_gradient():
    y, problem, _ = measured("identity", 0.1)
    with pytest.raises(InputError, match="tmpd needs a prior.*use red-diff or daps"):
        solve(y, problem, lambda x, sigma: PRIOR(x.detach(), sigma), "tmpd", steps=2)


# -- hrdis ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["inpaint:random,keep=0.5", "sr:average,factor=2"])
@pytest.mark.parametrize("beta, weight", [(0.2, "linear"), (1.0, "const"), (0.0, "sqrt")])
def test_hrdis_is_the_released_algorithm_in_vp_form(operator, beta, weight):
    """In [-1, 1], variance-preserving, with torch's Adam and the loss differentiated for us."""
    y, problem, _ = measured(operator, 0.05)
    z, path_expected = draws(len(y)), []
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    y_u = 2 * y - problem.A(torch.ones(2, *SHAPE).double())
    u = problem.A_dagger(y_u).clone().requires_grad_()
    adam = torch.optim.Adam([u], lr=0.3, betas=(0.9, 0.99), eps=1e-8)
    before = None
    for at in reversed(range(0, 1000, 250)):
        a, s = float(abar[at].sqrt()), float((1 - abar[at]).sqrt())
        e = next(z)
        if before is not None:
            e = math.sqrt(1 - beta) * before + math.sqrt(beta) * e
        u_t = (a * u + s * e).detach()
        denoised = 2 * PRIOR((u_t / a + 1) / 2, s / a / 2) - 1
        guess = (u_t - a * denoised) / s
        path_expected.append((u.detach() + 1) / 2)
        if before is not None:
            snr = {"linear": s / a, "const": 1.0, "sqrt": math.sqrt(s / a)}[weight]
            loss = sum(
                0.8 * (yi - ai).square().mean() / 2 + 0.4 * snr * ((gi - ei) * ui).mean()
                for yi, ai, gi, ei, ui in zip(y_u, problem.A(u), guess, e, u, strict=True)
            )
            adam.zero_grad()
            loss.backward()
            adam.step()
        before = guess
    options = {"lr": 0.3, "lam": 0.4, "obs_weight": 0.8, "beta": beta, "weight": weight}
    found = path(y, problem, "hrdis", steps=4, **options)
    torch.testing.assert_close(found, torch.stack(path_expected), rtol=0, atol=1e-9)


def test_hrdis_defaults_are_the_released_ones():
    solver = Hrdis()
    given = (solver.steps, solver.beta, solver.lam, solver.lr, solver.obs_weight, solver.weight)
    assert given == (100, 0.2, 0.25, 0.1, 1.0, "linear")


# -- all -----------------------------------------------------------------------------------------


def test_accuracy_against_an_exact_posterior():
    """Mean error, spread where y tells and where not: 0.12 1.03 1.04, 0.34 0.70 0.93 and
    0.21 0.21 1.00 in this order; none of them claims to sample the posterior."""
    case = ("gaussian", "inpaint:random,keep=0.5", 0.05)
    tmpd, ddrm, hrdis = certify(
        {name: {} for name in ("tmpd", "ddrm", "hrdis")}, draws=32, images=8, problems=[case]
    )
    assert tmpd.mean_error < 0.25 and ddrm.mean_error < 0.45 and hrdis.mean_error < 0.35
    for row, observed, unobserved in ((tmpd, 1.03, 1.04), (ddrm, 0.70, 0.93), (hrdis, 0.21, 1.00)):
        assert row.spread_observed == pytest.approx(observed, abs=0.1)
        assert row.spread_unobserved == pytest.approx(unobserved, abs=0.1)


@pytest.mark.parametrize("method", QUICK)
@pytest.mark.parametrize("channels, dtype", [(1, torch.float64), (3, torch.float32)])
def test_results_do_not_depend_on_the_batch(method, channels, dtype):
    shape = (channels, 4, 6)
    prior = GaussianPrior(torch.full(shape, 0.5), torch.full(shape, 0.04))
    for operator in (EVEN[0], "blur:gaussian,sigma=0.5"):
        y, problem, _ = measured(operator, 0.1, n=3, prior=prior, dtype=dtype)
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
    y, problem, truth = measured("sr:average,factor=2", 0.0)
    full = path(y, problem, method, init=truth, **QUICK[method])
    stop = lambda at: at["step"] == 2  # noqa: E731
    cut = solve(y, problem, PRIOR, method, seed=3, init=truth, callback=stop, **QUICK[method])
    assert torch.equal(cut.mean, full[1]) and len(full) == 4 and cut.nfe == 2 == len(cut.trace)
    seen = []

    def prior(x, sigma):
        seen.append((x.detach(), sigma))
        return PRIOR(x, sigma)

    solve(y, problem, prior, method, seed=3, init=truth, **QUICK[method])
    x, sigma = seen[0]
    if method != "hrdis":
        assert sigma == pytest.approx(0.3)
    torch.testing.assert_close(x, truth + sigma * next(draws(2)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["ddrm", "hrdis"])
def test_network_runs_without_gradients(method):
    def prior(x, sigma):
        assert not torch.is_grad_enabled() and not x.requires_grad
        return PRIOR(x, sigma)

    for operator in ("sr:average,factor=2", "blur:gaussian,sigma=0.7"):
        y, problem, _ = measured(operator, 0.1)
        solve(y.requires_grad_(), problem, prior, method, **QUICK[method])


@pytest.mark.parametrize("method", QUICK)
def test_hidden_pixels_may_hold_anything(method):
    for operator in (EVEN[0], DENSE[1]):
        y, problem, _ = measured(operator, 0.1)
        holes = torch.where(problem.operator.apply_mask(torch.ones_like(y)) > 0, y, torch.nan)
        clean, dirty = (solve(v, problem, PRIOR, method, **QUICK[method]).mean for v in (y, holes))
        assert torch.equal(clean, dirty)


def test_bad_input_is_named():
    y, problem, _ = measured("identity", 0.1)
    curved = Problem(lambda x: x**2, 0.1)
    for method in ("ddrm", "tmpd"):
        with pytest.raises(InputError, match=f"{method} needs a linear operator.*hrdis"):
            solve(y, curved, PRIOR, method)
    with pytest.raises(InputError, match="give init"):
        solve(y, curved, PRIOR, "hrdis")
    assert solve(y, curved, PRIOR, "hrdis", init=y, steps=2).mean.isfinite().all()
    bad = [("ddrm", "eta", -0.1), ("ddrm", "eta_b", 1.1), ("ddrm", "grid", "x"),
           ("tmpd", "noise_floor", 0.0), ("hrdis", "beta", 2.0),
           ("hrdis", "weight", "x")]  # fmt: skip
    for method, option, value in bad:
        with pytest.raises(InputError, match=f"^{option} "):
            solve(y, problem, PRIOR, method, **{option: value})
    assert {name: METHODS[name].claims for name in QUICK} == dict.fromkeys(QUICK, "heuristic")
