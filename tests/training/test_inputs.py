"""Photon noise with hidden pixels and under operators: whitened, the same in `learn` and after."""

from functools import partial

import pytest
import torch

from unmurk.errors import InputError
from unmurk.gaussian import fit
from unmurk.missing import without_missing
from unmurk.noise import Gaussian
from unmurk.problem import Problem
from unmurk.training import Recipe, learn, learner
from unmurk.training.inputs import weighed, with_gaps
from unmurk.training.registry import resolve

PHOTONS = Problem("identity", "poisson-gaussian,gain=0.02,sigma=0.01")
SHAPE = (1, 16, 16)
RECIPE = Recipe(r2r=0.3, e_step=0.5, flow=0.7, buffer=8)
SHORT = {"kimg": 0.008, "batch": 4, "precision": "fp32", "quiet": True, "recipe": RECIPE}


def photons(problem=PHOTONS, hidden=True):
    """Counts of flat images with a bright half, some pixels missing."""
    x = torch.full((8, *SHAPE), 0.2)
    x[..., 8:] = 0.8
    y = problem.simulate(x, seed=3)
    if hidden:
        y[torch.rand(y.shape, generator=torch.Generator().manual_seed(0)) < 0.1] = torch.nan
    return x, y


def test_the_whitened_residual_has_the_level_of_the_problem():
    """chi-square 1 on dark and on bright pixels, within 5 standard errors, none on hidden ones."""
    x, y = photons()
    filled, masked, _ = with_gaps(y, PHOTONS, "mask", resolve("flowdiff", {}))
    white, problem = weighed(filled, masked, None, SHAPE)
    assert isinstance(problem.noise, Gaussian) and problem.sigma == PHOTONS.level
    numbers = list(range(8))
    residual = problem.bind(numbers, SHAPE).residual(x, white.read(numbers)) / problem.sigma
    assert bool((residual[y.isnan()] == 0).all())
    for half in (slice(0, 6), slice(10, 16)):  # away from the edge between them
        values = residual[..., half][~y[..., half].isnan()]
        assert abs(values.square().mean() - 1) < 5 * (2 / len(values)) ** 0.5 + 0.05


@pytest.mark.slow
@pytest.mark.parametrize("text", ["identity", "blur:gaussian,sigma=1"])
def test_the_networks_see_in_restoring_what_they_saw_in_learning(tmp_path, monkeypatch, text):
    monkeypatch.setattr(learner, "fit", partial(fit, rounds=2, values=2**12))
    given = Problem(text, PHOTONS.noise)
    _, y = photons(given, hidden=text == "identity")
    _, posterior = learn(y, given, out=tmp_path / "run", nan="mask", **SHORT)
    filled, masked, _ = with_gaps(y, given, "mask", resolve("flowdiff", {}))
    white, problem = weighed(filled, masked, None, SHAPE)
    learned = posterior.known(white.read([2, 5]), problem.bind([2, 5], SHAPE))
    restored = posterior.known(
        *without_missing(y[[2, 5]], given.bind([2, 5], SHAPE), "mask", SHAPE)
    )
    for one, other in zip(learned, restored, strict=True):
        torch.testing.assert_close(one, other)
    assert learned[1][:, -1].std() > 0.001  # the level differs from pixel to pixel


def test_repeated_photon_captures_with_hidden_pixels_are_refused():
    _, y = photons()
    filled, masked, _ = with_gaps(y, PHOTONS, "mask", resolve("flowdiff", {}))
    with pytest.raises(InputError, match="is not Gaussian: repeated captures"):
        weighed(filled, masked, None, SHAPE, repeats=2)
