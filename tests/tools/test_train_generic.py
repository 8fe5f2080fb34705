"""The training of the generic model: its noise, its schedule, and runs that continue."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from unmurk.diffusion import networks
from unmurk.diffusion.networks import Preset
from unmurk.diffusion.prior import Prior
from unmurk.flows.posterior import Posterior
from unmurk.io.weights import digest
from unmurk.problem import Problem
from unmurk.tiling import posterior_for

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import train_generic  # noqa: E402
from train_generic import Generic, SteadyGroup, augmented, error  # noqa: E402

SMALLEST = Preset((8, 8), 1, False, 8, 8, 1, 8)


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Eight images of 24 x 24 pixels, and networks of a few weights."""
    monkeypatch.setitem(networks.PRESETS, "tiny", SMALLEST)
    monkeypatch.chdir(tmp_path)
    values = np.random.default_rng(0).integers(0, 256, (8, 24, 24), np.uint8)
    np.save("images.npy", values)
    return torch.from_numpy(values)[:, None]


def train(monkeypatch, out: str, *more: str) -> None:
    options = ["--side", "16", "--batch", "4", "--precision", "fp32", *more]
    monkeypatch.setattr(sys, "argv", ["train_generic.py", "images.npy", "--out", out, *options])
    train_generic.main()


def test_the_rate_rises_stays_and_falls():
    group = SteadyGroup([], kimg=100, decay=0.25)
    assert group.rate(0.75) == 1 and group.rate(1.0) == 0
    assert abs(group.rate(0.875) - 0.5) < 1e-12 and abs(group.rate(0.001) - 0.5) < 1e-2


def test_the_expected_error_is_that_of_no_filter_at_low_noise_and_bounded_at_high_noise():
    low, high = torch.tensor([1e-5]), torch.tensor([1e5])
    torch.testing.assert_close(error(low), low**2, rtol=1e-3, atol=0)
    torch.testing.assert_close(error(high), torch.tensor([1 / 16]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_crops_are_parts_of_the_images_turned_and_recolored(channels):
    """Every crop is a monotone function of some crop of its image, in one of eight positions."""
    x = torch.rand(6, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    found = augmented(x, 6, torch.Generator().manual_seed(1))
    assert found.shape == (6, channels, 6, 6) and 0 <= found.min() and found.max() <= 1
    for image, crop in zip(x, found, strict=True):
        order = {
            tuple(turned[c].flatten().argsort().tolist())
            for i in range(3)
            for j in range(3)
            for k in range(4)
            for part in [image[:, i : i + 6, j : j + 6].rot90(k, (1, 2))]
            for turned in (part, part.flip(2))
            for c in range(channels)
        }
        for c in range(channels):
            rank = crop[c].flatten().argsort().tolist()
            assert tuple(rank) in order or tuple(rank[::-1]) in order


def test_the_noise_has_the_deviation_that_the_networks_are_told(images):
    """Flat crops: mean and variance of the noise, within 5 standard errors, for all its kinds."""
    learner = Generic().build(images, Problem("identity", 0.05), (1, 16, 16), "tiny")
    x = torch.full((400, 1, 16, 16), 0.5)
    y, deviation = learner.corrupted(x, torch.Generator().manual_seed(0))
    ratio = ((y - x).square().mean((1, 2, 3)) / deviation.square().mean((1, 2, 3))).double()
    gaussian = deviation.flatten(1).std(1) < 1e-6
    assert 0.5 < gaussian.double().mean() < 0.7  # 60 % of the crops
    for part in (ratio[gaussian], ratio[~gaussian]):
        assert abs(part.mean() - 1) < 5 * part.std() / len(part) ** 0.5 + 0.01
    level = deviation.square().mean((1, 2, 3)).sqrt().log()
    low, high = np.log(0.005), np.log(0.7)
    assert low < level.min() < low + 0.05 and high - 0.05 < level.max() < high + 0.2
    assert abs(level.mean() - (low + high) / 2) < 0.05  # log-uniform


def test_a_run_that_is_made_longer_equals_one_that_was_not_shorter(images, monkeypatch):
    """20 steps, then on to 30; and a color model that starts from the gray one."""
    train(monkeypatch, "whole", "--kimg", "0.12", "--decay", "0.3")
    train(monkeypatch, "longer", "--kimg", "0.08", "--decay", "0.3")
    short = digest(Prior.load("longer"))
    train(monkeypatch, "longer", "--kimg", "0.12", "--decay", "0.3")
    assert digest(Prior.load("longer")) == digest(Prior.load("whole")) != short
    assert digest(Posterior.load("longer")) == digest(Posterior.load("whole"))
    color = np.random.default_rng(1).integers(0, 256, (8, 24, 24, 3), np.uint8)
    np.save("images.npy", color)
    train(monkeypatch, "color", "--kimg", "0.004", "--rate", "1e-12", "--start", "whole")
    gray = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    found = Prior.load("color").denoise(gray.expand(-1, 3, -1, -1), 0.1)
    expected = Prior.load("whole").denoise(gray, 0.1).expand(-1, 3, -1, -1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_finished_run_stays_as_it_is(images, monkeypatch):
    train(monkeypatch, "run", "--kimg", "0.02")
    before = digest(Prior.load("run")), digest(Posterior.load("run"))
    train(monkeypatch, "run", "--kimg", "0.02")
    assert (digest(Prior.load("run")), digest(Posterior.load("run"))) == before


def test_the_models_serve_any_size_and_learn(images, monkeypatch):
    """Flat images: after 100 steps the noise at 0.2 has lost half of its power."""
    np.save("images.npy", np.full((8, 24, 24), 128, np.uint8))
    train(monkeypatch, "run", "--kimg", "0.4", "--rate", "0.02")
    posterior = Posterior.load("run")
    assert posterior.any_size and Prior.load("run").any_size
    assert posterior.config.many_levels == 1
    clean, problem = torch.full((4, 1, 13, 30), 0.5), Problem("identity", 0.2)
    y = problem.simulate(clean)
    mean, _ = posterior_for(posterior, (1, 13, 30)).mean_std(y, problem, 2)
    assert (mean - clean).square().mean() < 0.5 * (y - clean).square().mean()
