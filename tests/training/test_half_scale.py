"""Restorations at half scale as examples of sharp images: the images, and who learns from them."""

import numpy as np
import pytest
import torch

from tests.learners import check_run
from unmurk.operators import parse
from unmurk.operators.compose import Local
from unmurk.operators.cropped import CroppedOperator
from unmurk.operators.crops import Crop
from unmurk.problem import Problem
from unmurk.rng import ShardedGenerator, generator
from unmurk.training import FlowDiff, Recipe, Settings, Trainer
from unmurk.training.half_scale import DETAIL, continued, detailed, halve

# -- the images -----------------------------------------------------------------------------------


def test_a_pixel_at_half_scale_is_the_mean_of_four():
    x = torch.rand(2, 3, 7, 8, generator=torch.Generator().manual_seed(0))
    found = halve(x)
    assert found.shape == (2, 3, 3, 4)
    for i in range(3):
        for j in range(4):
            expected = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((-2, -1))
            torch.testing.assert_close(found[:, :, i, j], expected)


def test_images_go_on_with_their_mirror_images_from_any_place():
    """Every part is one of numpy's symmetric padding, all places are found, channels together."""
    x = torch.rand(400, 2, 3, 2, generator=torch.Generator().manual_seed(0))
    found = continued(x, 5, 6, torch.Generator().manual_seed(1))
    assert found.shape == (400, 2, 5, 6)
    places = set()
    for image, part in zip(x.numpy(), found.numpy(), strict=True):
        wide = np.pad(image, ((0, 0), (0, 9), (0, 8)), "symmetric")
        fits = [
            (i, j)
            for i in range(6)
            for j in range(4)
            if np.array_equal(wide[:, i : i + 5, j : j + 6], part)
        ]
        assert len(fits) == 1
        places |= set(fits)
    assert len(places) == 6 * 4


def test_fine_detail_is_learned_at_low_levels_alone():
    x, half = torch.zeros(5, 1, 2, 2), torch.arange(1.0, 4).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    found = detailed(x, half, torch.tensor([0.29, 0.31, 0.01, 0.01, 0.9]))
    assert found[:, 0, 0, 0].tolist() == [1, 0, 3, 0, 0] and found.shape == x.shape
    assert torch.equal(detailed(x, half[:0], torch.ones(5)), x)


# -- who learns from them -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "blurs"),
    [
        ("blur:gaussian,sigma=1", True),
        ("blur:motion,length=3", True),
        ("blur:uniform,size=1", False),
        ("sr:average,factor=2", True),
        ("sr:average,factor=1", False),
        ("sr:bicubic,factor=2", True),
        ("blur:uniform,size=3|inpaint:random,keep=0.5", True),
        ("identity", False),
        ("inpaint:random,keep=0.5", False),
        ("colour:grey", False),
        ("mri:cartesian,acceleration=2", False),
    ],
)
def test_operators_that_take_fine_detail_away(text, blurs):
    operator = parse(text)
    assert operator.blurs is blurs
    if isinstance(operator, Local):
        crops = CroppedOperator(operator, 8, lambda number: Crop(0, 0, 0, 8, 8), lambda n: None)
        assert crops.blurs is blurs


def build(text, noise=0.1, sharp=None, **recipe):
    problem = Problem(text, noise)
    x = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = problem.simulate(x)
    learner = FlowDiff(recipe=Recipe(**{"buffer": 8} | recipe))
    return y, problem, learner.build(y, problem, (1, 8, 8), clean=sharp)


def started(y, learner, path, kimg=0.016):
    trainer = Trainer(learner, y, Settings("tiny", kimg=kimg, batch=8), path, quiet=True)
    learner.initialize(trainer.device)
    return trainer


@pytest.mark.parametrize(
    ("text", "noise", "half"),
    [
        ("identity", 0.1, 0.5),
        ("inpaint:random,keep=0.5", 0.1, 0.5),
        ("blur:gaussian,sigma=1", "poisson,gain=0.01", 0.5),
        ("blur:gaussian,sigma=1", 0.1, 0.0),
    ],
)
def test_others_have_none(text, noise, half):
    learner = build(text, noise=noise, half=half)[2]
    assert learner.halves is None and not any(name.startswith("half") for name in learner.buffers)
    assert learner.pick_halves(8, generator(0)).shape == (0, 1, 8, 8)


def test_they_are_wiener_solutions_at_half_scale_and_part_of_every_batch(tmp_path):
    clean = torch.full((5, 1, 8, 8), 7.0)
    y, problem, learner = build("blur:gaussian,sigma=1", sharp=clean, half=0.5, clean=0.25)
    started(y, learner, tmp_path)
    found = learner.buffers["half images"].float()
    assert found.shape == (8, 1, 4, 4) and int(learner.buffers["half filled"]) == 8
    wiener = learner.posterior.start.restore(y[:8], problem.bind(range(8), (1, 8, 8)))
    expected = wiener.view(8, 1, 4, 2, 4, 2).mean((3, 5))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)

    picked = learner.pick_halves(8, generator(0))
    assert picked.shape == (4, 1, 8, 8) and torch.isin(picked, found.unique()).all()
    assert not torch.equal(learner.pick_halves(8, generator(1)), picked)
    assert learner.clean_count(8) == 2 and len(learner.pick_halves(3, generator(0))) == 1
    assert len(learner.pick_halves(1, generator(0))) == 0  # one measurement is left


