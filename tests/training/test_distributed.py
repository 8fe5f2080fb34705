"""Several processes take the steps of one, and a run outlives the loss of any of them."""

import json
import math
import os
import signal
import socket
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import unmurk.training as learning
from tests import programs
from tests.training.test_learn import RECIPE, TINY, Fragile, blobs, weights
from unmurk import rng as seeds
from unmurk.diffusion.prior import nelbo
from unmurk.errors import InputError
from unmurk.interrupts import interruptible
from unmurk.problem import Problem
from unmurk.rng import ShardedGenerator, generator
from unmurk.training import Rounds, Settings, learn
from unmurk.training.distributed import check_batch_divisible
from unmurk.training.losses import levels
from unmurk.training.trainer import Trainer

# ------------------------------------------------------------------ draws


def shares(ranks):
    return [ShardedGenerator.of(generator(0, 1), rank, ranks) for rank in range(ranks)]


def together(parts):
    """Rows 0, R, 2 R, ... of R processes put back into their order."""
    return torch.stack(parts, 1).flatten(0, 1)


DRAWS = {
    "normal": lambda n, g: seeds.normal((n, 3), g, dtype=torch.float64),
    "uniform": lambda n, g: seeds.uniform((n, 3), g),
    "integers": lambda n, g: seeds.integers(1000, (n,), g),
    "permutation": lambda n, g: seeds.permutation((n, 2), g, "cpu"),
    "poisson": lambda n, g: seeds.poisson(torch.full((n, 3), 4.0), g),
    "levels": levels,
}


