"""Results that prior and measurements do not allow are refused, and right ones never are."""

import itertools
import math
import shutil

import numpy as np
import pytest
import torch

from unmurk.checks import far_outside, require_plausible, require_plausible_flow
from unmurk.cli import main as cli
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.evaluation.certify import default_solvers
from unmurk.evaluation.exact import GaussianMixture, GaussianPrior
from unmurk.flows.posterior import Posterior
from unmurk.io.packaged import ASSETS
from unmurk.problem import Problem
from unmurk.solvers import METHODS, configure, solve
from unmurk.solvers.tmpd import projected_denoiser
from unmurk.training import METHODS as LEARNERS
from unmurk.training import Settings, learn
from unmurk.whitening import whiten

SHAPE = (1, 8, 8)
PRIOR = GaussianPrior.exponential(SHAPE)
BOX = "inpaint:box,size=4"


def measured(operator, noise, prior=PRIOR, n=2):
    problem = Problem(operator, noise).bind(range(n), prior.shape)
    truth = prior.sample(n, seed=1)
    return truth, problem.simulate(truth, seed=2), problem


class Laplace:
    """Independent pixels with tails exp(-|x - 1/2| / b); D by quadrature."""

    shape, sigma_max, b = SHAPE, math.inf, 0.3

    def sample(self, n, seed=0):
        u = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed)) - 0.5
        return 0.5 - self.b * u.sign() * torch.log1p(-2 * u.abs())

    def denoise(self, x, sigma):
        grid = torch.linspace(-12, 13, 5001)
        logit = -(grid - 0.5).abs() / self.b - (x.float()[..., None] - grid) ** 2 / 2 / sigma**2
        return (logit.softmax(-1) * grid).sum(-1).to(x)


WIDE = GaussianPrior.exponential(SHAPE, std=40.0, mean=3.0)
RIGHT = [
    *itertools.product([PRIOR], ["identity", BOX, "blur:gaussian,sigma=1"], [0.0, 3.0]),
    *itertools.product([WIDE], ["identity", BOX, "sr:average,factor=2"], [0.0, 0.1, 10.0]),
    (WIDE, "mri:cartesian,channels=1,acceleration=2", 0.1),
    (WIDE, "ct:parallel,angles=5", 0.1),
    (Laplace(), BOX, 0.05),
    (Laplace(), "identity", 3.0),
    (GaussianMixture.example(SHAPE), BOX, 0.005),
]


@pytest.mark.parametrize("prior, operator, noise", RIGHT)
def test_truths_pass_whatever_the_prior(prior, operator, noise):
    """A truth stands for a draw of the posterior: over all y it has the same law."""
    truth, y, problem = measured(operator, noise, prior, n=200)
    assert not far_outside(truth, y, problem, prior.denoise).any()


def test_bright_pixels_that_y_shows_pass_and_others_do_not():
    truth, y, problem = measured(BOX, 0.01)
    x = truth.clone()
    x[0, 0, 0, 0] = y[0, 0, 0, 0] = 40.0  # a hot pixel, in y too
    x[1, 0, 4, 4] = 40.0  # in the hole: nothing asks for it
    assert far_outside(x, y, problem, PRIOR.denoise).tolist() == [False, True]


def test_causes_that_are_named_are_true():
    truth, y, problem = measured(BOX, 0.01)

    def says(message, x, y=y, problem=problem, denoise=PRIOR.denoise):
        with pytest.raises(InputError, match=message) as caught:
            require_plausible(x, y, problem, denoise, "some", sigma_max=5.0)
        assert "\n" not in str(caught.value)

    hidden = truth.clone()
    hidden[1, 0, 4, 4] = -62.0
    says(r"some diverged on 1 of 2 images \(numbers up to 62\): it fits y, but .*box", hidden)
    says(r"steps are too long for operator 'inpaint:box,size=4' and noise 0.01", truth - 2e5)
    says(r"steps are too long", torch.where(truth > 0.5, torch.inf, truth))
    says(r"check the scale of y", truth * 1e5, 255 * y)
    says(r"prior returns values that are not finite", truth * torch.nan, y, problem,
         lambda x, sigma: x / 0)  # fmt: skip
    require_plausible(truth, y, problem, PRIOR.denoise, "some", sigma_max=5.0)
    require_plausible(hidden, y, problem, PRIOR.denoise, "some", finished=False)


