"""Calls of the command line in the process of a test."""

import json

import numpy as np
import pytest

from unmurk.cli import main as cli

__all__ = ["capture", "images", "numbers", "unmurk"]


def images(n: int, size: int = 16, seed: int = 0) -> np.ndarray:
    """n random grey images (n, size, size) in [0.2, 0.8], float32."""
    draw = np.random.default_rng(seed).uniform(0.2, 0.8, (n, size, size))
    return draw.astype(np.float32)


def unmurk(*argv: object) -> int:
    return cli.main([str(a) for a in argv])


def capture(size: tuple[int, int], sigma: float, seed: int) -> np.ndarray:
    """A smooth scene of a size, the same for all seeds, with Gaussian noise; float32."""
    ramp = np.linspace(0.3, 0.6, size[1])[None].repeat(size[0], 0)
    return (ramp + sigma * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def numbers(capsys: pytest.CaptureFixture) -> dict:
    return json.loads(capsys.readouterr().out)
