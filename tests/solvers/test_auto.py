"""method="auto": what it chooses, that it keeps to the budget, and that it is that solver."""

import pytest
import torch

from unmurk.errors import InputError
from unmurk.evaluation.exact import GaussianPrior
from unmurk.problem import Problem
from unmurk.solvers import solve
from unmurk.solvers.auto import Auto

PRIOR = GaussianPrior.exponential((1, 8, 8))
MASK = Problem("inpaint:random,keep=0.5", 0.1)
CLIP = Problem("hdr:clip,factor=2", 0.1)


@pytest.mark.parametrize(
    ("problem", "samples", "budget", "method"),
    [
        (MASK, 1, 100, "red-diff"),
        (MASK, 4, 100, "red-diff"),
        (MASK, 4, 310, "snips"),
        (MASK, 4, 600, "snips"),
        (CLIP, 1, 40, "red-diff"),
        (CLIP, 4, 40, "daps"),
    ],
)
def test_it_is_the_solver_it_names_and_keeps_to_the_budget(problem, samples, budget, method):
    y = problem.simulate(PRIOR.sample(2, seed=1), seed=2)
    found = solve(y, problem, PRIOR, "auto", samples=samples, budget=budget)
    assert found.method == method and 0.9 * budget <= found.nfe <= budget
    name, options, restarts = Auto(budget).choose(problem, samples)
    assert restarts == 1
    again = solve(y, problem, PRIOR, name, samples=samples, **options)
    assert torch.equal(found.samples, again.samples)


def test_several_samples_spread_as_the_posterior_does():
    y = MASK.simulate(PRIOR.sample(2, seed=1), seed=2)
    exact = PRIOR.posterior(y, MASK)
    for budget, slack in ((100, 0.15), (600, 0.1)):
        found = solve(y, MASK, PRIOR, "auto", samples=64, budget=budget, batch=128)
        ratio = (found.std.square().sum() / exact.std.square().sum()).sqrt()
        assert abs(float(ratio) - 1) < slack


def test_phase_retrieval_is_restarted_unless_told_otherwise():
    phase = Problem("phase:fourier", 0.1)
    y = phase.simulate(PRIOR.sample(2, seed=1), seed=2)
    options = {"method": "ddiff", "steps": 10}
    found = solve(y, phase, PRIOR, "auto", budget=10)
    assert found.nfe == 2 * 10 + 33  # of two runs, and of the choice between twins
    assert torch.equal(found.samples, solve(y, phase, PRIOR, restarts=2, **options).samples)
    once = solve(y, phase, PRIOR, "auto", budget=10, restarts=1)
    assert once.nfe == 10
    assert torch.equal(once.samples, solve(y, phase, PRIOR, **options).samples)


def test_what_is_wrong_is_said():
    y = MASK.simulate(PRIOR.sample(1, seed=1), seed=2)
    with pytest.raises(InputError, match="budget must be .* from 10 .* got 3"):
        solve(y, MASK, PRIOR, "auto", budget=3)
    with pytest.raises(InputError, match="auto has no option 'steps': it takes budget"):
        solve(y, MASK, PRIOR, "auto", steps=3)
