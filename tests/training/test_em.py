"""Expectation maximisation: a fixed point in closed form, and runs that can be continued."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.training.test_learn import TINY, blobs, equal, weights
from unmurk.cli.main import main
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.problem import Problem
from unmurk.rng import PerImageGenerator
from unmurk.solvers import Draws
from unmurk.training import Rounds, learn
from unmurk.training.conditional import ConditionalDenoiser, conditioning_stem
from unmurk.training.em import Em
from unmurk.training.replay import Replay
from unmurk.training.trainer import Trainer

ROUNDS = Rounds(rounds=3, images=16, flow=0.6, steps=2)
MASKS = Problem("inpaint:random,keep=0.6", 0.1)


def test_the_oldest_images_give_way():
    replay = Replay(4, (1, 1, 1))
    for value in ([1.0, 2.0, 3.0], [4.0, 5.0]):
        replay.put(torch.tensor(value).view(-1, 1, 1, 1))
    assert replay.tensors["images"].flatten().tolist() == [5.0, 2.0, 3.0, 4.0]
    assert (replay.drawn, replay.filled) == (5, 4)
    assert replay.numbers(2).tolist() == [5, 6]
    picked = replay.pick(400, torch.Generator().manual_seed(0)).unique()
    assert picked.tolist() == [2.0, 3.0, 4.0, 5.0]


def test_every_round_draws_afresh_from_the_prior_of_the_last(tmp_path):
    """Three rounds of 16 images; the solver is asked in all but the first, in order of number."""
    asked = []

    def solver(y, problem, prior, streams):
        asked.append((problem.index, len(streams)))
        return torch.full((len(y), 1, 8, 8), 0.1 * len(asked))

    y = MASKS.simulate(blobs())
    method = Em(rounds=ROUNDS, solver=solver).build(y, MASKS, (1, 8, 8))
    trainer = Trainer(method, y, TINY, tmp_path, quiet=True)
    held = {}
    method.initialize(trainer.device)
    for step in range(trainer.steps):
        method.before(trainer, step, step / trainer.steps)
        held[step] = method.buffers["images"].float().clone()
    # 24 measurements: the second round goes on at number 16 and begins again at 24
    assert asked == [([*range(16, 24), *range(8)], 16), ([*range(8, 24)], 16)]
    changes = [s for s in range(1, trainer.steps) if not torch.equal(held[s], held[s - 1])]
    assert changes == [14, 27]  # of 40 steps: after a third and two thirds
    assert held[14].unique().allclose(torch.tensor(0.1), atol=1e-3)
    assert held[27].unique().allclose(torch.tensor(0.2), atol=1e-3)


def test_the_first_draws_are_those_of_the_moment_prior(tmp_path):
    """They explain y: chi-square near 1, and vary where nothing is seen."""
    problem = Problem("inpaint:random,keep=0.6", 0.05)
    y = problem.simulate(blobs(256))
    rounds = Rounds(rounds=1, images=256)
    method = Em(rounds=rounds, solver=Draws("diffpir", steps=2)).build(y, problem, (1, 8, 8))
    trainer = Trainer(method, y, TINY, tmp_path, quiet=True)
    method.initialize(trainer.device)
    method.before(trainer, 0, 0.0)
    x, bound = method.buffers["images"].float(), problem.bind(range(256), (1, 8, 8))
    chi = bound.residual(x, y).square().sum() / (0.05**2 * bound.measurements(y).sum())
    assert 0.85 < chi < 1.15
    assert torch.equal(method.posterior.start.mean, method.ema["posterior"].start.mean)
    hidden = 1 - bound.mask.expand_as(x)
    assert (x.std(0) * hidden[0]).sum() / hidden[0].sum() > 0.05


def run(folder, problem, solver=None, **changes):
    y = problem.simulate(blobs())
    return learn(
        y, problem, "em", out=folder, rounds=ROUNDS, settings=TINY, solver=solver, quiet=True,
        **changes,
    )  # fmt: skip


@pytest.mark.presets
def test_a_continued_run_ends_as_if_never_stopped(tmp_path, monkeypatch):
    """Stopped in the middle of the second round, then the same command: the same weights."""
    problem, solver = MASKS, Draws("diffpir", steps=2)
    run(tmp_path / "whole", problem, solver)
    update = Trainer.update

    def stops(self):
        if self.step == 20:
            raise KeyboardInterrupt
        return update(self)

    monkeypatch.setattr(Trainer, "update", stops)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", problem, solver)
    monkeypatch.undo()
    prior, posterior = run(tmp_path / "cut", problem, solver)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert posterior.start is not None and prior.shape == (1, 8, 8)
    lines = [json.loads(s) for s in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["kimg"] == 0.32 and lines[-1]["loss/flow"] < 2


def test_what_em_cannot_do_is_named(tmp_path):
    y = MASKS.simulate(blobs())
    kw = {"out": tmp_path / "run", "settings": TINY, "quiet": True}
    with pytest.raises(InputError, match="give solver="):
        learn(y, MASKS, "em", **kw)
    with pytest.raises(InputError, match="em cannot learn from hdr"):
        learn(y, Problem("hdr:clip", 0.1), "em", **kw)
    with pytest.raises(InputError, match="rounds.rounds must be a whole number from 1"):
        learn(y, MASKS, "em", rounds=Rounds(rounds=0), **kw)
    with pytest.raises(InputError, match="unknown"):
        Draws("nothing")
    assert not (tmp_path / "run").exists()


# -- the conditional E-step -----------------------------------------------------------------------


def flat(n, seed=0):
    """Images of one grey each, dark or bright: half a pixel seen tells all others."""
    bright = torch.rand(n, 1, 1, 1, generator=torch.Generator().manual_seed(seed)) < 0.5
    return torch.where(bright, 0.8, 0.2).expand(n, 1, 8, 8).contiguous()


def test_channels_enter_as_if_stacked_on_the_noisy_image():
    torch.manual_seed(0)
    prior = Prior.create("tiny", (1, 8, 8))
    v, plain = conditioning_stem(prior, 3), copy.deepcopy(prior)
    network, c = ConditionalDenoiser(prior, v), torch.randn(2, 3, 8, 8)
    x, sigma = torch.rand(2, 1, 8, 8), torch.tensor([0.1, 2.0])
    first, stacked = plain.unet.conv_in, torch.nn.Conv2d(4, 32, 3, padding=1)
    stacked.weight = torch.nn.Parameter(torch.cat([first.weight, v.weight], 1))
    stacked.bias = first.bias
    both, seen = copy.deepcopy(plain), []
    both.unet.conv_in.register_forward_hook(
        lambda layer, inputs, out: seen.append(inputs[0]) or stacked(torch.cat([inputs[0], c], 1))
    )
    found = network.denoise(x, sigma, c)
    torch.testing.assert_close(found, both.denoise(x, sigma))
    assert len(seen) == 1 and not torch.equal(found, plain.denoise(x, sigma))
    assert torch.equal(prior.denoise(x, sigma), plain.denoise(x, sigma))  # no trace is left


def test_the_conditional_loss_is_that_of_a_regression_on_fresh_measurements(monkeypatch):
    """The channels are those of A x + sigma_y n, not of the y at hand; independent formula."""
    y = torch.full((4, 1, 8, 8), 9.0)
    method = Em(rounds=ROUNDS, e_step="conditional").build(y, MASKS, (1, 8, 8))
    x, sigma = flat(4), torch.tensor([0.05, 0.2, 1.0, 5.0])
    heard = {}

    def denoise(noisy, levels, channels):
        heard.update(noisy=noisy, channels=channels)
        return x + 0.1

    monkeypatch.setattr(method.conditional_network, "denoise", denoise)
    problem, noise = MASKS.bind(range(4), (1, 8, 8)), torch.Generator().manual_seed(3)
    loss = method.matching(x, problem, sigma, noise)
    again = torch.Generator().manual_seed(3)
    y = problem.A(x) + 0.1 * torch.randn(x.shape, generator=again)
    weight = 4 * (1 + 4 * sigma**2) / (4 * sigma**2)
    assert float(loss) == pytest.approx(float((weight * 0.01).mean()), rel=1e-5)
    torch.testing.assert_close(heard["channels"], method.posterior.known(y, problem)[1])
    n = (heard["noisy"] - x) / sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(n, torch.randn(x.shape, generator=again), atol=1e-4, rtol=1e-4)


def test_its_rounds_refit_the_conditional_network_and_the_last_the_prior(tmp_path):
    y = MASKS.simulate(blobs())
    method = Em(rounds=ROUNDS, e_step="conditional").build(y, MASKS, (1, 8, 8))
    trainer = Trainer(method, y, TINY, tmp_path, quiet=True)
    method.initialize(trainer.device)
    trained = []
    for step in range(trainer.steps):
        method.before(trainer, step, step / trainer.steps)
        rows = torch.arange(8)
        noise = torch.Generator().manual_seed(step)
        trained.append(set(method.losses(y[rows], rows, step / trainer.steps, noise)))
    assert trained[:24] == [{"conditional"}] * 24  # of 40 steps; the flow begins at 0.6
    assert trained[24:27] == [{"conditional", "flow", "mean"}] * 3
    assert trained[27:] == [{"prior", "flow", "mean"}] * 13


@pytest.mark.presets
@pytest.mark.slow
def test_its_draws_obey_what_is_seen_and_what_was_learnt(tmp_path):
    """Greys of two kinds, three pixels in four hidden: draws are flat and of the right kind."""
    problem = Problem("inpaint:random,keep=0.25", 0.05)
    y = problem.simulate(flat(256))
    rounds = Rounds(rounds=3, images=256, steps=8)
    learn(
        y, problem, "em", out=tmp_path, rounds=rounds, settings=TINY, kimg=1.2, rate=5e-3,
        e_step="conditional", quiet=True,
    )  # fmt: skip
    method = Em(rounds=rounds, e_step="conditional").build(y, problem, (1, 8, 8))
    trainer = Trainer(method, y, replace(TINY, kimg=1.2, rate=5e-3), tmp_path, quiet=True)
    assert trainer.load()
    truth, other = flat(64, 1), problem.bind(range(64), (1, 8, 8))
    given = problem.simulate(truth)
    channels = method.posterior.known(given, other)[1]
    x = method.conditional_teacher.sample(channels, PerImageGenerator(0, range(64)), 8)
    assert ((x.mean((1, 2, 3)) > 0.5) == (truth[:, 0, 0, 0] > 0.5)).float().mean() > 0.95
    assert float((x - truth).square().mean().sqrt()) < 0.3  # 0.42 for draws that know nothing
    assert not (tmp_path / "conditional").exists()  # what is saved is what can be used


def test_the_command_takes_the_conditional_step(tmp_path):
    np.save(tmp_path / "y.npy", MASKS.simulate(blobs()).numpy())
    run = tmp_path / "run"
    code = main(
        ["learn", str(tmp_path / "y.npy"), "--out", str(run), "--method", "em", "--kimg", "0.1",
         "--operator", MASKS.operator.spec, "--noise", "0.1", "--e-step", "conditional",
         "--batch", "8"]
    )  # fmt: skip
    config = json.loads((run / "config.json").read_text())
    assert code == 0 and config["options"] | {"rounds": 0} == {
        "e_step": "conditional",
        "solver": None,
        "rounds": 0,
    }
    with pytest.raises(InputError, match="at least 2"):
        Em(rounds=Rounds(1), e_step="conditional")
