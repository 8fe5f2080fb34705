"""The time of a run is estimated before its first step, by every learner."""

import time

import pytest
import torch

from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.problem import Problem
from unmurk.training import METHODS, learn, trainer

PROBLEM = Problem("identity", 0.2)


@pytest.mark.parametrize("method", METHODS)
def test_every_learner_can_be_timed_before_its_first_step(method, monkeypatch, tmp_path):
    """Steps of the whole run are timed while no posterior sample has been drawn yet."""
    monkeypatch.setattr(trainer, "WORTH", 1)
    times, estimate = [], trainer.Trainer.expected

    class Timed(Exception):
        pass

    def expected(self):
        times.append(estimate(self))
        raise Timed

    monkeypatch.setattr(trainer.Trainer, "expected", expected)
    y = PROBLEM.simulate(torch.full((32, 1, 8, 8), 0.5))
    with pytest.raises(Timed):
        learn(y, PROBLEM, method, out=tmp_path, kimg=0.2, batch=8, network="tiny")
    assert len(times) == 1 and times[0] > 0


def test_what_is_prepared_once_is_not_multiplied(monkeypatch):
    """Calls of 3, 1, 1 and 5 seconds: the faster of two is 1."""
    clock = iter([0.0, 3.0, 3.0, 4.0, 4.0, 5.0, 5.0, 10.0])
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: next(clock))
    assert [trainer.fastest(lambda: None) for _ in range(2)] == [1.0, 1.0]


def test_a_slow_first_denoising_does_not_count(monkeypatch, tmp_path):
    """The draws of the E-step are many: what their first evaluation prepares must not count."""
    monkeypatch.setattr(trainer, "WORTH", 1)
    denoise, calls, times = Prior.denoise, [], []
    monkeypatch.setattr(trainer.Trainer, "_timed", lambda *_: 0.0)

    def slow(self, *arguments):
        calls.append(1)
        time.sleep(0.5 if len(calls) == 1 else 0.0)
        return denoise(self, *arguments)

    monkeypatch.setattr(Prior, "denoise", slow)
    estimate = trainer.Trainer.expected

    def expected(self):
        times.append(estimate(self))
        raise InputError("enough")

    monkeypatch.setattr(trainer.Trainer, "expected", expected)
    y = PROBLEM.simulate(torch.full((64, 1, 8, 8), 0.5))
    with pytest.raises(InputError, match="enough"):
        learn(y, PROBLEM, "flowdiff", out=tmp_path, kimg=2, batch=8, network="tiny", start="none")
    # 0.5 s a batch of 8 would be 16 evaluations of some hundreds of images: a minute
    assert len(calls) == 2 and times[0] < 30
