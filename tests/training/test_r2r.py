"""R2R of the prior's own network (5.3q), and what follows it in a run, for A = I."""

from types import SimpleNamespace

import pytest
import torch

from tests.training.test_learn import PROBLEM, SIGMA, GaussianPrior, descend
from unmurk.repeats import grouped
from unmurk.rng import generator
from unmurk.training import Em, FlowDiff, Recipe, Rounds, flowdiff
from unmurk.training.losses import recorrupted_matching


@pytest.mark.parametrize("alpha", [0.4, 3.0])
def test_recorrupted_matching_finds_the_denoiser_without_clean_images(alpha):
    """Its minimiser is the denoiser of the clean prior at sigma_y sqrt(1 + a^2)."""
    prior = GaussianPrior()

    def loss(_, y, g):
        return recorrupted_matching(prior, y, PROBLEM, torch.full((len(y),), alpha), g)

    descend(loss, [prior])
    assert abs(prior.variance.item() - 1) < 0.03


def test_recorrupted_matching_is_its_closed_form():
    """D(x, s) = c x: weights 1 / s^2 + 4, errors (c - 1) y and (a c + 1 / a) n in pairs."""
    a, y = torch.tensor([0.5, 2.0]), torch.randn(2, 1, 4, 4, generator=generator(1))
    n = SIGMA * torch.randn(y.shape, generator=generator(2))
    level, told = SIGMA * (1 + a**2).sqrt(), []
    prior = GaussianPrior(1.0)
    listener = SimpleNamespace(denoise=lambda x, s: told.append(s) or prior.denoise(x, s))
    loss = recorrupted_matching(listener, y, PROBLEM, a, generator(2))
    c, weight = 1 / (1 + level**2), 1 / level**2 + 4
    a, c, weight = (v.view(-1, 1, 1, 1) for v in (a, c, weight))
    error = weight * (((c - 1) * y).square() + ((a * c + 1 / a) * n).square())
    torch.testing.assert_close(loss, error.mean())
    torch.testing.assert_close(told[0], level.repeat(2))


def test_pretraining_of_the_prior_has_the_lowest_level_and_those_of_the_prior(monkeypatch):
    """Half of the pairs are at sigma_y sqrt(1 + a^2), half at the levels of the prior above it."""
    y = torch.rand(4000, 1, 4, 4)
    learner = FlowDiff().build(y, PROBLEM, (1, 4, 4))
    told, lowest = [], SIGMA * (1 + learner.recipe.alpha**2) ** 0.5
    monkeypatch.setattr(learner.prior, "denoise", lambda x, s: told.append(s) or x)
    learner.losses(y, torch.arange(4000), 0.0, generator(3))
    assert torch.equal(*(one.sort().values for one in told[0].split(2000)))  # pairs
    level = told[0][:2000]
    assert level.min() >= lowest * 0.9999
    upper = level[level > 1.001 * lowest]  # log 2 sigma ~ N(0, 1.2^2): 47.5 % of half of them
    assert len(upper) == pytest.approx(475, abs=60)
    assert ((2 * upper).log() > 1.2).sum() == pytest.approx(159, abs=40)


def test_averages_go_on_over_pretraining_and_begin_afresh_in_a_round():
    y, shape = torch.rand(8, 1, 8, 8), (1, 8, 8)
    for method, wanted in ((FlowDiff(), 0.0), (Em(rounds=Rounds(4, 8)), 0.5)):
        built = method.build(y, PROBLEM, shape)
        held = {id(p) for p in built.prior.parameters()}
        (group,) = [g for g in built.groups if held & {id(p) for p in g.parameters}]
        assert group.training_start(0.6) == wanted


def test_a_prior_without_pretraining_has_the_whole_rate():
    for r2r, peak in ((0.0, 1.0), (0.4, 0.5)):
        built = FlowDiff(recipe=Recipe(r2r=r2r)).build(torch.rand(8, 1, 8, 8), PROBLEM, (1, 8, 8))
        assert built.phases()["prior"][-1].peak == peak


def test_every_part_of_a_batch_has_its_share_of_the_loss(monkeypatch):
    """Of 16 images 4 are clean; after pre-training 4 are R2R's, also in the E-step."""
    recipe = Recipe(r2r=0.2, e_step=0.6, flow=0.9, clean=0.25, r2r_later=0.25)
    y, index, clean = torch.rand(16, 1, 8, 8), torch.arange(16), torch.rand(5, 1, 8, 8)
    built = FlowDiff(recipe=recipe).build(y, PROBLEM, (1, 8, 8), clean=clean)
    own, ambient, known = (torch.tensor(value) for value in (1.0, 100.0, 10.0))
    monkeypatch.setattr(built, "recorrupted_loss", lambda y, *rest: own)
    monkeypatch.setattr(flowdiff, "ambient_matching", lambda *rest: ambient)
    monkeypatch.setattr(flowdiff, "denoising", lambda *rest: known)

    def loss(progress):
        return built.losses(y, index, progress, generator(1))["prior"].item()

    assert loss(0.1) == pytest.approx((12 * 1 + 4 * 10) / 16)
    assert loss(0.4) == pytest.approx((4 * 1 + 8 * 100 + 4 * 10) / 16)
    assert loss(0.7) == pytest.approx((4 * 1 + 12 * 10) / 16)


@pytest.mark.parametrize("repeats", [1, 3])
def test_posterior_means_are_those_of_the_averaged_prior(monkeypatch, repeats):
    """The prior's target is given all captures, that of m the picked ones; one evaluation each,
    and one for the draws."""
    recipe = Recipe(r2r=0.2, e_step=0.6)
    y, index = torch.rand(8 * repeats, 1, 8, 8), torch.arange(8)
    built = FlowDiff(recipe=recipe).build(y, PROBLEM, (1, 8, 8), repeats=repeats)
    batch = y if repeats == 1 else grouped(y, repeats)
    told, found = [], {}

    def denoise(x, sigma):
        told.append(sigma)
        return x * 0 + sigma  # marks the level

    monkeypatch.setattr(built.teacher, "denoise", denoise)
    monkeypatch.setattr(
        flowdiff, "ambient_matching", lambda *rest: found.update(prior=rest[-1]) or rest[1].sum()
    )
    monkeypatch.setattr(
        flowdiff, "distilled", lambda m, y, p, target: found.update(mean=target) or y.sum()
    )
    for step in range(6):
        told.clear()
        noise = generator(1, step)
        picked = built.pick_captures(noise) if repeats > 1 else [0]
        built.losses(batch, index, 0.4, noise)
        levels = SIGMA / repeats**0.5, SIGMA / len(picked) ** 0.5
        for key, level in zip(("prior", "mean"), levels, strict=True):
            torch.testing.assert_close(found[key], torch.full((4, 1, 8, 8), level))
        assert len(told) == (2 if repeats == 1 else 3)