def test_measurements_that_are_not_finite_are_named():
    _, y, problem = measured("identity", 0.1)
    y[1, 0, 2, 3] = torch.nan
    with pytest.raises(InputError, match="measurement 1 has values that are not finite"):
        solve(y, problem, PRIOR)
    hidden = Problem("inpaint:box,size=4,top=1,left=2", 0.1)
    assert solve(y, hidden, PRIOR, steps=4).mean.isfinite().all()


@pytest.mark.parametrize("operator", ["identity", BOX, "blur:gaussian,sigma=1", "quantise"])
@pytest.mark.parametrize("known", [True, False])
def test_means_of_flows_pass_or_are_refused(operator, known):
    noise = "poisson-gaussian,gain=0.01,sigma=0.02" if operator == "identity" else 0.05
    truth, y, problem = measured(operator, noise, n=3)
    asked = []

    def prior():
        asked.append(1)
        return (PRIOR.denoise, PRIOR.sigma_max) if known else (None, 0.0)

    def refused(message, mean=truth, std=0 * truth, y=y):
        with pytest.raises(InputError, match=message) as caught:
            require_plausible_flow(mean, std, y, problem, prior, "runs/a")
        assert "\n" not in str(caught.value)

    mean = 0.5 + 0.9 * (truth - 0.5)
    require_plausible_flow(mean, torch.full_like(mean, 0.1), y, problem, prior, "runs/a")
    assert not asked  # all is in the range: no prior is loaded
    wrong = mean.clone()
    wrong[1, 0, 4, 4] = -62.0
    refused(rf"flow of 'runs/a' fails on 1 of 3 images \(numbers up to 62\): it was not learned"
            rf" for operator '{problem.operator.spec}.* use `unmurk solve`", wrong)  # fmt: skip
    refused("fails on 2 of 3 images: it was not", torch.where(truth == truth[0], mean, torch.nan))
    refused("fails on 3 of 3", std=torch.inf * torch.ones_like(truth))
    if operator != "quantise":
        refused("check the scale of y", 1e5 * (truth + 1), y=255 * y)


def test_messages_say_the_noise_that_was_given():
    """Not what a solver makes of it."""
    noise = "poisson-gaussian,gain=0.01,sigma=0.02"
    truth, y, problem = measured(BOX, noise)
    white = whiten(y, problem)
    wrong = truth - 2e5
    with pytest.raises(InputError, match="operator 'inpaint:box,size=4.*' and noise 0.07"):
        require_plausible(wrong, *white, PRIOR.denoise, "some")
    with pytest.raises(InputError, match=f"operator 'inpaint:box,size=4.*' and noise {noise}"):
        require_plausible_flow(wrong, 0 * wrong, y, problem, lambda: (None, 0.0), "runs/a")


def test_a_wide_prior_lets_a_flow_be_wide():
    truth, y, problem = measured(BOX, 0.1, WIDE, n=20)
    near = WIDE.posterior(y, problem).mean
    require_plausible_flow(near, 0 * near, y, problem, lambda: (WIDE.denoise, 100.0), "runs/a")


