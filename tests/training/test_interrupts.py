"""Ctrl-C and SIGTERM end learning within one evaluation, and the run continues bit for bit."""

import importlib
import json
import os
import signal
import threading

import pytest
import torch

from tests.training.test_learn import blobs, equal, weights
from unmurk import gaussian
from unmurk.diffusion.prior import Prior
from unmurk.flows.posterior import Posterior
from unmurk.interrupts import heed_interrupt, interruptible
from unmurk.operators.linalg import conjugate_gradient
from unmurk.problem import Problem
from unmurk.solvers import Draws
from unmurk.training import FlowDiff, Recipe, Rounds, Settings, flowdiff, learn
from unmurk.training.validation import Checks

MASKS = Problem("inpaint:random,keep=0.6", 0.1)
NOISE = Problem("identity", 0.2)
RUN = Settings(kimg=0.04, batch=8, seed=3, precision="fp32")  # 5 steps
SOLVER = Draws("diffpir", steps=2)
RECIPE = Recipe(r2r=0.3, e_step=0.5, flow=0.7, refresh=8.0, buffer=16)
EM = {"method": "em", "rounds": Rounds(rounds=2, images=16, steps=2), "solver": SOLVER}
KINDS = {
    "noise": (NOISE, {"recipe": RECIPE}),
    "masks": (MASKS, {"recipe": RECIPE, "solver": SOLVER}),
    "em": (MASKS, EM),
}
FIT = gaussian.ROUNDS * len(blobs()) // gaussian.CHUNK  # calls of `draw` in the fit
CASES = [  # kind of run, the function before whose call the signal comes, and that call
    ("noise", flowdiff, "linearized_draw", 2),
    ("noise", Checks, "measure", 3),
    ("masks", FlowDiff, "draw_posterior", 2),
    ("em", gaussian.Wiener, "draw", FIT + 1),
]


def nothing(*_, **__):
    """In place of the calibration, which follows training."""


def run(folder, kind):
    """Learn with checks of 4 images, and return what the run has learned and remembers."""
    problem, options = KINDS[kind]
    y = problem.simulate(blobs())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checks, "within", lambda *_: Checks(y, problem, (1, 8, 8), 4))
        patch.setattr(
            importlib.import_module("unmurk.training.learning"), "calibrate_run", nothing
        )
        learn(y, problem, out=folder, settings=RUN, quiet=True, **options)
    held = torch.load(folder / "state/latest.pt", weights_only=True)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    checks = [{k: v for k, v in json.loads(s).items() if "check" in k} for s in lines]
    return weights(folder) | held["buffers"], held["best"]["step"], [c for c in checks if c]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs by kind."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = run(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return of


def signal_at(patch, owner, name, number):
    """Send SIGTERM just before a call of a function; return the evaluations made after it."""
    function, calls, after = getattr(owner, name), [], []

    def called(*args, **kwargs):
        calls.append(0)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **kwargs)

    def counted(network):
        def evaluated(*args, **kwargs):
            found = network(*args, **kwargs)
            if len(calls) >= number:
                after.append(0)
            return found

        return evaluated

    patch.setattr(owner, name, called)
    patch.setattr(Prior, "output", counted(Prior.output))
    patch.setattr(Posterior, "correction", counted(Posterior.correction))
    return after


@pytest.mark.parametrize(("kind", "owner", "name", "number"), CASES)
def test_a_run_stopped_inside_a_part_continues_bit_for_bit(
    tmp_path, monkeypatch, whole, kind, owner, name, number
):
    """No network is evaluated after the signal; weights, buffers and checks are the same."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        after = signal_at(patch, owner, name, number)
        run(tmp_path, kind)
    assert not after
    weights_whole, best, checks = whole(kind)
    found, found_best, found_checks = run(tmp_path, kind)
    assert equal(found, weights_whole) and found_best == best and found_checks == checks
    assert len(checks) == 4


def test_conjugate_gradients_heed_a_signal():
    """A signal in the third product ends the iteration at the next one."""
    products = []

    def apply(x):
        products.append(0)
        if len(products) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return torch.linspace(1, 9, 9) * x

    with pytest.raises(KeyboardInterrupt), interruptible():
        conjugate_gradient(apply, torch.ones(1, 9))
    assert len(products) == 3
    heed_interrupt()


def test_a_signal_that_nothing_heeds_is_not_lost():
    reached = []
    with pytest.raises(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
        other = threading.Thread(target=lambda: (heed_interrupt(), reached.append("thread")))
        other.start()
        other.join()
        reached.append("end")
    assert reached == ["thread", "end"]


def test_what_follows_an_interrupt_is_not_interrupted_again():
    """The models so far can be evaluated while the run ends; a second Ctrl-C still ends it."""
    reached = []
    with pytest.raises(KeyboardInterrupt), interruptible() as check:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            heed_interrupt()
        heed_interrupt()
        reached.append("after")
        with pytest.raises(KeyboardInterrupt):
            check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("not here")
    assert reached == ["after"]
    with interruptible() as check:
        check()
