"""Noise that no model fits: a small version of the simulation that set the limits.

Textured images (nuclei) with white noise of every model: no finding. The same images with noise of
each other kind: the finding by name.
"""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import unmurk
from unmurk import noise_checks
from unmurk.io.images import load_images
from unmurk.noise_checks import check_noise, check_residual
from unmurk.problem import Problem

ASSETS = Path(unmurk.__file__).parent / "assets"


@pytest.fixture(scope="module")
def nuclei():
    return load_images(Path(f"{ASSETS}/nuclei/nuclei.npz:train")).images[:40]


def kinds(y):
    return [finding.kind for finding in check_noise(y)]


WHITE = ["0.01", "0.1", "0.3", "poisson,gain=0.0004", "poisson,gain=0.02", "poisson,gain=0.09"]
WHITE += ["poisson-gaussian,gain=0.01,sigma=0.02", "per-channel:0.1"]


@pytest.mark.parametrize("noise", WHITE)
def test_white_noise_raises_no_alarm(nuclei, noise):
    y = Problem("identity", noise).simulate(nuclei, seed=1)
    assert kinds(y) == []
    assert kinds((y * 255).round() / 255) == []  # 8 bits that may leave 0 to 255


def blurred(noise):
    place = torch.arange(-3, 4) / 0.7
    kernel = (-place.square() / 2).exp()
    kernel = (kernel[:, None] * kernel)[None, None]
    noise = F.conv2d(F.pad(noise, (3, 3, 3, 3), mode="circular"), kernel)
    return noise / noise.std()


def jpeg(y):
    found = []
    for image in y:
        stream = io.BytesIO()
        pixels = (image[0].clamp(0, 1) * 255).round().byte().numpy()
        Image.fromarray(pixels).save(stream, "JPEG", quality=75)
        found.append(torch.from_numpy(np.array(Image.open(stream))).float()[None] / 255)
    return torch.stack(found)


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [0.02, 0.1])
def test_each_kind_is_found(nuclei, sigma):
    draw = torch.Generator().manual_seed(2)
    n, other = (torch.randn(nuclei.shape, generator=draw) for _ in range(2))
    y = nuclei + sigma * n
    assert kinds(nuclei + sigma * blurred(n)) == ["correlated"]
    assert kinds(F.interpolate(y, scale_factor=1.3, mode="bilinear")) == ["correlated"]
    rows = torch.randn(40, 1, 64, 1, generator=draw)
    assert kinds(y + sigma / 3 * rows) == ["rows"]
    assert kinds(y + sigma / 3 * rows.mT) == ["columns"]
    assert kinds(jpeg(y))[0] in ("compressed", "clipped")
    assert "clipped" in kinds(y.clamp_min(y.quantile(0.05)))
    assert "clipped" in kinds(y.clamp_max(y.quantile(0.95)))
    magnitude = ((nuclei + 4 * sigma * n).square() + (4 * sigma * other).square()).sqrt()
    if sigma == 0.1:  # a signal-to-noise ratio below 3 everywhere
        assert kinds(magnitude) == ["rician"]


def test_a_finding_says_what_to_do(nuclei):
    n = torch.randn(nuclei.shape, generator=torch.manual_seed(0))
    (finding,) = check_noise(nuclei + 0.1 * blurred(n))
    assert finding.value < finding.limit and "start from raw data" in finding.text
    assert "\n" not in finding.text


def test_too_few_pixels_give_no_verdict(nuclei):
    assert check_noise(nuclei[:1, :, :30, :30]) == []
    assert check_noise(torch.full((2, 1, 64, 64), torch.nan)) == []


def test_of_a_large_image_tiles_are_examined(nuclei, monkeypatch):
    """They lie apart, on the grid of the patches, all over the image; and show what is there."""
    monkeypatch.setattr(noise_checks, "TILE", 64)
    monkeypatch.setattr(noise_checks, "MOST", 2000)
    places = noise_checks._tiles(1, 320, 515)
    tiles = torch.zeros(320, 515)
    for rows, columns in places:
        assert rows.start % 8 == columns.start % 8 == 0
        tiles[rows, columns] += 1
    assert len(places) == 28 and tiles.max() == 1 and tiles.sum() == 28 * 64**2
    assert all(part.sum() for half in tiles.split(160) for part in half.split(103, 1))
    x = nuclei.view(5, 8, 64, 64).transpose(1, 2).reshape(1, 1, 320, 512)
    n = torch.randn(x.shape, generator=torch.manual_seed(0))
    assert kinds(x + 0.1 * n) == []
    assert kinds(x + 0.1 * blurred(n)) == ["correlated"]
    rows = torch.randn(1, 1, 320, 1, generator=torch.manual_seed(1))
    assert kinds(x + 0.1 * n + 0.05 * rows) == ["rows"]
    assert kinds(jpeg(x + 0.1 * n))[0] in ("compressed", "clipped")


def test_residuals_of_a_wrong_restoration_are_seen(nuclei):
    """White residuals pass, at any level and where some are hidden; blurred ones do not."""
    n = torch.randn(nuclei.shape, generator=torch.manual_seed(0))
    level = 0.1 + 0.2 * nuclei
    seen = torch.rand(nuclei.shape, generator=torch.manual_seed(1)) < 0.999
    assert check_residual(level * n, level, seen) == []
    assert [f.kind for f in check_residual(level * blurred(n), level)] == ["correlated"]
    striped = n + torch.randn(40, 1, 64, 1, generator=torch.manual_seed(2)) / 3
    assert [f.kind for f in check_residual(striped)] == ["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["gaussian,sigma={}", "poisson,gain={}"])
def test_false_alarms_are_rare_on_digits(noise):
    """Textured images of 28 x 28: no alarm in 4 draws at levels from 0.01 to 0.3."""
    digits = load_images(ASSETS / "digits" / "train.idx3-ubyte.gz").images
    for seed in range(4):
        level = 0.01 * 30 ** (seed / 3)
        text = noise.format(level if noise.startswith("g") else level**2)
        x = digits[seed * 150 : (seed + 1) * 150]
        assert kinds(Problem("identity", text).simulate(x, seed)) == [], text
