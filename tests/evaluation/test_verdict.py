"""The verdict: its figures against closed forms, its limits, its words, and its file."""

import json
import math
import re

import pytest
import torch

from unmurk.errors import InputError
from unmurk.evaluation.predictive import has_unbiased_psnr, measure, unbiased_psnr_of
from unmurk.evaluation.reference import cosine_filter, non_local_means
from unmurk.evaluation.verdict import LIMITS, Verdict, assess, examine, judge
from unmurk.noise import Gaussian, PerChannel
from unmurk.patches import cosines
from unmurk.problem import Problem
from unmurk.rng import generator, normal


class Exact:
    """The exact posterior of a flat image of normal pixels, x ~ N(1/2, tau^2)."""

    def __init__(self, tau, sigma, factor=1.0):
        self.share = tau**2 / (tau**2 + sigma**2)
        self.std = factor * math.sqrt(self.share) * sigma

    def mean_std(self, y, problem, n=16, seed=0, index=None, calibrated=True):
        mean = 0.5 + self.share * (y - 0.5)
        return mean, torch.full_like(mean, self.std)

    def sample(self, y, problem, n, seed, index):
        mean, std = self.mean_std(y, problem)
        return (mean + std * normal(y.shape, generator(seed, sum(index))))[None]


@pytest.fixture(scope="module")
def smooth():
    """Smooth images, so that the noise is seen in flat parts."""
    coarse = torch.rand(24, 1, 5, 5, generator=generator(0))
    return torch.nn.functional.interpolate(coarse, size=(40, 40), mode="bicubic").clamp(0, 1)


def test_a_draw_of_the_true_image_passes_every_figure(smooth):
    """x itself has the law of a draw: the residual is the noise."""
    problem = Problem("identity", 0.1)
    y = problem.simulate(smooth)
    found = measure(y, smooth, problem, unbiased_psnr=60.0)
    noise = (y - smooth) / 0.1
    assert found["chi2"][0] == pytest.approx(float(noise.square().mean()), rel=1e-5)
    assert found["chi2"][1] == pytest.approx(math.sqrt(2 / noise.numel()), rel=0.05)
    assert found["whiteness"][0] < 0.015 and abs(found["detail"][0]) < 4 * found["detail"][1]
    assert found["noise"][0] == pytest.approx(1, abs=0.05)
    assert found["psnr"]["before"] == pytest.approx(20)
    assert found["gain"][0] == pytest.approx(60 - found["psnr"]["reference"])
    assert assess(y, smooth, problem, unbiased_psnr=60.0).trusted


@pytest.mark.parametrize("stated, ratio", [(0.05, 2.0), (0.2, 0.5)])
def test_the_noise_is_found_whatever_was_stated(smooth, stated, ratio):
    y = Problem("identity", 0.1).simulate(smooth)
    found = measure(y, smooth, Problem("identity", stated))
    assert found["noise"][0] == pytest.approx(ratio, rel=0.05)
    assert found["chi2"][0] == pytest.approx(ratio**2, rel=0.05)
    verdict = judge(found)
    assert not verdict.trusted and "--range" in verdict.advice
    assert f"where {stated:g} was stated" in verdict.advice


def test_photon_noise_is_compared_brightness_by_brightness(smooth):
    problem = Problem("identity", "poisson-gaussian,gain=0.02,sigma=0.03")
    y = problem.simulate(smooth)
    found = measure(y, smooth, problem)
    assert found["noise"][0] == pytest.approx(1, abs=0.06)
    assert found["chi2"][0] == pytest.approx(1, abs=0.03)
    half = measure(y, smooth, Problem("identity", "poisson-gaussian,gain=0.005,sigma=0.015"))
    assert half["noise"][0] == pytest.approx(2, rel=0.06)


def test_the_residual_of_an_exact_draw_is_the_noise_and_that_of_the_mean_is_not():
    """Closed form: E r^2 is 1 for draws, sigma^2/(tau^2 + sigma^2) for the mean."""
    tau, sigma = 0.15, 0.1
    problem = Problem("identity", sigma)
    x = 0.5 + tau * normal((64, 1, 32, 32), generator(3))
    y = problem.simulate(x)
    bound = problem.bind(range(64), (1, 32, 32))
    exact = Exact(tau, sigma)
    draw = exact.sample(y, bound, 1, 5, [0])[0]
    assert measure(y, draw, bound)["chi2"][0] == pytest.approx(1, abs=0.02)
    mean = exact.mean_std(y, bound)[0]
    low = sigma**2 / (tau**2 + sigma**2)
    assert measure(y, mean, bound)["chi2"][0] == pytest.approx(low, abs=0.02)
    mse = tau**2 * low
    psnr = unbiased_psnr_of(lambda z: exact.mean_std(z, bound)[0], y, bound)
    assert psnr == pytest.approx(-10 * math.log10(mse), abs=0.1)
    flat = torch.zeros(1, 1, 8, 8)  # an estimate below zero: 0 - 0.1^2 for a map that is constant
    assert math.isnan(unbiased_psnr_of(torch.zeros_like, flat, Problem("identity", 0.1)))
    for other in (Problem("sr:average,factor=2", 0.1), Problem("identity", 0.0)):
        assert not has_unbiased_psnr(other)
        with pytest.raises(InputError, match="needs the identity"):
            unbiased_psnr_of(torch.zeros_like, flat, other)


