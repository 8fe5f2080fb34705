"""Figures taken without clean images: their values in closed form, and what they cost."""

import json
import math

import pytest
import torch
from torch import nn

from tests.training.test_learn import RECIPE, TINY, blobs
from unmurk.diffusion.prior import Prior, nelbo
from unmurk.evaluation.exact import GaussianPrior
from unmurk.flows.layers import Context
from unmurk.problem import Problem
from unmurk.training import learn
from unmurk.training.trainer import Trainer
from unmurk.training.validation import (
    BOUND,
    EVALUATIONS,
    FRACTIONS,
    Checks,
    chi2,
    evidence_bound,
    measurement_swd,
)

PROBLEM = Problem("identity", 0.3)
PRIOR = GaussianPrior(torch.full((1, 8, 8), 0.5), torch.full((1, 8, 8), 0.04))


def noise():
    return torch.Generator().manual_seed(0)


class Exact(nn.Module):
    """The exact posterior of independent pixels N(1/2, 0.2^2) with noise 0.3, or a wider one."""

    def __init__(self, wider=1.0):
        super().__init__()
        self.gain = 0.04 / (0.04 + 0.09)
        self.spread = wider * math.sqrt(0.04 * 0.09 / (0.04 + 0.09))

    def context(self, y, problem):
        mean = 0.5 + self.gain * (y - 0.5)
        return Context(mean, torch.full_like(mean, math.log(self.spread)), y, y)

    def transform(self, z, context):
        return context.mean + self.spread * z, context.log_spread.flatten(1).sum(1)

    def log_density(self, x, context):
        law = torch.distributions.Normal(context.mean, self.spread)
        return law.log_prob(x).flatten(1).sum(1)


class Bounded:
    """The exact prior, with its evidence bound."""

    def nelbo(self, x, generator, draws):
        return nelbo(PRIOR.denoise, x, 0.005, 80.0, generator, draws)


def test_the_bound_of_an_exact_pair_is_the_evidence():
    """log N(y; 1/2, 0.2^2 + 0.3^2) for each pixel, and less for a posterior that is too wide."""
    x = PRIOR.sample(2000)
    y = PROBLEM.simulate(x)
    bound = PROBLEM.bind(range(2000), (1, 8, 8))
    exact = float(PRIOR.log_evidence(y, bound).mean() / 64)
    found = evidence_bound(Bounded(), Exact(), y, bound, noise())
    assert abs(found - exact) < 0.02
    # KL(N(m, 1.5^2 s^2) || N(m, s^2)) = -log 1.5 + (1.5^2 - 1) / 2
    wide = evidence_bound(Bounded(), Exact(1.5), y, bound, noise())
    assert abs(found - wide - (0.625 - math.log(1.5))) < 0.02


def test_draws_of_the_posterior_have_chi_square_one():
    y = PROBLEM.simulate(PRIOR.sample(500))
    bound = PROBLEM.bind(range(500), (1, 8, 8))
    draws = PRIOR.posterior(y, bound).sample(1)[0]
    assert abs(chi2(draws, y, bound) - 1) < 0.03
    assert chi2(y, y, bound) == 0
    # the posterior mean: E (y - m)^2 / sigma^2 = sigma^2 / (tau^2 + sigma^2)
    assert abs(chi2(PRIOR.posterior(y, bound).mean, y, bound) - 9 / 13) < 0.03


def test_hidden_pixels_do_not_count():
    problem = Problem("inpaint:random,keep=0.5", 0.1).bind(range(8), (1, 8, 8))
    y = problem.simulate(blobs(8))
    x = y + 0.1
    assert abs(chi2(x, y, problem) - 1) < 1e-4
    garbage = torch.where(problem.mask > 0, y, 7.0)
    assert chi2(x, garbage, problem) == pytest.approx(chi2(x, y, problem))


@pytest.mark.parametrize("operator", ["identity", "inpaint:random,keep=0.5", "cs:structured"])
def test_the_gap_is_least_for_the_right_prior(operator):
    """Against images whose spread is 1.7 times, and half, as wide."""
    keep = ",ratio=0.5" if operator.startswith("cs") else ""
    problem = Problem(operator + keep, 0.05)
    y = problem.simulate(PRIOR.sample(300))
    bound = problem.bind(range(300), (1, 8, 8))
    right = PRIOR.sample(300, seed=5)
    wrong = [0.5 + scale * (right - 0.5) for scale in (1.7, 0.5)]
    best = measurement_swd(right, y, bound, noise())
    assert all(measurement_swd(x, y, bound, noise()) > 1.8 * best for x in wrong)


def test_the_gap_of_a_constant_shift_is_known():
    """Whole images of one grey, no noise to speak of: see `metrics.sliced_wasserstein`."""
    problem = Problem("identity", 1e-6)
    y = torch.full((20, 1, 8, 8), 0.25)
    bound = problem.bind(range(20), (1, 8, 8))
    assert measurement_swd(y, y, bound, noise()) < 1e-5
    near, far = (measurement_swd(y + d, y, bound, noise()) for d in (0.1, 0.2))
    assert far == pytest.approx(2 * near, rel=1e-3)


