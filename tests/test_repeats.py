"""Repeated captures against the posterior of all of them, in closed form."""

import pytest
import torch

from unmurk.cli.maps import scene_of
from unmurk.errors import InputError
from unmurk.io.noise_maps import as_noise_maps, flat_maps
from unmurk.io.scenes import Scenes
from unmurk.missing import with_missing
from unmurk.noise import Gaussian, PoissonGaussian
from unmurk.operators import Weighted, parse
from unmurk.problem import Problem
from unmurk.repeats import averaged, combined, combined_captures, grouped, scenes

SHAPE = (2, 8, 6)
SIGMA = 0.2


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def captures_of(problem, x, repeats, seed=1):
    """Captures (B, N, ...) of scenes x; capture j of scene i has the number i N + j."""
    copies = x.repeat_interleave(repeats, 0)
    return grouped(problem.simulate(copies, seed, range(len(copies))), repeats)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("noise", [Gaussian(0.3), PoissonGaussian(0.01, 0.05, 0.02)])
def test_mean_of_captures_has_the_variance_over_k(noise, k):
    c = torch.linspace(0.02, 1, 7)
    assert torch.allclose(averaged(noise, k).variance(c), noise.variance(c) / k)


def test_mean_of_counts_is_a_count_with_a_smaller_gain():
    """The probabilities of the sum of two Poisson numbers, by convolution."""
    noise = PoissonGaussian(0.1)
    c = torch.tensor(0.7)
    k = torch.arange(40) * 0.1
    one = noise.log_likelihood(c.expand(40), k).exp().double()
    both = torch.stack([(one[: n + 1] * one[: n + 1].flip(0)).sum() for n in range(30)])
    mean = averaged(noise, 2).log_likelihood(c.expand(30), k[:30] / 2).exp().double()
    assert torch.allclose(both, mean, rtol=1e-4)


