"""Problems: noise from per-image streams, the likelihood, the prox, and the text form."""

import json
import math

import pytest
import torch

from unmurk.errors import InputError
from unmurk.problem import Problem

FORMS = ["identity", "inpaint:random,keep=0.4", "blur:gaussian,sigma=0.7,pad=circular"]
FORMS += ["blur:gaussian,sigma=0.5", "sr:average,factor=2"]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix(operator, shape):
    n = math.prod(shape)
    return operator.A(torch.eye(n, dtype=torch.float64).reshape(n, *shape)).reshape(n, -1).T


@pytest.mark.parametrize("form", FORMS)
def test_simulated_noise_has_its_size_and_is_white(form):
    problem = Problem(form, 0.2)
    x = torch.rand(40, 1, 32, 32, generator=torch.manual_seed(0))
    bound = problem.bind(range(40), x.shape[1:])
    y = problem.simulate(x)
    noise = bound.residual(x, y)
    m = bound.measurements(y).sum()
    assert abs(noise.square().sum() / m - 0.04) < 5 * 0.04 * (2 / m) ** 0.5
    assert abs(noise.sum() / m) < 5 * 0.2 / m**0.5
    assert abs((noise[1:] * noise[:-1]).sum() / m) < 5 * 0.04 / m**0.5
    assert abs((noise[..., 1:] * noise[..., :-1]).sum() / m) < 5 * 0.04 / m**0.5
    if bound.mask is not None:
        assert y[(bound.mask == 0).expand_as(y)].abs().max() == 0


def test_masks_and_noise_of_one_seed_are_independent():
    problem = Problem("inpaint:random,keep=0.5,seed=0", 1.0)
    y = problem.simulate(torch.zeros(100, 1, 16, 16), seed=0)
    other = Problem("identity", 1.0).simulate(torch.zeros(100, 1, 16, 16), seed=0)
    mask = problem.bind(range(100), (1, 16, 16)).mask
    assert torch.equal(y, mask * other)
    assert abs(((mask - 0.5) * other).mean()) < 5 * 0.5 / other.numel() ** 0.5


@pytest.mark.parametrize("form", FORMS)
def test_simulation_does_not_depend_on_the_batch(form):
    problem, x = Problem(form, 0.1), torch.rand(5, 3, 8, 6, generator=torch.manual_seed(0))
    whole = problem.simulate(x, seed=3)
    parts = [problem.simulate(x[a:b], 3, range(a, b)) for a, b in ((0, 1), (1, 5))]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)
    bound = problem.bind(range(5), (3, 8, 6))
    assert torch.allclose(bound.simulate(x, seed=3), whole, atol=1e-6)
    taken = bound.index_select([4, 2, 2])
    assert taken.index == [4, 2, 2]
    assert torch.allclose(taken.simulate(x[[4, 2, 2]], seed=3), whole[[4, 2, 2]], atol=1e-6)
    assert not torch.allclose(problem.simulate(x, seed=4), whole, atol=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_log_likelihood_is_the_normal_density(form):
    sigma = 0.3
    x = draw(3, 2, 8, 6)
    problem = Problem(form, sigma).bind(range(3), (2, 8, 6))
    y = problem.simulate(x, seed=1)
    normal = torch.distributions.Normal(problem.A(x).double(), sigma)
    seen = torch.ones_like(y) if problem.mask is None else problem.mask.expand_as(y)
    expected = (normal.log_prob(y.double()) * seen).flatten(1).sum(1)
    assert torch.allclose(problem.log_likelihood(x, y).double(), expected, rtol=1e-5)
    assert torch.equal(problem.measurements(y), seen.flatten(1).sum(1))


def test_what_is_painted_into_a_hole_does_not_count():
    problem = Problem("inpaint:box,size=4", 0.1)
    x = draw(2, 1, 8, 8)
    y = problem.simulate(x)
    painted = y.clone()
    painted[..., 2:6, 2:6] = float("nan")
    assert torch.equal(problem.residual(x, painted), problem.residual(x, y))
    assert torch.equal(problem.log_likelihood(x, painted), problem.log_likelihood(x, y))


@pytest.mark.parametrize("form", FORMS)
def test_prox_minimises_its_objective(form):
    shape, sigma = (1, 6, 4), 0.2
    problem = Problem(form, sigma).bind([5, 2, 7], shape)
    z = draw(3, *shape)
    y = problem.simulate(draw(3, *shape, seed=1))
    rho = torch.tensor([0.0, 0.3, 2.0])
    found = problem.prox(z, y, rho)
    assert torch.allclose(found[0], z[0], atol=1e-6)
    for row in (1, 2):
        a, r = matrix(problem.index_select([row]).operator, shape), float(rho[row])
        left = a.T @ a / sigma**2 + torch.eye(a.shape[1]) / r**2
        right = a.T @ y[row].flatten().double() / sigma**2 + z[row].flatten() / r**2
        solved = torch.linalg.solve(left, right).reshape(shape)
        assert torch.allclose(found[row].double(), solved, atol=2e-4)


@pytest.mark.parametrize("form", FORMS)
def test_prox_without_noise_is_the_limit(form):
    shape = (1, 6, 4)
    problem = Problem(form).bind(range(2), shape)
    z, y = draw(2, *shape), problem.simulate(draw(2, *shape, seed=1))
    found = problem.prox(z, y, torch.tensor([0.0, 0.5]))
    assert torch.equal(found[0], z[0])
    assert problem.residual(found, y)[1].abs().max() < 1e-4
    little = Problem(form, 1e-3).bind(range(2), shape).prox(z, y, 0.5)
    assert torch.allclose(found[1], little[1], atol=2e-3)


@pytest.mark.parametrize("form", FORMS)
def test_dict_round_trip(form):
    problem = Problem(form, 0.0123456789)
    again = Problem.from_dict(json.loads(json.dumps(problem.to_dict())))
    assert again == problem and again.spec == problem.spec and hash(again) == hash(problem)
    assert again != Problem(form, 0.1)


class NoiseModel:
    sigma = torch.tensor(0.25)


class Physics:
    noise_model = NoiseModel()

    def A(self, x):
        return 2 * x


def test_noise_of_a_deepinv_object():
    assert Problem(Physics()).sigma == 0.25
    assert Problem(Physics(), 0.1).sigma == 0.1
    assert Problem("identity").sigma == 0


def test_nonlinear_problems_simulate_and_have_a_likelihood():
    problem = Problem(lambda x: x.clamp(0, 1), 0.1)
    x = 2 * draw(2, 1, 4, 4)
    y = problem.simulate(x)
    assert problem.residual(x, y).std() < 0.2
    assert problem.log_likelihood(x, y).shape == (2,)
    assert not problem.bind(range(2), (1, 4, 4)).linear
    with pytest.raises(InputError, match="not linear"):
        problem.prox(x, y, 1.0)


@pytest.mark.parametrize("noise", [-0.1, math.nan, math.inf, "much", [1, 2]])
def test_bad_noise(noise):
    with pytest.raises(InputError, match="noise must be"):
        Problem("identity", noise)


def test_bad_problems():
    x = torch.zeros(2, 1, 4, 4)
    with pytest.raises(InputError, match="no likelihood"):
        Problem("identity").log_likelihood(x, x)
    with pytest.raises(InputError, match="2 images but 3 image numbers"):
        Problem("identity").simulate(x, index=[1, 2, 3])
    with pytest.raises(InputError, match="operator and noise"):
        Problem.from_dict({"operator": "identity"})
    with pytest.raises(InputError, match="not NoneType"):
        Problem(None)
