"""The time of a run is estimated before its first step, by every learner."""

import pytest
import torch

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
