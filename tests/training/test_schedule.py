"""Learning rates (5.8) and EMA weights (5.7), against their closed forms."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from unmurk.training.schedule import LRPhase, ParamGroup
from unmurk.training.trainer import Settings, Trainer


def test_rates_rise_and_fall_as_a_cosine_to_two_percent():
    """At p = 0, 1 %, 2 %, 1/4, 1/2, 3/4, 1 of a phase: the product of ramp and cosine, by hand."""
    group = ParamGroup([], (LRPhase(0.2, 0.7, peak=0.4),))
    cosine = 0.98 * (1 + math.sqrt(0.5)) / 2, 0.98 * (1 - math.sqrt(0.5)) / 2
    by_hand = {0.25: 0.02 + cosine[0], 0.5: 0.51, 0.75: 0.02 + cosine[1], 1.0: 0.02}
    for part, expected in by_hand.items():
        assert group.rate(0.2 + 0.5 * part) == pytest.approx(0.4 * expected, rel=1e-9)
    assert group.rate(0.2) == pytest.approx(0.4 * 0.05, rel=1e-9)
    one = 0.02 + 0.98 * (1 + math.cos(0.01 * math.pi)) / 2
    assert group.rate(0.205) == pytest.approx(0.4 * 0.55 * one, rel=1e-9)
    two = 0.02 + 0.98 * (1 + math.cos(0.02 * math.pi)) / 2
    assert group.rate(0.21) == pytest.approx(0.4 * two, rel=1e-9)
    assert group.rate(0.9) == pytest.approx(0.4 * 0.02, rel=1e-9)


@pytest.mark.parametrize(
    ("step", "half_life"),
    [(30, 0.05 * 32 * 20), (15_000, 20_000.0)],  # 5 % of the images seen; then 20,000
)
def test_ema_weights_follow_their_half_life(step, half_life):
    """From ema = 0 and weights = 1 one step leads to 1 - 2^(-batch / half-life)."""
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    groups = [ParamGroup([weight], (LRPhase(10 / 20_000),))]
    average = torch.zeros(3, dtype=torch.float64)
    run = SimpleNamespace(
        settings=Settings(batch=32, average=20.0),
        learner=SimpleNamespace(groups=groups),
        ema=[[average]],
        step=step,
        steps=20_000,
    )
    Trainer.update_ema(run)
    expected = torch.full_like(average, 1 - 2 ** (-32 / half_life))
    torch.testing.assert_close(average, expected, rtol=1e-9, atol=0)
