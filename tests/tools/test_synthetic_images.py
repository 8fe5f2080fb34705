"""Images for the generic prior: reproducible, in range, of every kind."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

from synthetic_images import KINDS, image  # noqa: E402


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_depends_on_seed_and_number_alone(channels):
    first = [image(3, number, 16, channels) for number in (0, 5, 7)]
    again = [image(3, number, 16, channels) for number in (7, 5, 0)][::-1]
    for a, b in zip(first, again, strict=True):
        assert a.shape == (16, 16, channels) and 0 <= a.min() and a.max() <= 1
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(image(4, 0, 16, channels), first[0])


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_finite_and_cover_between_0_and_1(kind):
    rng = np.random.default_rng(0)
    for _ in range(5):
        values, cover = KINDS[kind](rng, 32, 3)
        assert values.shape == (32, 32, 3) and cover.shape == (32, 32, 1)
        assert np.isfinite(values).all() and 0 <= cover.min() and cover.max() <= 1


def test_the_script_writes_the_same_images(tmp_path):
    out = tmp_path / "images.npy"
    script = [sys.executable, str(TOOLS / "synthetic_images.py"), "--jobs", "1"]
    subprocess.run([*script, "--count", "3", "--side", "16", "--out", str(out)], check=True)
    found = np.load(out)
    assert found.dtype == np.uint8 and found.shape == (3, 16, 16)
    expected = np.stack([np.round(255 * image(0, i, 16)[..., 0]) for i in range(3)])
    np.testing.assert_array_equal(found, expected)