@pytest.mark.parametrize("prior", [True, False])
@pytest.mark.parametrize("value", [99.0, math.nan])
def test_the_command_refuses_what_its_flow_lost(prior, value, tmp_path, monkeypatch, capsys):
    run, out, y = tmp_path / "run", tmp_path / "out.npy", tmp_path / "y.npy"
    assets = ASSETS / "digits-model"
    shutil.copytree(assets / "posterior", run / "posterior")
    if prior:
        shutil.copytree(assets / "prior", run / "prior")
    np.save(y, np.full((3, 28, 28), 0.5, np.float32))
    argv = ["restore", str(y), "--prior", str(run), "--operator", "identity", "--noise", "0.3"]
    argv += ["--samples", "2", "--out", str(out)]
    right = Posterior.mean_std

    def lost(self, *args, **more):
        mean, std = right(self, *args, **more)
        mean[1, 0, 3, 4] = value
        return mean, std

    monkeypatch.setattr(Posterior, "mean_std", lost)
    assert cli.main(argv) == 2 and not out.exists()
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "fails on 1 of 3 images" in said
    assert "(numbers up to 99)" in said or value != 99.0
    monkeypatch.setattr(Posterior, "mean_std", right)
    assert cli.main(argv) == 0 and np.isfinite(np.load(out)).all()


# -- draws that learning keeps --------------------------------------------------------------------

MASKS = Problem("inpaint:random,keep=0.6", 0.1)


def learner(method, problem, **options):
    y = problem.simulate(PRIOR.sample(8, seed=1).float(), seed=2)
    return LEARNERS[method](**options).build(y, problem, SHAPE)


def lost_by(value):
    def solver(y, problem, prior, streams):
        x = torch.full((len(y), *SHAPE), 0.5)
        x[1:3, 0, 0, 0] = value
        return x

    return solver


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 70_000.0])
def test_draws_that_are_not_finite_are_not_kept(value):
    """70,000 is above the numbers of float16: the buffer would hold an infinity."""
    cpu = torch.device("cpu")
    solver = lost_by(value)
    for made, draw in [
        (learner("flowdiff", MASKS, solver=solver), lambda it: it.draw_posterior(4, cpu)),
        (learner("em", MASKS, solver=solver), lambda it: it.draw_posterior(4, 1, cpu)),
    ]:
        before = made.replay.tensors["images"].clone()
        with pytest.raises(InputError) as caught:
            draw(made)
        assert "2 of 4 images drawn to learn from" in str(caught.value)
        assert "the solver solver diverged on operator 'inpaint:random,keep=0.6" in str(
            caught.value
        )
        assert "noise 0.1" in str(caught.value) and "\n" not in str(caught.value)
        assert made.replay.drawn == 0 and torch.equal(made.replay.tensors["images"], before)
        made.solver = lost_by(0.25)
        draw(made)
        assert made.replay.drawn == 4


DRAWN = [(name, Problem("identity", 0.1)) for name in ("em", "ambient", "sure")]
DRAWN += [(name, MASKS) for name in ("flowdiff", "em", "ambient")]


@pytest.mark.parametrize("method, problem", DRAWN)
@pytest.mark.parametrize("value", [math.nan, 1e6])
def test_networks_that_have_diverged_are_named(method, problem, value):
    cpu = torch.device("cpu")
    options = {"e_step": "conditional"} if method == "em" and problem is MASKS else {}
    made = learner(method, problem, **options)
    with torch.no_grad():
        for average in made.ema.values():
            for weight in average.parameters():
                weight.fill_(value)
    draw = {
        "flowdiff": lambda: made.draw_posterior(4, cpu),
        "em": lambda: made.draw_posterior(4, 1, cpu),
    }.get(method, lambda: made.draw_images(4, cpu))
    cause = "weights are not finite" if math.isnan(value) else "learning has diverged, or y is far"
    with pytest.raises(InputError, match=f"drawn to learn from .*{cause}.*Settings.rate"):
        draw()
    assert all(t.float().isfinite().all() and not t.any() for t in made.buffers.values())


def test_a_run_ends_in_one_line(tmp_path):
    y = MASKS.simulate(PRIOR.sample(16, seed=1).float(), seed=2)
    settings = Settings(kimg=0.1, batch=8, precision="fp32")
    with pytest.raises(InputError, match="the solver solver diverged"):
        learn(
            y, MASKS, out=tmp_path / "run", settings=settings, quiet=True, solver=lost_by(math.inf)
        )


