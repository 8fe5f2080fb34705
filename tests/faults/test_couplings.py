"""The coupling step of pnp-dm and snips: exact, and never growing, for every linear operator."""

import math

import pytest
import torch

from unmurk.evaluation.exact import GaussianPrior, operator_matrix
from unmurk.operators import Function, as_operator
from unmurk.operators.weighted import Weighted
from unmurk.problem import Problem
from unmurk.rng import PerImageGenerator
from unmurk.solvers import solve
from unmurk.solvers.coupling import (
    CONTRAST,
    EDGE,
    Coupling,
    polynomial,
    root_degree,
    shared_norm,
)

SHAPE = (1, 6, 6)
D = math.prod(SHAPE)
LINEAR = [
    *(
        "identity",
        "inpaint:random,keep=0.5",
        "inpaint:box,size=3",
        "inpaint:freeform,strokes=1,width=2",
    ),
    *("sr:average,factor=2", "sr:bicubic,factor=2"),
    *("blur:gaussian,sigma=1", "blur:gaussian,sigma=1,pad=circular", "blur:uniform,size=3"),
    *("blur:motion,length=4,angle=30", "blur:motion,length=4,angle=30,pad=circular"),
    *("mri:cartesian,channels=1,acceleration=2", "mri:cartesian,channels=1,coils=3"),
    *("ct:parallel,angles=5", "cs:structured,ratio=0.5"),
    "blur:gaussian,sigma=0.7|inpaint:random,keep=0.5",
    Function(lambda x: 3 * x - x.flip(-1)),
    "weighted",
]
NOISES = (1e-3, 0.01, 0.1, 1.0)  # noise 0 is believed to be the first, `noise_floor`


class Unit(PerImageGenerator):
    """Streams whose draw number k is every unit vector in turn, and zero at all other draws."""

    def __init__(self, k, n):
        self.k, self.n, self.draw = k, n, -1

    def randn(self, *shape):
        self.draw += 1
        size = math.prod(shape)
        if self.draw == self.k and size == self.n:
            return torch.eye(self.n, dtype=torch.float64).reshape(-1, *shape)
        return torch.zeros(self.n, *shape, dtype=torch.float64)


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def bound(form):
    """A problem bound to one image, and its matrix."""
    if form == "weighted":
        inner = as_operator("blur:motion,length=4,angle=30").bind([0], SHAPE)
        problem = Problem(Weighted(inner, 0.5 + drawn(5, 1, *SHAPE).abs()), 0.1)
        problem.index = [0]
    else:
        problem = Problem(form, 0.1).bind([0], SHAPE)
    y = problem.A(drawn(2, 1, *SHAPE))
    return problem, y, operator_matrix(problem, SHAPE, y)[0]


def coupled(problem, y, sigma, n):
    return Coupling(
        problem.index_select([0] * n), y.repeat(n, *[1] * (y.ndim - 1)), sigma, drawn(3, n, *SHAPE)
    )


def dense(matrix, y, x, rho, sigma):
    """Mean and covariance of z given x and y, from matrices."""
    norm = torch.linalg.matrix_norm(matrix, 2)
    sigma = max(sigma, rho * norm / CONTRAST)
    tau = min(rho, EDGE * sigma / norm)
    eye = torch.eye(len(matrix), dtype=torch.float64)
    R = sigma**2 * eye - tau**2 * matrix @ matrix.T
    precision = torch.eye(D, dtype=torch.float64) / rho**2
    precision = precision + matrix.T @ torch.linalg.solve(R, matrix)
    data = x.flatten() / rho**2 + matrix.T @ torch.linalg.solve(R, y.flatten())
    covariance = torch.linalg.inv(precision)
    return covariance @ data, covariance


@pytest.mark.parametrize("form", LINEAR, ids=str)
def test_moments_are_those_of_the_dense_formula_and_no_step_grows(form):
    problem, y, matrix = bound(form)
    x = drawn(1, 1, *SHAPE)
    m = y[0].numel()
    for sigma in NOISES:
        for rho in (1.0, 0.03, EDGE * sigma / shared_norm(problem, y)):
            mean, covariance = dense(matrix, y, x, rho, sigma)
            tie = coupled(problem, y, sigma, D)
            zero = torch.zeros(D, *SHAPE, dtype=torch.float64)
            found = tie.mean(x.expand(D, *SHAPE), rho)[0].flatten()
            # conjugate gradients stop at 1e-6 of the residual, power iteration at 1e-3 of ||A||
            near = 1e-8 if tie.spectrum is not None else 2e-3
            assert (found - mean).norm() < near * (1 + mean.norm()), (sigma, rho)
            columns = [tie.noise(Unit(0, D), zero, rho)]
            if tie.spectrum is None:
                columns.append(tie.noise(Unit(2, D), zero, rho))
                other = coupled(problem, y, sigma, m)
                start = torch.zeros(m, *SHAPE, dtype=torch.float64)
                columns.append(other.noise(Unit(1, m), start, rho))
            spread = sum(c.flatten(1).T @ c.flatten(1) for c in columns)
            assert (spread - covariance).abs().max() < near * rho**2, (sigma, rho)
            unit = torch.eye(D, dtype=torch.float64).reshape(D, *SHAPE)
            moved = (tie.mean(unit, rho) - tie.mean(zero, rho)).flatten(1)
            growth = float(torch.linalg.matrix_norm(moved, 2))
            assert growth <= 1 + (1e-10 if tie.spectrum is not None else 1e-4), (sigma, rho)


@pytest.mark.parametrize("form", ["inpaint:box,size=3", "sr:average,factor=2", "identity"])
def test_without_noise_it_is_the_projection_on_what_y_says(form):
    problem, y, _ = bound(form)
    x = drawn(1, 1, *SHAPE)
    exact = x + problem.A_dagger(problem.residual(x, y))
    found = coupled(problem, y, 1e-9, 1).mean(x, 1e-6)  # far above the noise of y
    torch.testing.assert_close(found, exact, rtol=0, atol=3 / CONTRAST**2 * 36)


def test_the_root_is_as_exact_as_proven_and_holds_beyond_the_norm():
    degree, q = root_degree(EDGE**2), EDGE**2
    b = torch.ones(201, 1, 1, 1, dtype=torch.float64)
    for beyond, error in ((1.0, 1e-6), (1.05, 1e-4)):
        s = torch.linspace(0, beyond, 201, dtype=torch.float64)[:, None, None, None]
        top = torch.ones(201)
        found = polynomial(lambda v, s=s: s * v, b, lambda v: (1 - q * v).sqrt(), top, degree)
        assert (found - (1 - q * s).sqrt()).abs().max() < error


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.02, 1.0])
@pytest.mark.parametrize(
    "form", ["blur:gaussian,sigma=1.5", "blur:motion,length=3,angle=30", "ct:parallel,angles=4"]
)
def test_samples_stay_where_the_posterior_is(form, noise):
    prior = GaussianPrior.exponential((1, 8, 8))
    problem = Problem(form, noise).bind([0], prior.shape)
    y = problem.simulate(prior.sample(1, seed=1), seed=2)
    exact = prior.posterior(y, problem)
    for method, options in (("pnp-dm", {"iterations": 25, "steps": 4}), ("snips", {"steps": 60})):
        found = solve(y, problem, prior, method, samples=8, **options).samples
        away = (found[:, 0] - exact.mean).square().mean().sqrt()
        assert away < 0.3, (method, float(away))  # prior deviation 0.2; the mean is in its midst
