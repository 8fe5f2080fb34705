"""The kernel distance: against sums written out, and against its expectation."""

import pytest
import torch

from unmurk.errors import InputError
from unmurk.evaluation.distances import kid


def flat(x):
    return x.flatten(1)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def k(u, v):
    return (float(u.flatten().double() @ v.flatten().double()) / u.numel() + 1) ** 3


def test_the_sums_are_those_of_the_definition():
    a, b = uniform(5, 1, 2, 2), uniform(4, 1, 2, 2, seed=1).square()
    first = sum(k(a[i], a[j]) for i in range(5) for j in range(5) if i != j) / 20
    second = sum(k(b[i], b[j]) for i in range(4) for j in range(4) if i != j) / 12
    mixed = sum(k(u, v) for u in a for v in b) / 20
    assert kid(a, b, flat) == pytest.approx(first + second - 2 * mixed, rel=1e-9)
    assert kid(a, b, flat, batch=2) == pytest.approx(kid(a, b, flat), rel=1e-9)
    families = torch.tensor([0, 1, 0, 1])
    across = sum(k(b[i], b[j]) for i, j in ((0, 1), (0, 3), (2, 1), (2, 3))) / 4
    found = kid(a, b, flat, families)
    assert found == pytest.approx(first + across - 2 * mixed, rel=1e-9)


def test_few_images_bias_it_neither_way():
    """6 images of a distribution, each three times, score 0 on average; without families, not."""
    x = uniform(300, 26, 1, 3, 3)
    families = torch.arange(6).repeat(3)
    trials = [(part[6:], part[:6].repeat(3, 1, 1, 1)) for part in x]
    honest = torch.tensor([kid(real, fake, flat, families) for real, fake in trials])
    blind = torch.tensor([kid(real, fake, flat) for real, fake in trials])
    assert abs(honest.mean()) < 3 * honest.std() / 300**0.5
    assert blind.mean() > 10 * blind.std() / 300**0.5


def test_images_are_clipped_and_differences_show():
    a, b = uniform(40, 1, 28, 28), uniform(40, 1, 28, 28, seed=1)
    assert kid(a, b * 3 - 1) == pytest.approx(kid(a, (b * 3 - 1).clamp(0, 1)), rel=1e-9)
    assert abs(kid(a, b)) < 0.1 * kid(a, b / 2)


def test_what_is_wrong_is_said():
    x = uniform(3, 1, 2, 2)
    with pytest.raises(InputError, match="at least 2 fake images"):
        kid(x, x[:1], flat)
    with pytest.raises(InputError, match="family for each of the 3"):
        kid(x, x, flat, torch.zeros(3))
