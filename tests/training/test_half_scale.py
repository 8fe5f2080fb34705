"""Restorations at half scale as examples of sharp images: the images, and who learns from them."""

import json

import numpy as np
import pytest
import torch

import unmurk
from tests.learners import check_run
from unmurk.operators import parse
from unmurk.problem import Problem
from unmurk.rng import ShardedGenerator, generator
from unmurk.training import FlowDiff, Recipe, Settings, Trainer
from unmurk.training.half_scale import halve, mirrored

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
    found = mirrored(x, 5, 6, torch.Generator().manual_seed(1))
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


# -- who learns from them -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "blurs"),
    [
        ("blur:gaussian,sigma=1", True),
        ("blur:motion,length=3", True),
        ("sr:average,factor=2", True),
        ("blur:uniform,size=3|inpaint:random,keep=0.5", True),
        ("identity", False),
        ("inpaint:random,keep=0.5", False),
        ("colour:grey", False),
        ("mri:cartesian,acceleration=2", False),
    ],
)
def test_operators_that_take_fine_detail_away(text, blurs):
    assert parse(text).blurs is blurs


def build(text, noise=0.1, sharp=None, **recipe):
    problem = Problem(text, noise)
    x = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = problem.simulate(x)
    learner = FlowDiff(recipe=Recipe(buffer=8, **recipe))
    return y, problem, learner.build(y, problem, (1, 8, 8), clean=sharp)


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
    examples = learner.pick_examples(8, torch.Generator().manual_seed(0))
    assert examples.shape == (0, 1, 8, 8)


def test_they_are_wiener_solutions_at_half_scale_and_part_of_every_batch(tmp_path):
    clean = torch.full((5, 1, 8, 8), 7.0)
    y, problem, learner = build("blur:gaussian,sigma=1", sharp=clean, half=0.5, clean=0.25)
    trainer = Trainer(learner, y, Settings("tiny", kimg=0.016, batch=8), tmp_path, quiet=True)
    learner.initialize(trainer.device)
    halves = learner.buffers["half images"]
    assert halves.shape == (8, 1, 4, 4) and int(learner.buffers["half filled"]) == 8
    bound = problem.bind(range(8), (1, 8, 8))
    wiener = learner.posterior.start.restore(y[:8], bound)
    expected = wiener.view(8, 1, 4, 2, 4, 2).mean((3, 5))
    torch.testing.assert_close(halves.float(), expected, atol=1e-3, rtol=0)

    noise = torch.Generator().manual_seed(0)
    examples = learner.pick_examples(8, noise)
    assert examples.shape == (6, 1, 8, 8)
    assert (examples[:2] == 7).all() and (examples[2:] < 7).all()
    values = halves.float().unique()
    assert torch.isin(examples[2:], values).all()
    assert len(learner.pick_examples(2, noise)) == 1  # one measurement is left
    again = learner.pick_examples(8, torch.Generator().manual_seed(1))
    assert not torch.equal(again, examples)


def test_all_that_is_trained_is_trained_on_them(monkeypatch, tmp_path):
    """m, the prior before the E-step, and prior and flow after it receive the sharp images."""
    y, _, learner = build("blur:gaussian,sigma=1", half=0.5, r2r=0.25, e_step=0.5)
    trainer = Trainer(learner, y, Settings("tiny", kimg=0.032, batch=8), tmp_path, quiet=True)
    learner.initialize(trainer.device)
    learner.halves.tensors["images"].fill_(5.0)
    seen = []

    def record(name, place):
        own = getattr(flowdiff, name)

        def call(*args):
            seen.append((name, int((args[place] == 5).flatten(1).all(1).sum())))
            return own(*args)

        monkeypatch.setattr(flowdiff, name, call)

    from unmurk.training import flowdiff

    record("supervised", 1)
    record("denoising", 1)
    record("forward_kl", 1)
    noise = torch.Generator().manual_seed(0)
    index = torch.arange(8)
    for progress in (0.1, 0.3):
        learner.losses(y[:8], index, progress, noise)
    learner.draw_posterior(8, trainer.device)
    learner.losses(y[:8], index, 0.6, noise)
    assert [number for _, number in seen] == [4, 0, 4, 4, 4]
    names = [name for name, _ in seen]
    assert names == ["supervised", "denoising", "denoising", "denoising", "forward_kl"]


def test_a_blurred_set_is_learned_from_and_a_run_goes_on_where_it_was(tmp_path, monkeypatch):
    problem = Problem("blur:gaussian,sigma=1", 0.1)
    check_run(tmp_path, monkeypatch, "flowdiff", problem, (3, 8))


@pytest.mark.parametrize(
    ("operator", "half", "ambient", "scales"),
    [
        (None, 0.5, True, False),
        ("identity", 0.5, True, False),
        ("inpaint:random,keep=0.5", 0.5, False, False),
        ("blur:gaussian,sigma=1", 0.5, False, True),
        ("blur:gaussian,sigma=1", 0.0, False, False),
        ("inpaint:random,keep=0.5|sr:average,factor=2", 0.5, False, True),
        ("python:mine.Blur", 0.5, False, False),
    ],
)
def test_the_papers_of_a_run_are_those_of_its_stages(operator, half, ambient, scales):
    texts = FlowDiff.papers({"recipe": {"half": half}, "operator": operator})
    assert any("2404.10177" in text for text in texts) is ambient
    assert any("2312.11232" in text for text in texts) is scales


def test_a_run_folder_cites_half_scale_by_its_operator(tmp_path):
    config = {"method": "flowdiff", "options": {"recipe": {"half": 0.5}}}
    for text, scales in (("blur:gaussian,sigma=1", True), ("identity", False)):
        run = tmp_path / text.partition(":")[0]
        run.mkdir()
        problem = {"operator": text, "noise": 0.1}
        (run / "config.json").write_text(json.dumps({**config, "problem": problem}))
        assert ("2312.11232" in unmurk.citation(run)) is scales


def test_restorations_are_added_while_the_run_goes_on(monkeypatch, tmp_path):
    """A run begins with a few, and has restored each measurement once at most."""
    from unmurk.training import flowdiff

    monkeypatch.setattr(flowdiff, "FIRST", 3)
    monkeypatch.setattr(flowdiff, "CHUNK", 2)
    y, problem, learner = build("blur:gaussian,sigma=1")
    device = torch.device("cpu")
    trainer = Trainer(learner, y, Settings("tiny", kimg=0.016, batch=8), tmp_path, quiet=True)
    learner.initialize(trainer.device)
    assert learner.halves.drawn == 2  # whole chunks of the first 3
    learner.restore_halves(4, device)  # 3 + 4 / 4
    assert learner.halves.drawn == 4
    learner.restore_halves(10**6, device)
    assert learner.halves.drawn == learner.halves.filled == len(learner.halves) == 8
    wiener = learner.posterior.start.restore(y[:8], problem.bind(range(8), (1, 8, 8)))
    found = learner.buffers["half images"].float()
    torch.testing.assert_close(found, halve(wiener), atol=1e-3, rtol=0)


def test_processes_share_the_choice_of_a_step():
    """Two processes with halves of a batch pick what one picks for the whole."""
    learner = build("blur:gaussian,sigma=1")[2]
    learner.halves.put(torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 4, 4))
    whole = learner.pick_examples(8, generator(3))
    shares = [
        learner.pick_examples(4, ShardedGenerator.of(generator(3), rank, 2)) for rank in (0, 1)
    ]
    assert len(whole) == 4
    for rank in (0, 1):
        assert torch.equal(shares[rank], whole[rank::2])