def test_checks_cost_less_than_a_twentieth():
    y = torch.zeros(5000, 1, 8, 8)
    for kimg in (20.0, 100.0):
        checks = Checks.within(y, PROBLEM, (1, 8, 8), kimg, 0)
        evaluations = checks.count * len(FRACTIONS) * (EVALUATIONS + BOUND + 1)
        assert 0.04 < evaluations / (3 * 1000 * kimg) <= 0.05
    assert not Checks.within(y, PROBLEM, (1, 8, 8), 1.0, 0).due(1, 1)
    assert [s for s in range(1, 51) if checks.due(s, 50)] == [20, 30, 40, 50]


def test_a_run_records_them_and_learns_the_same(tmp_path, monkeypatch):
    """Four lines with three figures each; what is trained is that of a run without checks.

    The weights that are returned may be those of an earlier step, which checks found better.
    """
    y = PROBLEM.simulate(blobs())
    kw = {"recipe": RECIPE, "settings": TINY, "quiet": True}
    learn(y, PROBLEM, out=tmp_path / "a", **kw)
    checks = Checks(y, PROBLEM, (1, 8, 8), 16)
    monkeypatch.setattr(Checks, "within", lambda *_: checks)
    watched = learn(y, PROBLEM, out=tmp_path / "b", **kw)[0].state_dict()
    states = [torch.load(tmp_path / k / "state/latest.pt", weights_only=True) for k in "ab"]
    for part in ("modules", "ema"):
        for name in ("prior", "posterior"):
            one, other = (state[part][name] for state in states)
            assert all(torch.equal(one[k], other[k]) for k in one if torch.is_tensor(one[k]))
    best = states[1]["best"]["ema"]["prior"]
    assert all(torch.equal(watched[k], best[k]) for k in watched)
    lines = [json.loads(s) for s in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    taken = [line for line in lines if "check/measurement_swd" in line]
    assert [line["kimg"] for line in taken] == pytest.approx([0.128, 0.192, 0.256, 0.32])
    for line in taken:
        assert all(math.isfinite(line[f"check/{k}"]) for k in ("measurement_swd", "chi2", "elbo"))


# -- the best weights are kept --------------------------------------------------------------------


class Judge(Checks):
    """Says what it is told, and remembers what it saw."""

    def script(self, verdicts):
        object.__setattr__(self, "verdicts", verdicts)
        object.__setattr__(self, "seen", [])
        return self

    def measure(self, prior, posterior):
        self.seen.append({k: v.clone() for k, v in prior.state_dict().items()})
        return self.verdicts[len(self.seen) - 1]


BETTER = {"measurement_swd": 0.1, "chi2": 1.0, "elbo": -1.0}
WORSE = {"measurement_swd": 0.1, "chi2": 1.0, "elbo": -2.0}


def judged(out, monkeypatch, verdicts, stop=None, method="noisy", **options):
    y = PROBLEM.simulate(blobs())
    judge = Judge(y, PROBLEM, (1, 8, 8), 16).script(verdicts)
    with monkeypatch.context() as patch:
        patch.setattr(Checks, "within", lambda *_: judge)
        if stop is not None:
            update = Trainer.update

            def stops(self):
                if self.step == stop:
                    raise KeyboardInterrupt
                return update(self)

            patch.setattr(Trainer, "update", stops)
        prior, _ = learn(y, PROBLEM, method, out=out, settings=TINY, quiet=True, **options)
    return prior.state_dict(), judge.seen


def kept(out):
    lines = [json.loads(s) for s in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["check/kept"] for line in lines if "check/kept" in line]


def same(one, other):
    return all(torch.equal(one[k], other[k]) for k in one)


def test_a_run_ends_with_the_weights_judged_best(tmp_path, monkeypatch):
    """The second of four is preferred; a run that was stopped, or is called again, agrees."""
    verdicts = [WORSE, BETTER, WORSE, WORSE]
    found, seen = judged(tmp_path / "a", monkeypatch, verdicts)
    assert same(found, seen[1]) and not same(found, seen[3])
    assert kept(tmp_path / "a") == [1, 1, 0, 0]
    saved = Prior.load(tmp_path / "a" / "prior").state_dict()
    assert same(saved, seen[1])
    again, _ = judged(tmp_path / "a", monkeypatch, verdicts)
    assert same(again, seen[1])
    with pytest.raises(KeyboardInterrupt):
        judged(tmp_path / "b", monkeypatch, verdicts[:2], stop=27)  # of 40 steps
    rest, _ = judged(tmp_path / "b", monkeypatch, verdicts[2:])
    assert same(rest, seen[1]) and kept(tmp_path / "b") == [1, 1, 0, 0]


def test_the_last_weights_are_kept_where_they_are_best(tmp_path, monkeypatch):
    found, seen = judged(tmp_path, monkeypatch, [WORSE, WORSE, WORSE, BETTER])
    assert same(found, seen[3]) and kept(tmp_path) == [1, 0, 0, 1]


def test_weights_of_which_a_part_never_trained_are_not_kept(tmp_path, monkeypatch):
    """The flow begins at half of the run: what the figures say at 40 % does not count."""
    found, seen = judged(
        tmp_path, monkeypatch, [BETTER, WORSE, WORSE, WORSE], method="flowdiff", recipe=RECIPE
    )
    assert RECIPE.flow == 0.5 and kept(tmp_path) == [0, 1, 0, 0]
    assert same(found, seen[1]) and not same(found, seen[0])
