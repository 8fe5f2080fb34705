"""Results that prior and measurements do not allow are refused, and right ones never are."""

import itertools
import math

import pytest
import torch

from unmurk.certify import default_solvers
from unmurk.checks import far_outside, require_plausible
from unmurk.errors import InputError
from unmurk.exact import GaussianMixture, GaussianPrior
from unmurk.prior import Prior
from unmurk.problem import Problem
from unmurk.solve import METHODS, configure, solve
from unmurk.solve.tmpd import projected

SHAPE = (1, 8, 8)
PRIOR = GaussianPrior.exponential(SHAPE)
BOX = "inpaint:box,size=4"


def measured(operator, noise, prior=PRIOR, n=2):
    problem = Problem(operator, noise).at(range(n), prior.shape)
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
    says(r"prior returns numbers that are not finite", truth * torch.nan, y, problem,
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


@pytest.mark.parametrize("name", default_solvers())
def test_every_solver_is_checked(name, monkeypatch):
    options = dict(default_solvers()[name])
    method = options.pop("method", name)
    _, y, problem = measured(BOX, 0.1)
    cls = type(configure(method, options))
    monkeypatch.setattr(cls, "run", lambda self, y, *rest: torch.full((len(y), *SHAPE), 99.0))
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
    after = (
        problem.residual(projected(problem, denoise, x, y, 0.1, 1e-3), y).flatten(1).norm(dim=1)
    )
    assert (after <= before * (1 + 1e-6)).all()


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
    few = {"pnp-dm": {"turns": 3}, "dps": {"steps": 10}, "hrdis": {"steps": 10}}
    found = solve(y.double(), problem, PRIOR, method, **few.get(method, {"steps": 3})).mean
    assert found.dtype == torch.float64 and found.isfinite().all()