@pytest.mark.parametrize("name", default_solvers())
def test_every_solver_is_checked(name, monkeypatch):
    options = dict(default_solvers()[name])
    method = options.pop("method", name)
    _, y, problem = measured(BOX, 0.1)
    cls = type(configure(method, options))

    def wrong(self, state):
        state.x = state.denoised = torch.full((len(state.y), *SHAPE), 99.0)

    monkeypatch.setattr(cls, "step", wrong)
    with pytest.raises(InputError, match=f"{method} diverged on 2 of 2 images"):
        solve(y, problem, PRIOR, method, **options)
    assert len(METHODS) <= len(default_solvers())


def test_tmpd_never_fits_y_worse_than_before():
    """Where row sums of a Jacobian that is no covariance are far too small."""
    turned = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).double()
    turned = turned - turned.mean(1, keepdim=True)  # rows that sum to 0

    def denoise(x, sigma):
        return 0.5 + ((x - 0.5).flatten(1) @ turned.T).reshape(x.shape)

    truth, y, problem = measured(BOX, 0.0)
    x, y = truth.double() + 0.3, y.double()
    before = problem.residual(denoise(x, 0.1), y).flatten(1).norm(dim=1)
    after = problem.residual(projected_denoiser(problem, denoise, x, y, 0.1, 1e-3), y)
    after = after.flatten(1).norm(dim=1)
    assert (after <= before * (1 + 1e-6)).all()


def matrix(scale):
    """20 x 64 random numbers: singular values from 4 to 12 times the scale."""
    return scale * torch.randn(20, 64, generator=torch.Generator().manual_seed(0))


def test_snips_knows_no_unit_of_measurements():
    """(k A, k y, k sigma) is the same problem."""
    truth, y, problem = measured(matrix(1.0), 0.05)
    one = solve(y, problem, PRIOR, "snips", steps=60).mean
    for k in (0.25, 8.0):
        large = Problem(matrix(k), 0.05 * k).bind(range(2), SHAPE)
        found = solve(k * y, large, PRIOR, "snips", steps=60).mean
        torch.testing.assert_close(found, one, rtol=0, atol=2e-3)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_snips_draws_from_the_posterior_whatever_the_singular_values(scale):
    truth, y, problem = measured(matrix(scale), 0.05, n=2)
    exact = PRIOR.posterior(y, problem)
    found = solve(y, problem, PRIOR, "snips", samples=60).samples.double().flatten(2)
    traced = exact.covariance.diagonal(dim1=-2, dim2=-1).sum(-1).expand(2).sum()
    spread = (found.var(0).sum() / traced).sqrt()
    off = ((found.mean(0) - exact.mean.double().flatten(1)).square().sum() / traced).sqrt()
    assert abs(spread - 1) < 0.1 and off < 1.5 / 60**0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, operator, noise, steps",
    [
        ("tmpd", "inpaint:box,size=10", 0.0, 100),
        ("snips", "blur:gaussian,sigma=1.5", 0.01, 60),
    ],
)
def test_learnt_priors_no_longer_diverge(method, operator, noise, steps):
    prior = Prior.load("digits")
    truth = torch.zeros(1, *prior.shape)
    truth[..., 6:22, 12:16] = 1.0  # a one
    problem = Problem(operator, noise)
    y = problem.simulate(truth, seed=1)
    found = solve(y, problem, prior, method, steps=steps).mean
    assert found.min() > -0.5 and found.max() < 1.5


@pytest.mark.parametrize("method", METHODS)
def test_double_precision_goes_through(method):
    _, y, problem = measured("blur:motion,length=3,angle=30", 0.1)
    if method == "ddrm":
        _, y, problem = measured("sr:average,factor=2", 0.1)
    few = {"pnp-dm": {"iterations": 3}, "dps": {"steps": 10}, "hrdis": {"steps": 10}}
    found = solve(y.double(), problem, PRIOR, method, **few.get(method, {"steps": 3})).mean
    assert found.dtype == torch.float64 and found.isfinite().all()