def test_detail_is_the_correlation_with_what_is_missing():
    """A draw that keeps half of a checkerboard leaves the other half in the residual."""
    sigma, amplitude = 0.1, 0.05
    board = torch.ones(16, 1, 32, 32)
    board[..., ::2, ::2] = board[..., 1::2, 1::2] = -1
    y = Problem("identity", sigma).simulate(0.5 + amplitude * board)
    found = measure(y, 0.5 + amplitude / 2 * board, Problem("identity", sigma))
    left = amplitude / 2 / sigma
    inside = left / math.sqrt(1 + left**2)
    assert found["detail"][0] == pytest.approx(inside, abs=0.02)
    assert found["whiteness"][0] == pytest.approx(left**2 / (1 + left**2), abs=0.02)


def test_masks_count_measured_pixels_only(smooth):
    problem = Problem("inpaint:random,keep=0.5", 0.1)
    y = problem.simulate(smooth)
    bound = problem.bind(range(len(y)), smooth.shape[-3:])
    wrong_where_hidden = torch.where(bound.mask > 0, smooth, 0.3)
    found = measure(y, wrong_where_hidden, bound)
    assert found["chi2"][0] == pytest.approx(1, abs=0.03)
    assert found["values"] == int(bound.mask.sum()) and found["gain"] is None


def test_measurements_that_are_no_images_have_chi2_and_range(smooth):
    problem = Problem("mri:cartesian,acceleration=2,channels=1", 0.1).bind(range(24), (1, 40, 40))
    y = problem.simulate(smooth)
    found = measure(y, smooth, problem)
    assert found["chi2"][0] == pytest.approx(1, abs=0.05)
    assert found["noise"] is None and found["kind"] == ""
    assert judge(found).trusted


def test_examine_draws_and_estimates_by_itself():
    tau, sigma = 0.15, 0.1
    problem = Problem("identity", sigma)
    y = problem.simulate(0.5 + tau * normal((48, 1, 32, 32), generator(3)))
    held = {f.name: f for f in examine(Exact(tau, sigma), y, problem, range(48)).figures}
    assert held["chi2"].passed and held["gain"].passed and held["whiteness"].passed
    assert not held["noise"].passed  # white images look like noise
    wide = {f.name: f for f in examine(Exact(tau, sigma, 3), y, problem, range(48)).figures}
    low = sigma**2 / (tau**2 + sigma**2)
    assert wide["chi2"].value == pytest.approx(low + 9 * (1 - low), abs=0.1)


@pytest.mark.parametrize("name", LIMITS)
def test_each_figure_alone_takes_the_trust_away(name):
    low, high = LIMITS[name]
    good = {"noise": 1.0, "chi2": 1.0, "whiteness": 0.0, "detail": 0.0}
    good |= {"gain": 3.0, "range": 1.0, "black": 0.0}
    base = {"values": 10_000, "level": 0.1, "kind": "", "psnr": {"before": 20.0, "after": 30.0}}
    figures = base | {key: (value, 0.001) for key, value in good.items()}
    assert judge(figures).trusted and judge(figures).advice == ""
    for end, away in ((low, -0.01), (high, 0.01)):
        if not math.isfinite(end) or (name == "whiteness" and away < 0):
            continue
        verdict = judge(figures | {name: (end + away, 0.001)})
        assert not verdict.trusted and verdict.advice
        assert [f.name for f in verdict.figures if not f.passed] == [name]
        assert judge(figures | {name: (end + away, 0.01)}).trusted  # within its error
    wrong = judge(figures | {"kind": "the noise is clipped: record with an offset"})
    assert wrong.sentence == "Not trusted: the noise is clipped."
    assert wrong.advice == "record with an offset"


def test_what_cannot_be_tested_is_not_trusted(smooth):
    tiny = torch.zeros(1, 1, 8, 8)
    assert "too few" in assess(tiny, tiny, Problem("identity", 0.1)).sentence
    none = assess(smooth, smooth, Problem("identity", 0.0))
    assert not none.trusted and "without noise" in none.sentence


def test_a_verdict_is_read_back_and_a_damaged_one_is_refused(smooth, tmp_path):
    y = Problem("identity", 0.1).simulate(smooth)
    verdict = assess(y, smooth, Problem("identity", 0.1), unbiased_psnr=40.0, calibrated=True)
    assert Verdict.load(tmp_path) is None
    verdict.save(tmp_path)
    assert Verdict.load(tmp_path) == verdict
    values = json.loads((tmp_path / "verdict.json").read_text())
    for broken in (
        {"trusted": True},
        values | {"trusted": 1},
        values | {"figures": [{"name": "x"}]},
        values | {"figures": [values["figures"][0] | {"value": "1"}]},
        values | {"figures": [values["figures"][0] | {"limits": [1]}]},
        values | {"figures": 3},
        values | {"advice": None},
    ):
        (tmp_path / "verdict.json").write_text(json.dumps(broken))
        with pytest.raises(InputError, match=r"verdict\.json"):
            Verdict.load(tmp_path)


