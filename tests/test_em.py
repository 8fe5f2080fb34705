"""Expectation maximisation: a fixed point in closed form, and runs that can be continued."""

import json

import pytest
import torch
from test_learn import TINY, blobs, equal, weights

from unmurk.errors import InputError
from unmurk.learn import Rounds, learn
from unmurk.learn.em import Em
from unmurk.learn.loop import Trainer
from unmurk.learn.replay import Replay
from unmurk.problem import Problem
from unmurk.solve.draws import Draws

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
    method = Em(y, MASKS, (1, 8, 8), rounds=ROUNDS, solver=solver)
    trainer = Trainer(method, y, TINY, tmp_path, quiet=True)
    held = {}
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
    method = Em(y, problem, (1, 8, 8), rounds=rounds, solver=Draws("diffpir", steps=2))
    method.before(Trainer(method, y, TINY, tmp_path, quiet=True), 0, 0.0)
    x, bound = method.buffers["images"].float(), problem.at(range(256), (1, 8, 8))
    chi = bound.residual(x, y).square().sum() / (0.05**2 * bound.measurements(y).sum())
    assert 0.85 < chi < 1.15
    assert torch.equal(method.posterior.start.mean, method.averages["posterior"].start.mean)
    hidden = 1 - bound.mask.expand_as(x)
    assert (x.std(0) * hidden[0]).sum() / hidden[0].sum() > 0.05


def run(folder, problem, solver=None, **changes):
    y = problem.simulate(blobs())
    return learn(
        y, problem, "em", out=folder, rounds=ROUNDS, settings=TINY, solver=solver, quiet=True,
        **changes,
    )  # fmt: skip


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
    with pytest.raises(InputError, match="at least 1"):
        learn(y, MASKS, "em", rounds=Rounds(rounds=0), **kw)
    with pytest.raises(InputError, match="unknown"):
        Draws("nothing")
    assert not (tmp_path / "run").exists()
