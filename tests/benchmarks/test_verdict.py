"""A slice of the benchmark of verdicts: right restorations are trusted, wrong ones are not.

The whole table is `python benchmarks/verdict/run.py`. The seeds here are none of those that the
limits were chosen on.
"""

import math

import pytest
import torch

from benchmarks.verdict import run
from benchmarks.verdict.cases import (
    KINDS,
    NOISE,
    RIGHT,
    UNDECIDABLE,
    WRONG,
    Denoised,
    Fitted,
    Textures,
    assets,
    correlated,
)
from unmurk.diffusion.prior import Prior
from unmurk.flows.posterior import Posterior
from unmurk.problem import Problem
from unmurk.rng import generator

TEXTURES = Textures(rounds=100)
SEED = 200


@pytest.mark.parametrize("kind", KINDS)
def test_textures(kind):
    made = TEXTURES.make(kind, TEXTURES.images(48, SEED), SEED)
    verdict = made.verdict()
    assert verdict.trusted == (kind in RIGHT + UNDECIDABLE), verdict.sentence


DIGITS = {
    "right": "",
    "half the noise stated": "noise",
    "twice the noise stated": "noise",
    "correlated noise": "kind",
    "clipped noise": "kind",
    "too smooth": "detail",
    "range too wide, noise right": "range",
}


@pytest.mark.parametrize("kind", DIGITS)
def test_digits(kind):
    made = Denoised("digits", Prior.load("digits")).make(kind, assets("digits", 500, 12), SEED)
    failed = [figure.name for figure in made.verdict().figures if not figure.passed]
    assert (DIGITS[kind] in failed) if kind in WRONG else not failed


def test_the_packaged_posterior_of_digits_is_trusted():
    """A real run, on digits that it has not seen."""
    posterior, x = Posterior.load("digits"), assets("digits", 300, 48)
    problem = Problem("identity", NOISE["digits"])
    made = Denoised("digits", Prior.load("digits"), posterior)
    found = made.make("too short", x, SEED)  # restored by the posterior that is given
    assert found.stated.sigma == problem.sigma and found.verdict().trusted


@pytest.mark.parametrize(
    "kind, rounds, trusted", [("right, blur", 30, True), ("blur too wide", 6, False)]
)
def test_a_gaussian_prior_fitted_to_blurred_digits(kind, rounds, trusted):
    made = Fitted("digits", rounds).make(kind, assets("digits", 700, 48), SEED)
    assert made.verdict().trusted == trusted


def test_the_posterior_of_textures_is_exact():
    """Mean and variance against dense algebra, for one texture and a blur."""
    small = Textures(side=8)
    small.power = small.power[:1]
    spec, s = "blur:gaussian,sigma=1,pad=circular", 0.1
    from benchmarks.verdict.cases import _Mixture

    posterior = _Mixture(small.power, small._response(spec), s)
    eye = torch.eye(64, dtype=torch.float64).view(64, 1, 8, 8)
    a = Problem(spec, s).A(eye).flatten(1).T
    basis = torch.fft.ifft2(small.power[0].sqrt() * torch.fft.fft2(eye[:, 0])).real.flatten(1).T
    covariance = basis @ basis.T
    gain = covariance @ a.T @ torch.linalg.inv(a @ covariance @ a.T + s**2 * torch.eye(64))
    y = small.images(6, 3).double()
    expected = 0.5 + (y.flatten(1) - 0.5) @ gain.T
    assert torch.allclose(posterior.mean(y).flatten(1), expected, atol=1e-6)
    many = y[:1].expand(4000, 1, 8, 8)
    spread = (posterior.draw(many, 0) - posterior.mean(many)).square().mean((0, 1)).flatten()
    exact = (covariance - gain @ a @ covariance).diagonal()
    assert torch.allclose(spread, exact, rtol=0.12)


def test_em_in_closed_form_ends_at_the_spectrum_of_the_images():
    """With the right statement, and with too little noise at the spectrum of noisy images."""
    textures = Textures(side=16)
    spectrum = textures.power + 0.04
    right = textures._learn(spectrum, "identity", 0.2, 20_000)
    large = textures.power > 0.01
    assert torch.allclose(right[large], textures.power[large], rtol=0.02)
    half = textures._learn(spectrum, "identity", 0.1, 2000)
    assert torch.allclose(half, textures.power + 0.03, rtol=0.02)


def test_correlated_noise_has_the_autocorrelation_of_its_window():
    noise = correlated((4, 1, 64, 64), generator(0))
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    assert float((noise[..., 1:] * noise[..., :-1]).mean()) == pytest.approx(0.5, abs=0.03)
    assert float((noise[..., 2:] * noise[..., :-2]).mean()) == pytest.approx(0, abs=0.03)


def test_the_page_counts_right_and_wrong(tmp_path):
    options = run.Options(out=tmp_path, sets=("textures",), seeds=(100,))
    result = run.measure(options)
    view = run.view(result)
    assert view["right"] == "4 of 4" and view["wrong"] == f"0 of {len(WRONG)}"
    assert len(result["rows"]) == len(KINDS) and view["mistaken"] == ""
    page = run.SUITE.render([result])
    assert "half the noise stated" in page and "blur too narrow" in page
    again = run.measure(options)  # from its rows
    assert again["rows"] == result["rows"]
    changed = result["rows"][0] | {"trusted": False, "failed": ["chi2"]}
    other = run.view(result | {"rows": [changed, *result["rows"][1:]]})
    assert other["right"] == "3 of 4" and "chi2" in other["mistaken"]
    assert math.isfinite(result["rows"][0]["psnr"])