def test_all_that_is_trained_is_trained_on_them(monkeypatch, tmp_path):
    """m and the flow see half a batch of them; the prior sees those at levels of fine detail."""
    from unmurk.training import flowdiff

    y, _, learner = build("blur:gaussian,sigma=1", half=0.5, r2r=0.25, e_step=0.5)
    device = started(y, learner, tmp_path, kimg=0.032).device
    learner.halves.tensors["images"].fill_(5.0)
    seen, images = [], []

    def record(name):
        own = getattr(flowdiff, name)

        def call(*args):
            sharp = (args[1] == 5).flatten(1).all(1)
            seen.append((name, sharp.tolist(), args[2]))
            images.append(args[1])
            return own(*args)

        monkeypatch.setattr(flowdiff, name, call)

    for name in ("supervised", "denoising", "forward_kl"):
        record(name)
    index = torch.arange(8)
    for progress in (0.1, 0.3):
        learner.losses(y[:8], index, progress, generator(4))
    mean = learner.posterior_mean(*learner.view(y[:8], index))
    high = seen[2][2] >= DETAIL  # there the prior sees what was measured, each image once
    torch.testing.assert_close(images[1], mean[:4])
    torch.testing.assert_close(images[2][high], mean[4:][high])
    learner.draw_posterior(8, device)
    learner.losses(y[:8], index, 0.6, generator(4))
    names = [name for name, *_ in seen]
    assert names == ["supervised", "denoising", "denoising", "denoising", "forward_kl"]
    assert seen[0][1] == [True] * 4 and seen[1][1] == [False] * 4
    for _, sharp, sigma in (seen[2], seen[3]):
        expected = (sigma < DETAIL).tolist()[:4]
        assert sharp[:4] == expected and 0 < sum(expected) < 4
        assert not any(sharp[4:])
    assert seen[4][1] == [True] * 4 + [False] * 4


def test_a_blurred_set_is_learned_from_and_a_run_goes_on_where_it_was(tmp_path, monkeypatch):
    problem = Problem("blur:gaussian,sigma=1", 0.1)
    check_run(tmp_path, monkeypatch, "flowdiff", problem, (3, 8))


@pytest.mark.parametrize(
    ("record", "ambient", "scales"),
    [
        ({}, True, False),
        ({"operator": "identity"}, True, False),
        ({"operator": "inpaint:random,keep=0.5"}, False, False),
        ({"operator": "blur:gaussian,sigma=1", "half scale": True}, False, True),
        ({"operator": "blur:gaussian,sigma=1", "half scale": False}, False, False),
    ],
)
def test_the_papers_of_a_run_are_those_of_its_stages(record, ambient, scales):
    texts = FlowDiff.papers(record)
    assert any("2404.10177" in text for text in texts) is ambient
    assert any("2312.11232" in text for text in texts) is scales


def test_restorations_are_added_while_the_run_goes_on(monkeypatch, tmp_path):
    """A run begins with a few, and has restored each measurement once at most."""
    from unmurk.training import flowdiff

    monkeypatch.setattr(flowdiff, "FEW", 3)
    monkeypatch.setattr(flowdiff, "TOGETHER", 2 * 64)  # two images of 8 x 8
    y, problem, learner = build("blur:gaussian,sigma=1")
    trainer = started(y, learner, tmp_path)
    assert trainer.expected() > 0  # it takes steps before the first one
    assert learner.halves.drawn == 2  # whole chunks of the first 3
    learner.before(trainer, 1, 0.5)  # 3 + 8 / 4
    assert learner.halves.drawn == 4
    learner.restore_halves(10**6, torch.device("cpu"))
    assert learner.halves.drawn == learner.halves.filled == len(learner.halves) == 8
    wiener = learner.posterior.start.restore(y[:8], problem.bind(range(8), (1, 8, 8)))
    found = learner.buffers["half images"].float()
    torch.testing.assert_close(found, halve(wiener), atol=1e-3, rtol=0)


def test_processes_share_the_choice_of_a_step():
    """Two processes with halves of a batch pick what one picks for the whole."""
    learner = build("blur:gaussian,sigma=1")[2]
    learner.halves.put(torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 4, 4))
    whole = learner.pick_halves(8, generator(3))
    shares = [learner.pick_halves(4, ShardedGenerator.of(generator(3), k, 2)) for k in (0, 1)]
    assert len(whole) == 4
    for rank in (0, 1):
        assert torch.equal(shares[rank], whole[rank::2])
