"""SURE-Score: the risk without the truth, its minimiser, and runs."""

import math

import pytest
import torch

from tests.learners import check_run
from tests.training.test_learn import PROBLEM, SIGMA, GaussianPrior, descend
from unmurk.errors import InputError
from unmurk.problem import Problem
from unmurk.training import learn
from unmurk.training.sure import sure

OPERATORS = ["identity", "inpaint:random,keep=0.6", "sr:average,factor=2", "blur:gaussian,sigma=1"]


@pytest.mark.parametrize("text", OPERATORS)
def test_the_risk_is_the_true_error_in_expectation(text):
    """A curved estimate of 8 x 8 images: SURE and ||A h - A x||^2 agree within 4 standard errors.

    The images are those behind y: y is drawn, so is n, and neither is known to `sure`.
    """
    g = torch.Generator().manual_seed(1)
    n = 4096
    x = torch.rand(n, 1, 8, 8, generator=g, dtype=torch.float64)
    problem = Problem(text, 0.3).bind(range(n), (1, 8, 8))
    clean = problem.A(x)
    noise = torch.randn(clean.shape, generator=g, dtype=torch.float64)
    y = problem.operator.apply_mask(clean + 0.3 * noise)

    def h(y):
        start = problem.A_dagger(y)
        return torch.tanh(1.5 * start) + 0.2 * start.roll(1, -1) * start

    risk, estimate = sure(h, y, problem, g)
    torch.testing.assert_close(estimate, h(y))
    error = (problem.A(estimate) - clean).flatten(1).square().sum(1) / problem.measurements(y)
    gap = risk - error
    assert abs(gap.mean()) < 4 * gap.std() / math.sqrt(n)
    assert gap.std() / math.sqrt(n) < 0.02 * error.mean()  # so the test could fail


def test_its_minimiser_is_the_conditional_mean():
    """From y alone: prior variance 1, that is gain 0.8 at sigma_y, to 2 %."""
    prior = GaussianPrior()
    level = torch.tensor([SIGMA])
    descend(
        lambda x, y, g: sure(lambda y: prior.denoise(y, level), y, PROBLEM, g)[0].mean(),
        [prior],
        steps=600,
    )
    assert abs(prior.variance.item() - 1) < 0.02


@pytest.mark.parametrize("text", ["identity", "sr:average,factor=2"])
def test_it_learns_from_y_alone_and_goes_on_where_it_was(tmp_path, monkeypatch, text):
    """Cut while the prior is learnt (step 4) and while the posterior is (step 8 of 10)."""
    problem = Problem(text, 0.2)
    prior, posterior, y = check_run(tmp_path, monkeypatch, "sure", problem, (4, 8))
    assert torch.isfinite(prior.sample(2, steps=4)).all()
    assert torch.isfinite(posterior.mean(y, problem)).all()


def test_an_operator_that_is_not_linear_is_refused(tmp_path):
    y = torch.rand(4, 1, 8, 8)
    with pytest.raises(InputError, match="sure cannot learn from phase.*: no method can"):
        learn(y, Problem("phase:fourier", 0.1), "sure", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