def test_the_reference_filter_is_the_mean_of_thresholded_windows():
    """Against a loop over all windows."""
    y = 0.5 + 0.2 * normal((1, 1, 11, 10), generator(1), dtype=torch.float64)
    basis = cosines(8).double()
    total, weights = torch.zeros(11, 10).double(), torch.zeros(11, 10).double()
    for top in range(4):
        for left in range(3):
            part = y[0, 0, top : top + 8, left : left + 8].reshape(-1)
            z = basis @ part
            kept = z.abs() > 3 * 0.1
            kept[0] = True
            weight = 1 / int(kept.sum())
            back = (basis.T @ (z * kept)).view(8, 8)
            total[top : top + 8, left : left + 8] += weight * back
            weights[top : top + 8, left : left + 8] += weight
    assert torch.allclose(cosine_filter(y, 0.01)[0, 0], total / weights, atol=1e-12)
    with pytest.raises(InputError, match="7x20 are smaller than a window of 8x8"):
        cosine_filter(torch.zeros(1, 1, 7, 20), 0.01)


def test_strips_of_rows_change_nothing_in_the_reference_filter(monkeypatch):
    y = 0.5 + 0.2 * normal((2, 3, 40, 12), generator(1), dtype=torch.float64)
    level = torch.linspace(0.01, 0.05, 40, dtype=torch.float64)[:, None]
    whole = cosine_filter(y, level)
    monkeypatch.setattr("unmurk.evaluation.reference.STRIP", 5)
    assert torch.allclose(cosine_filter(y, level), whole, atol=1e-12)


def test_non_local_means_of_one_pixel_is_the_weighted_mean():
    """Against the formula, at a pixel whose windows lie inside."""
    sigma, y = 0.2, torch.rand(1, 2, 24, 24, generator=generator(2), dtype=torch.float64)
    total, weights = torch.zeros(2).double(), 0.0
    own = y[0, :, 10:15, 9:14]
    for row in range(6, 19):
        for column in range(5, 18):
            part = y[0, :, row - 2 : row + 3, column - 2 : column + 3]
            distance = max(float((own - part).square().mean()) - 2 * sigma**2, 0.0)
            weight = math.exp(-distance / (0.8 * sigma) ** 2)
            total, weights = total + weight * y[0, :, row, column], weights + weight
    found = non_local_means(y, sigma)[0, :, 12, 11]
    assert torch.allclose(found, total / weights, atol=1e-12)


def test_non_local_means_agree_with_those_of_scikit_image():
    """Away from borders, up to a tenth: its fast mode sums 4 x 4 pixels of a patch of 5 x 5."""
    published = pytest.importorskip("skimage.restoration").denoise_nl_means
    sigma, ramp = 0.1, torch.linspace(0.2, 0.8, 48, dtype=torch.float64).expand(1, 1, 48, 48)
    y = ramp + sigma * normal((1, 1, 48, 48), generator(3), dtype=torch.float64)
    how = {"patch_size": 5, "patch_distance": 6, "fast_mode": True}
    theirs = torch.from_numpy(published(y[0, 0].numpy(), h=0.8 * sigma, sigma=sigma, **how))
    ours, inside = non_local_means(y, sigma)[0, 0], (slice(10, -10), slice(10, -10))
    rms = lambda x: float(x[inside].square().mean().sqrt())  # noqa: E731
    assert rms(ours - theirs) < 0.1 * rms(ours - y[0, 0])


# -- noise per channel, and the two ends of a figure ----------------------------------------------


@pytest.mark.parametrize("channels", [2, 4])
def test_every_channel_is_held_against_its_own_noise(smooth, channels):
    """True images under noise of 0.1 and 0.02 by turns pass; a wrong channel is named."""
    x = smooth[: 4 * channels].view(4, channels, *smooth.shape[2:])
    true = [(0.1, 0.02)[i % 2] for i in range(channels)]
    y = Problem("identity", PerChannel(tuple(map(Gaussian, true)))).simulate(x)

    def stated(noise):
        return assess(y, x, Problem("identity", PerChannel(tuple(map(Gaussian, noise)))))

    assert stated(true).trusted
    wrong = stated([true[0], 0.04, *true[2:]])
    figure = next(figure for figure in wrong.figures if figure.name == "noise")
    assert figure.value == pytest.approx(0.5, rel=0.1)
    assert figure.found.startswith("channel 1 has 0.5")
    assert re.search(r"channel 1 has about 0.02\d* where 0.04 was stated", figure.advice)


def test_a_figure_below_its_limit_means_the_opposite():
    assert "too smooth" in judge({"values": 10_000, "detail": (0.4, 0.0)}).sentence
    text = judge({"values": 10_000, "detail": (-0.4, 0.0)}).sentence
    assert "too smooth" not in text and "have detail that was not measured (-0.40)" in text