@pytest.mark.parametrize("name", DRAWS)
def test_every_process_takes_its_rows_of_the_whole_batch(name):
    """Their rows together are the draws of one process; all generators end in the same state."""
    draw, one = DRAWS[name], generator(0, 1)
    expected = draw(12, one)
    for ranks in (2, 3):
        held = shares(ranks)
        assert torch.equal(together([draw(12 // ranks, g) for g in held]), expected)
        assert all(torch.equal(g.get_state(), one.get_state()) for g in held)


def test_the_draws_of_one_process_are_those_of_torch():
    a, b = generator(0, 1), generator(0, 1)
    assert torch.equal(seeds.normal((5, 2), a), torch.randn(5, 2, generator=b))
    assert torch.equal(seeds.uniform((5, 2), a), torch.rand(5, 2, generator=b))
    assert torch.equal(seeds.integers(9, (5,), a), torch.randint(9, (5,), generator=b))
    order = seeds.permutation((5, 2), a, "cpu").flatten()
    assert torch.equal(order, torch.randperm(10, generator=b))


def test_poisson_has_its_mean_and_variance():
    draws = seeds.poisson(torch.full((50, 400), 4.0), generator(0, 2))
    assert abs(draws.mean().item() - 4) < 0.06 and abs(draws.var().item() - 4) < 0.2


def test_the_evidence_bound_does_not_hang_on_the_number_of_processes():
    def denoise(x, sigma):
        return x / (1 + sigma.view(-1, 1, 1, 1) ** 2)

    x = torch.randn(8, 1, 2, 2, generator=generator(0, 3), dtype=torch.float64)
    expected = nelbo(denoise, x, 1e-2, 10.0, generator(0, 1), draws=3)
    parts = [nelbo(denoise, x[g.rank :: 2], 1e-2, 10.0, g, draws=3) for g in shares(2)]
    torch.testing.assert_close(together(parts), expected, rtol=1e-12, atol=0)


class Ready(Exception):
    """Raised in place of training."""


@pytest.mark.parametrize("method", [*learning.METHODS, "diffem"])
def test_the_losses_of_two_processes_have_the_mean_of_one(tmp_path, monkeypatch, method):
    """At every part of the run, whatever the method draws: its losses are means over rows."""
    held = []

    def ready(trainer):
        held.append(trainer)
        raise Ready

    monkeypatch.setattr(Trainer, "run", ready)
    problem = Problem("identity", 0.2)
    options = {"recipe": RECIPE} if method == "flowdiff" else {}
    if method == "diffem":
        method, options = "em", {"e_step": "conditional", "rounds": Rounds(2, 16, steps=2)}
    with pytest.raises(Ready):
        learn(problem.simulate(blobs()), problem, method, out=tmp_path, settings=TINY, **options)
    (trainer,) = held
    learner = trainer.learner
    learner.initialize(trainer.device)
    rows, y = trainer.batches.read(0)
    for progress in (0.0, 0.3, 0.55, 0.97):
        learner.before(trainer, int(progress * trainer.steps), progress)
        whole = learner.losses(y, rows, progress, generator(0, 1))
        parts = [learner.losses(y[g.rank :: 2], rows[g.rank :: 2], progress, g) for g in shares(2)]
        for key, value in whole.items():
            mean = (parts[0][key] + parts[1][key]).item() / 2
            assert abs(mean - value.item()) < 1e-4 * abs(value.item()) + 1e-6, (key, progress)


# ------------------------------------------------------------------ ends


def test_a_batch_is_divided_evenly():
    check_batch_divisible(32, 4)
    with pytest.raises(InputError, match="batch of 32 does not divide among 3"):
        check_batch_divisible(32, 3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_step_in_progress_is_finished(tmp_path, number):
    """Told to end within a step: the step counts, the state is that after it, the rest follows."""
    settings = Settings(kimg=0.4, batch=4, rate=0.1, precision="fp32")
    y = torch.rand(8, 1, generator=generator(0, 4))

    class Told(Fragile):
        def losses(self, *given):
            if self.calls == 6:
                os.kill(os.getpid(), number)
            return super().losses(*given)

    whole, cut, rest = Fragile(set()), Told(set()), Fragile(set())
    for method in (cut, rest):
        method.weight.load_state_dict(whole.weight.state_dict())
        method.ema["w"].load_state_dict(whole.ema["w"].state_dict())
    Trainer(whole, y, settings, tmp_path / "whole", quiet=True).run()
    trainer = Trainer(cut, y, settings, tmp_path / "cut", quiet=True)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert trainer.step == 7
    Trainer(rest, y, settings, tmp_path / "cut", quiet=True).run()
    assert rest.calls == 93
    assert torch.equal(rest.weight.weight, whole.weight.weight)


def test_a_second_interrupt_ends_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still here")
    assert signal.getsignal(signal.SIGINT) == before
    with interruptible() as check:
        check()


# ------------------------------------------------------------------ real processes

RUN = textwrap.dedent(
    """
    import sys, torch
    torch.set_num_threads(1)
    from tests.training.test_learn import RECIPE, TINY, blobs
    from unmurk.errors import InputError
    from unmurk.training import learn
    from unmurk.training.trainer import Trainer
    from unmurk.problem import Problem
    started = Trainer.__init__
    often = {"every": float(sys.argv[2])} if sys.argv[2:] else {}
    Trainer.__init__ = lambda self, *a, **k: started(self, *a, **{**k, **often})
    problem = Problem("identity", 0.2)
    try:
        # a low rate: the optimizer normalizes first gradients that are almost zero, rounding too
        learn(problem.simulate(blobs(size=12)), problem, out=sys.argv[1], recipe=RECIPE,
              start="none", settings=TINY, kimg=0.4, rate=1e-3, quiet=True)
    except InputError as error:
        sys.exit(str(error))
    """
)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A function that starts a run of 50 steps on so many processes, as a launcher would."""
    script = tmp_path_factory.mktemp("script") / "run.py"
    script.write_text(RUN)
    started = []

    def start(out, ranks=1, *seconds):  # between two states
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        if ranks > 1:
            env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, script, out, *seconds]
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            run = programs.Popen(command, env=env | own)
            started.append(run)
        return started[-ranks:]

    yield start
    for run in started:
        run.kill()
        run.wait()
        run.stderr.close()


def finish(runs):
    """Exit codes and what was said."""
    said = [run.communicate()[1] for run in runs]
    return [run.returncode for run in runs], said


@pytest.fixture(scope="module")
def one(start, tmp_path_factory):
    """The folder of a run by one process, from its start to its end."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert finish(start(folder))[0] == [0]
    return folder


def losses(out):
    lines = [json.loads(s) for s in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def close(a, b, tolerance):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert math.isclose(value, other[key], rel_tol=tolerance, abs_tol=1e-4), (key, one)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path, start, one):
    """50 steps of flowdiff through all its parts, and the weights that both end with."""
    assert finish(start(tmp_path / "two", ranks=2))[0] == [0, 0]
    close(losses(one), losses(tmp_path / "two"), 1e-3)
    first, two = weights(one), weights(tmp_path / "two")
    assert all((first[k] - two[k]).abs().max() < 0.01 for k in first)


@pytest.mark.slow
def test_a_lost_process_ends_the_run_and_one_goes_on_with_it(tmp_path, start, one):
    """kill -9 of the second: the first says so in one line; one process ends the run as usual."""
    first, second = start(tmp_path / "cut", 2, 0.1)
    while not (tmp_path / "cut" / "metrics.jsonl").exists() or len(losses(tmp_path / "cut")) < 10:
        assert first.poll() is None
        time.sleep(0.02)
    second.kill()
    codes, (said, _) = finish([first, second])
    assert codes[0] == 1 and "another process of this run has ended" in said
    assert len(said.strip().splitlines()) == 1
    state = torch.load(tmp_path / "cut" / "state" / "latest.pt", weights_only=True)
    assert 10 <= state["step"] < 50
    assert finish(start(tmp_path / "cut"))[0] == [0]
    close(losses(one), losses(tmp_path / "cut"), 1e-3)