FORMS = [
    "identity",
    "blur:gaussian,sigma=1",
    "inpaint:random,keep=0.6,seed=1",
    "inpaint:box,size=3",
    "blur:uniform,size=3|inpaint:random,keep=0.6,seed=1",
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("picked", [None, [2], [0, 3]])
def test_likelihood_of_the_combination_is_that_of_all_captures(form, picked):
    """Up to a constant: the difference of log p(y_1, ..., y_k | x) between two images x."""
    problem = Problem(form, SIGMA)
    x, other, seen = (draw(3, *SHAPE, seed=s) for s in (0, 7, 8))
    y = captures_of(problem, seen, 4)
    one, joint = combined(y, problem, [5, 0, 9], SHAPE, picked)
    assert joint.index == [5, 0, 9]
    found = joint.log_likelihood(x, one) - joint.log_likelihood(other, one)
    wanted = 0.0
    for j in picked or range(4):
        bound = problem.bind([i * 4 + j for i in (5, 0, 9)], SHAPE)
        wanted = wanted + bound.log_likelihood(x, y[:, j])
        wanted = wanted - bound.log_likelihood(other, y[:, j])
    assert torch.allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("form", ["identity", "inpaint:random,keep=0.6,seed=1"])
def test_posterior_mean_of_n_captures(form):
    """For a prior N(z, 1) of each pixel the mean is (z + sum y_j / s^2) / (1 + c / s^2), where c
    captures show the pixel."""
    problem = Problem(form, SIGMA)
    z = draw(2, *SHAPE)
    y = captures_of(problem, draw(2, *SHAPE, seed=3), 3)
    mean, joint = combined(y, problem, [0, 1], SHAPE)
    numbers = torch.arange(6).reshape(2, 3)
    shown = [problem.bind(numbers[:, j].tolist(), SHAPE).mask for j in range(3)]
    masks = torch.stack([torch.ones(2, 1, 8, 6) if m is None else m for m in shown], 1).double()
    total = (masks * y).sum(1) / SIGMA**2
    wanted = (z + total) / (1 + masks.sum(1) / SIGMA**2)
    assert torch.allclose(joint.prox(z, mean, 1.0), wanted, atol=1e-6)
    level = torch.as_tensor(joint.deviation(mean)).expand(2, 1, 8, 6)
    counts = masks.sum(1)
    assert torch.allclose(level[counts > 0].double(), SIGMA / counts[counts > 0].sqrt())


def test_equal_masks_are_averaged_and_others_weighted():
    problem = Problem("inpaint:box,size=3", SIGMA)
    y = captures_of(problem, draw(2, *SHAPE), 2)
    mean, joint = combined(y, problem, [0, 1], SHAPE)
    assert torch.equal(mean, y.mean(1)) and joint.sigma == SIGMA / 2**0.5
    assert joint.operator.spec == problem.operator.spec
    missing = with_missing(parse("identity"), {1: torch.tensor([4])})  # in one capture of scene 0
    mean, joint = combined(y, Problem(missing, SIGMA), [0, 1], SHAPE)
    assert isinstance(joint.operator, Weighted) and joint.sigma == SIGMA / 2**0.5
    weights = torch.ones(2, 1, 8, 6)
    weights[0, 0, 0, 4] = 0.5**0.5
    assert torch.allclose(joint.operator.weights.float(), weights)
    assert torch.allclose(joint.A_dagger(mean)[0, :, 0, 4], y[0, 0, :, 0, 4])


def test_captures_that_are_bound_already_give_the_same():
    problem = Problem("inpaint:random,keep=0.6,seed=1", SIGMA)
    y = captures_of(problem, draw(2, *SHAPE), 3)
    one = combined(y, problem, [4, 2], SHAPE)
    numbers = [12, 13, 14, 6, 7, 8]
    other = combined_captures(y, problem.bind(numbers, SHAPE), [4, 2], SHAPE)
    assert torch.equal(one[0], other[0])
    x = draw(2, *SHAPE, seed=5)
    assert torch.equal(one[1].A(x), other[1].A(x)) and one[1].noise == other[1].noise


@pytest.mark.parametrize("form", ["identity", "blur:uniform,size=3|inpaint:random,keep=0.6"])
@pytest.mark.parametrize("relative", [False, True])
def test_captures_under_noise_maps_and_flat_fields(form, relative):
    """Up to a constant: log p(y_1, ..., y_k | x) with a deviation for every pixel of every
    capture, or that of the problem over the sensitivity of the pixel."""
    problem, numbers = Problem(form, SIGMA), [1, 0]
    x, other, seen = (draw(2, *SHAPE, seed=s) for s in (0, 7, 8))
    sigma = 0.05 + 0.3 * draw(6, 1, 8, 6, seed=9).float()
    sigma[1, 0, 2, 3], sigma[3:, 0, 5, 5] = 0, 0  # no measurement in one capture, and in all
    maps = as_noise_maps(sigma)
    if relative:
        maps = flat_maps(sigma[:1, 0] + 0.5)
        sigma = SIGMA / (sigma[:1] + 0.5).expand(6, -1, -1, -1)
    y = captures_of(problem, seen, 3)[[1, 0]] + draw(2, 3, *SHAPE, seed=2) / 10
    given = problem if relative else Problem(form, maps.level)
    one, joint = scene_of(maps, y, given, numbers, SHAPE, "refuse")
    assert joint.index == numbers
    found = joint.log_likelihood(x, one) - joint.log_likelihood(other, one)
    wanted = torch.zeros(2, dtype=torch.float64)
    for j in range(3):
        which = [i * 3 + j for i in numbers]
        bound = problem.bind(which, SHAPE)
        deviation = sigma[which].double()
        known = (deviation > 0).expand(-1, SHAPE[0], -1, -1) * bound.operator.apply_mask(
            torch.ones_like(y[:, j])
        )
        for image, sign in ((x, -0.5), (other, 0.5)):
            off = known * (y[:, j] - bound.A(image)) / deviation.clamp_min(1e-9)
            wanted = wanted + sign * off.square().flatten(1).sum(1)
    assert torch.allclose(found, wanted, rtol=1e-5)


def test_one_capture_is_itself():
    problem = Problem("inpaint:random,keep=0.6,seed=1", SIGMA)
    y = captures_of(problem, draw(2, *SHAPE), 1)
    mean, joint = combined(y, problem, [4, 2], SHAPE)
    assert torch.equal(mean, y[:, 0])
    assert joint.operator == problem.bind([4, 2], SHAPE).operator and joint.sigma == SIGMA


def test_scenes_are_read_with_all_their_captures():
    y = draw(6, *SHAPE).float()
    found = Scenes(y, 3)
    assert found.shape == (2, 3, *SHAPE)
    assert torch.equal(found[torch.tensor([1, 0])], y.reshape(2, 3, *SHAPE).flip(0))
    assert torch.equal(found[:1], y[None, :3])


def test_what_is_refused():
    for captures, repeats in ((5, 2), (0, 2), (4, 0)):
        with pytest.raises(InputError, match="no whole number of scenes"):
            scenes(captures, repeats)
    y = captures_of(Problem("identity", SIGMA), draw(2, *SHAPE), 2)
    photons = Problem("inpaint:random,keep=0.6", "poisson,gain=0.01")
    with pytest.raises(InputError, match="need Gaussian noise"):
        combined(y, photons, [0, 1], SHAPE)
    other = Problem("inpaint:random,keep=0.6|blur:uniform,size=3", SIGMA)
    with pytest.raises(InputError, match="not only in the pixels that they hide last"):
        combined(y, other, [0, 1], SHAPE)
