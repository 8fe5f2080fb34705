"""What ships in the package works at once, and is what it says."""

from pathlib import Path

import pytest
import torch

import unmurk
from unmurk.evaluation import metrics
from unmurk.tiling import posterior_for

ASSETS = Path(unmurk.__file__).parent / "assets"


def mebibytes(*names):
    files = (f for name in names for f in (ASSETS / name).rglob("*") if f.is_file())
    return sum(f.stat().st_size for f in files) / 2**20


def test_sizes_and_licences():
    assert mebibytes("digits", "nuclei") <= 5
    for name in ("digits-model", "nuclei-model", "generic-model"):
        assert mebibytes(name) <= 8
    for name, words in [
        ("digits", "Attribution-Share Alike 3.0"),
        ("nuclei", "CC0"),
        ("digits-model", "MIT"),
        ("nuclei-model", "MIT"),
        ("generic-model", "MIT"),
    ]:
        assert words in (ASSETS / name / "README.md").read_text()


def test_no_folder_of_the_machine_that_made_them_is_named():
    files = [file for kind in ("json", "md") for file in ASSETS.rglob(f"*.{kind}")]
    assert len(files) > 12
    for file in files:
        text = file.read_text()
        assert "_name_or_path" not in text and "/work/" not in text and "/home/" not in text, file


@pytest.fixture(scope="module")
def digits():
    truth = unmurk.load_images(ASSETS / "digits" / "test.idx3-ubyte.gz", limit=24).images
    problem = unmurk.Problem("identity", 0.3)
    return truth, problem, problem.simulate(truth, seed=5)


def test_the_packaged_posterior_restores(digits):
    """Far above the noisy digits on average, with an error of the size it states."""
    truth, problem, y = digits
    mean, std = unmurk.Posterior.load("digits").mean_std(y, problem)
    gain = metrics.psnr(mean, truth).mean() - metrics.psnr(y, truth).mean()
    assert gain > 9.5
    error = (mean - truth).square().mean().sqrt()
    assert 0.4 < std.square().mean().sqrt() / error < 1.5


def test_the_packaged_prior_denoises_and_draws(digits):
    truth, problem, y = digits
    prior = unmurk.Prior.load("digits")
    with torch.no_grad():
        denoised = prior.denoise(y, problem.sigma)
    assert metrics.psnr(denoised, truth).mean() - metrics.psnr(y, truth).mean() > 9
    drawn = prior.sample(16, steps=18)
    # digits are mostly black, with strokes near white
    assert (drawn < 0.2).float().mean() > 0.6 and drawn.flatten(1).max(1).values.min() > 0.6


def test_the_packaged_nuclei_are_restored_with_calibrated_error_bars():
    """Held-out images, by the posterior and the prior; the model is one of crops: any size."""
    truth = unmurk.load_images("nuclei:val", limit=12).images
    problem = unmurk.Problem("identity", 0.2)
    y = problem.simulate(truth, seed=5)
    posterior, prior = unmurk.Posterior.load("nuclei"), unmurk.Prior.load("nuclei")
    mean, std = posterior.mean_std(y, problem)
    with torch.no_grad():
        denoised = prior.denoise(y, 0.2)
    for found in (mean, denoised):
        assert metrics.psnr(found, truth).mean() - metrics.psnr(y, truth).mean() > 14
    assert posterior.error_bars is not None and posterior.error_bars.trusted
    error = (mean - truth).square().mean().sqrt()
    assert 0.75 < std.square().mean().sqrt() / error < 1.33
    wide = torch.cat([y[0], y[1]], 2)[None, :, :, :100]
    tiled = posterior_for(posterior, (1, 64, 100))
    assert tiled.mean_std(wide, problem, 2)[0].shape == (1, 1, 64, 100)


@pytest.mark.slow
def test_the_packaged_prior_solves_a_problem_it_never_met(digits):
    """A blur undone by red-diff: at least 3 dB above the pseudo-inverse."""
    truth, prior = digits[0][:8], unmurk.Prior.load("digits")
    problem = unmurk.Problem("blur:gaussian,sigma=1.5", 0.05)
    y = problem.simulate(truth, seed=6)
    x = unmurk.solve(y, problem, prior, method="red-diff").mean
    gain = metrics.psnr(x, truth).mean() - metrics.psnr(problem.A_dagger(y), truth).mean()
    assert gain > 3
