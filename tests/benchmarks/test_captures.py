"""The benchmark on folders of captures: its transform and blind spots, its protocol, its page."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.captures import methods, scores, sets, tables
from benchmarks.captures import run as benchmark
from benchmarks.common import read_tensors
from tests.benchmarks.test_common import header
from unmurk.errors import InputError
from unmurk.evaluation.metrics import psnr
from unmurk.noise import PoissonGaussian
from unmurk.problem import Problem
from unmurk.rng import PerImageGenerator

# -- the transform --------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [PoissonGaussian(0.02, 0.03, 0.05), PoissonGaussian(0.014)])
def test_the_transform_gives_unit_noise_and_its_inverse_is_unbiased(noise):
    change = methods.Anscombe(noise)
    for count in (4.0, 10.0, 40.0):
        c = noise.offset + noise.gain * count
        y = noise.draw(
            torch.full((1, 200_000), c, dtype=torch.float64), PerImageGenerator(0, [int(count)])
        )
        z = change.forward(y)
        assert float(z.std()) == pytest.approx(change.sigma, rel=0.05 if count < 10 else 0.02)
        assert float(change.inverse(z.mean())) == pytest.approx(c, rel=0.01)
    algebraic = (z.mean() * change.maximum / 2) ** 2 - 3 / 8 - (noise.sigma / noise.gain) ** 2
    assert float(algebraic) == pytest.approx(count - 0.25, abs=0.06)


def test_the_transform_by_hand():
    change = methods.Anscombe(PoissonGaussian(0.1, 0.1, 0.2))
    # z = (0.4 - 0.2) / 0.1 = 2, s = 1: f = 2 sqrt(2 + 3/8 + 1); f(1): z = 8
    assert change.maximum == pytest.approx(2 * math.sqrt(9.375))
    assert change.sigma == pytest.approx(1 / (2 * math.sqrt(9.375)))
    assert float(change.forward(torch.tensor(0.4))) == pytest.approx(math.sqrt(3.375 / 9.375))
    d, q = 2 * math.sqrt(3.375), math.sqrt(1.5)
    count = d**2 / 4 + q / (4 * d) - 11 / (8 * d**2) + 5 * q / (8 * d**3) - 1 / 8 - 1
    found = change.inverse(change.forward(torch.tensor(0.4)))
    assert float(found) == pytest.approx(0.2 + 0.1 * count, rel=1e-5)
    assert float(change.inverse(torch.tensor(0.0))) == pytest.approx(0.2, abs=0.02)


# -- blind spots ----------------------------------------------------------------------------------


def test_one_pixel_of_each_square_is_a_neighbour_and_not_itself():
    y = torch.arange(3 * 32 * 40.0).reshape(3, 1, 32, 40)
    hidden, where = methods.hide(y, torch.Generator().manual_seed(0))
    squares = where.unfold(2, 8, 8).unfold(3, 8, 8).flatten(4).sum(4)
    assert (squares == 1).all() and squares.shape == (3, 1, 4, 5)
    assert torch.equal(hidden[~where], y[~where])
    place, source = y[where].long(), hidden[where].long()
    assert torch.equal(place // 1280, source // 1280)  # of the same image
    for width, size in ((40, 32), (1, 40)):
        away = (place % 1280 // width % size) - (source % 1280 // width % size)
        assert int(away.abs().max()) in (4, 5)
    inner = (place % 40 > 5) & (place % 40 < 34) & (place % 1280 // 40 > 5)
    inner &= place % 1280 // 40 < 26
    assert (place != source)[inner].all() and int(inner.sum()) > 10


def test_substitutes_are_even_over_the_neighbours():
    y = torch.arange(61.0 * 61).reshape(1, 1, 61, 61).expand(2000, 1, 61, 61)
    counts = torch.zeros(11, 11)
    hidden, where = methods.hide(y, torch.Generator().manual_seed(1))
    place, source = y[where].long(), hidden[where].long()
    inner = ((place // 61 - 30).abs() < 25) & ((place % 61 - 30).abs() < 25)
    down, across = (source // 61 - place // 61)[inner], (source % 61 - place % 61)[inner]
    counts.index_put_((down + 5, across + 5), torch.ones(len(down)), accumulate=True)
    assert counts[5, 5] == 0
    others = counts.flatten()[torch.arange(121) != 60]
    assert float(others.std() / others.mean()) == pytest.approx(
        float(others.mean()) ** -0.5, rel=0.3
    )


def test_the_loss_is_that_of_the_hidden_pixels():
    y, found = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    where = torch.tensor([[[[True, False], [False, True]]]])
    assert float(methods.score_hidden(found, y, where)) == (1 + 16) / 2


def test_blind_spots_learn_to_take_noise_away():
    ramp = torch.linspace(0, 1, 16).expand(40, 1, 16, 16)
    y = Problem("identity", 0.4).simulate(ramp, 0)
    how = benchmark.Settings("tiny", kimg=0.2, batch=8, precision="fp32")
    method = methods.BlindSpot(y[:32], "tiny", 0)
    assert method.learn(how) > 0
    found = method.restore(y[32:])
    assert float(psnr(found, ramp[32:]).mean()) > float(psnr(y[32:], ramp[32:]).mean()) + 1
    few = replace(how, kimg=0.016)
    again = [methods.BlindSpot(y[:32], "tiny", 0) for _ in range(2)]
    for method in again:
        method.learn(few)
    assert torch.equal(again[0].restore(y[:1]), again[1].restore(y[:1]))


@pytest.mark.parametrize("bf16", [False, True])
def test_blind_spots_are_learned_in_the_precision_that_is_faster(bf16, monkeypatch):
    """The clock goes on with each evaluation, by more in the precision that is slower."""
    clock, inside = [0.0], []
    method = methods.BlindSpot(torch.rand(8, 1, 16, 16), "tiny", 0)
    evaluate = method.net.forward

    def forward(*arguments):
        inside.append(torch.is_autocast_enabled("cpu"))
        clock[0] += 1.0 if inside[-1] == bf16 else 2.0
        return evaluate(*arguments)

    monkeypatch.setattr(method.net, "forward", forward)
    monkeypatch.setattr(methods, "synchronized_time", lambda: clock[0])
    method.learn(benchmark.Settings("tiny", kimg=0.008, batch=8))
    assert inside == [False, False, True, True, bf16]


# -- the protocol ---------------------------------------------------------------------------------


def test_crops_are_parts_of_single_captures_rotated_or_mirrored():
    side = benchmark.SIDE
    captures = [torch.arange(3 * 80 * 96.0).reshape(3, 80, 96), torch.zeros(3, 70, 64) - 1]
    found = benchmark.random_crops(captures, 48, 0)
    assert found.shape == (48, 1, side, side)
    assert (found[1::2] == -1).all()
    steps = set()
    for crop in found[::2, 0]:
        steps.add((float(crop[0, 1] - crop[0, 0]), float(crop[1, 0] - crop[0, 0])))
        assert float(crop.max() - crop.min()) == (side - 1) * 97
    assert len(steps) == 8 and {abs(s) for pair in steps for s in pair} == {1.0, 96.0}
    assert {int(crop.min()) // (80 * 96) for crop in found[::2]} == {0, 1, 2}


def test_the_folds_hold_out_every_field_once():
    held = []
    for fold in range(sets.FOLDS):
        split = sets.load("toy", None, fold)
        assert len(split.observed) == len(split.means) == 6
        assert len(split.held) == len(split.truth) == 2
        held += [float(x.sum()) for x in split.truth]
        for y, x in zip(split.held, split.truth, strict=True):
            assert y.shape == (sets.CAPTURES, *x.shape)
            noise = (y - x).double()
            expected = (0.01 * x.double() + 0.02**2).mean().sqrt()
            assert float(noise.std()) == pytest.approx(float(expected), rel=0.03)
            assert float((noise[0] * noise[1]).mean()) == pytest.approx(0, abs=1e-3)
    assert sorted(held) == sorted(float(x.sum()) for x in sets._smooth())
    assert len(set(held)) == 8


@pytest.mark.parametrize("averaged", [None, 50])
def test_scores_by_an_independent_formula(averaged):
    rng = np.random.default_rng(0)
    truth = rng.random((2, 16, 16)).astype(np.float32)
    x = truth + 0.1 * rng.standard_normal(truth.shape).astype(np.float32)
    half = 0.02 + rng.random(truth.shape).astype(np.float32) / 5
    bars = [scores.Bars(torch.from_numpy(h) / 2, torch.from_numpy(h)) for h in half]
    fields = list(torch.from_numpy(truth))
    split = sets.Split([], [], [], fields, [t / 2 + 0.1 for t in fields], averaged)
    noise = PoissonGaussian(2.0, sigma=0.05, offset=0.3)
    found = scores.scores(list(torch.from_numpy(x)), split, noise, bars)
    keys = scores.scores(fields, split, noise, []).keys()
    assert keys == {"psnr", "published", "bright", "ssim"}
    for i in range(2):
        error = (np.clip(x[i], 0, 1) - truth[i]) ** 2
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(truth[i], 2, "reflect"), (5, 5))
        local = windows.mean((2, 3), dtype=np.float64)
        bright = local > np.sort(local.ravel())[127]  # the lower median of 256 numbers
        assert bright.sum() == 128
        assert found["psnr"][i] == pytest.approx(-10 * np.log10(error.mean()), abs=1e-4)
        assert found["bright"][i] == pytest.approx(-10 * np.log10(error[bright].mean()), abs=1e-4)
        published = truth[i] / 2 + 0.1
        other = (np.clip(x[i], 0, 1) - published) ** 2
        assert found["published"][i] == pytest.approx(-10 * np.log10(other.mean()), abs=1e-4)
        own = 0.0
        if averaged:  # the truth is twice what was published, and its variance four times
            step = (1 / 255) ** 2 / 12
            capture = 2.0 * np.maximum(published - 0.3, 0) + 0.05**2 + step
            own = 4 * (capture / 50 + step)
        std, away = np.sqrt(half[i] ** 2 / 4 + own), np.abs(x[i] - truth[i])
        spread = np.sqrt((std[bright] ** 2).mean() / (away[bright] ** 2).mean())
        assert found["spread"][i] == pytest.approx(spread, rel=1e-5)
        assert found["coverage"][i] == pytest.approx((away <= 2 * std)[bright].mean())


def test_the_bright_part_does_not_select_the_noise_of_the_truth():
    """On a level field with noise, the error of its own level has no bias in the bright part."""
    field = torch.full((256, 256), 0.2)
    field[:, 160:] = 0.25
    truth = field + 0.02 * torch.randn(field.shape, generator=torch.Generator().manual_seed(0))
    bright = scores.bright_part(truth)
    assert float((truth - field)[truth > truth.median()].mean()) > 0.008
    assert abs(float((truth - field)[bright].mean())) < 0.003
    assert bright[:, 164:-4].float().mean() > 0.98


def test_a_mean_of_captures_has_the_noise_that_is_said():
    """Means of eight simulated captures, rounded to gray levels and made half as bright."""
    noise = PoissonGaussian(0.02, sigma=0.05, offset=0.01)
    x = torch.linspace(0.1, 0.6, 6).repeat_interleave(4000).expand(8, 1, 1, -1)
    mean = noise.draw(x, PerImageGenerator(0, range(8))).mean(0)[0]
    published = (mean * 255).round() / 255
    split = sets.Split([], [], [], [published / 2], [published], 8)
    found = scores.truth_variance(split, 0, noise)
    for part, held in zip((published / 2).chunk(6, -1), found.chunk(6, -1), strict=True):
        assert float(held.mean()) == pytest.approx(float(part.var()), rel=0.08)


def test_the_truth_gets_the_brightness_of_the_capture():
    """Gain and offset are found from a noisy capture; the noise does not pull the gain to 0."""
    draw = torch.Generator().manual_seed(0)
    truth = torch.rand(256, 256, generator=draw)
    capture = 0.8 * truth + 0.05 + 0.1 * torch.randn(256, 256, generator=draw)
    found = sets.with_brightness_of(capture, truth)
    torch.testing.assert_close(found, 0.8 * truth + 0.05, atol=4e-3, rtol=0)
    slope, level = np.polyfit(truth.flatten().numpy(), capture.flatten().numpy(), 1)
    torch.testing.assert_close(found, float(slope) * truth + float(level), atol=1e-5, rtol=0)


def test_real_captures_have_their_published_truth_too(tmp_path):
    (tmp_path / "microscopy").mkdir()
    rng = np.random.default_rng(0)
    gt = rng.integers(0, 200, (4, 8, 8), np.uint8)
    raw = np.repeat((gt * 0.5 + 20)[:, None], 5, 1).astype(np.uint8)
    np.savez(tmp_path / "microscopy" / "fmd_confocal_bpae_b.npz", raw=raw, gt=gt)
    split = sets.load("fmd", tmp_path, 1)
    assert len(split.means) == 3
    torch.testing.assert_close(split.published[0] * 255, torch.from_numpy(gt[1]).float())
    torch.testing.assert_close(split.truth[0], split.held[0][0], atol=3e-3, rtol=0)
    for y, x in zip(split.observed, split.means, strict=True):
        torch.testing.assert_close(y[0], x, atol=3e-3, rtol=0)


def test_a_filters_strength_is_the_best_on_fields_to_learn_from(monkeypatch):
    halving = ((0.25, 0.5, 1.0), lambda z, sigma, strength: strength * z)
    monkeypatch.setitem(benchmark.FILTERS, "gaussian_anscombe", halving)
    monkeypatch.setattr(methods.Anscombe, "around", lambda self, do, y: do(y, 0))
    x = [torch.rand(16, 16) / 2 for _ in range(4)]
    y = [2 * image[None] for image in x]
    y[3] = y[3] * 2  # the held-out field asks for a quarter
    split = sets.Split(y[:3], x[:3], y[3:], x[3:], x[3:])
    monkeypatch.setattr(benchmark, "noise_of", lambda split: PoissonGaussian(0.1))
    cell = benchmark.Cell("toy", "gaussian_anscombe", 0)
    found, cost, bars = benchmark.filtered(cell, split)
    assert not bars and cost["strength"] == 0.5 and torch.equal(found[0], y[3][0] / 2)


def test_a_run_goes_on_and_rows_of_other_settings_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(tables.RATES, "flowdiff", 0.004)
    options = benchmark.Options(
        out=tmp_path, sets=("toy",), rows=("capture", "flowdiff"), budgets=(8.0,), folds=(0,)
    )
    result = benchmark.measure(options)
    split = sets.load("toy", None, 0)
    expected = [scores.decibels(y[0], x) for y, x in zip(split.held, split.truth, strict=True)]
    assert result["results"]["toy-capture-0"]["psnr"] == pytest.approx(expected)
    found = result["results"]["toy-flowdiff-0-8min-0"]
    x = sorted(read_tensors(tmp_path / "rows" / "toy-flowdiff-0-8min-0.safetensors").items())
    assert found["psnr"] == pytest.approx(
        [
            scores.decibels(a, b)
            for a, b in zip([v for name, v in x if name.isdecimal()], split.truth, strict=True)
        ]
    )
    assert found["kimg"] == pytest.approx(0.032) and found["seconds"] > 0
    assert len(list((tmp_path / "captures" / "toy-0").iterdir())) == 6 * sets.CAPTURES
    stamps = [file.stat().st_mtime_ns for file in sorted((tmp_path / "rows").iterdir())]
    assert benchmark.measure(options) == result
    assert stamps == [file.stat().st_mtime_ns for file in sorted((tmp_path / "rows").iterdir())]
    assert (tmp_path / "captures-toy.png").stat().st_size > 1000
    with pytest.raises(InputError, match="other settings"):
        benchmark.measure(replace(options, network="small"))


def test_published_figures_are_kept_and_not_made_again(tmp_path):
    options = benchmark.Options(out=tmp_path, sets=("toy",), rows=("capture",), folds=(0, 1))
    figures = result(toy__capture__0=[1.0]) | {"noise": {"toy-capture-0": "poisson"}}
    (tmp_path / "captures.json").write_text(json.dumps(figures))
    found = benchmark.measure(options)
    assert found["results"]["toy-capture-0"]["psnr"] == [1.0]
    assert found["results"]["toy-capture-1"]["psnr"][0] > 5
    assert [file.stem for file in (tmp_path / "rows").glob("*.json")] == ["toy-capture-1"]


def test_clean_images_are_the_truth_of_fields_to_learn_from(tmp_path, monkeypatch):
    given = {}

    class Enough(Exception):
        pass

    def learn(folder, problem, **options):
        given.update(options)
        raise Enough

    monkeypatch.setattr(benchmark, "learn", learn)
    split = sets.load("toy", None, 0)
    with pytest.raises(Enough):
        benchmark.learned(
            benchmark.Cell("toy", "flowdiff_clean", 0, 1.0), split, benchmark.Options(out=tmp_path)
        )
    assert len(given["clean"]) == min(benchmark.TUNED, len(split.means)) and "repeats" not in given
    for one, x in zip(given["clean"], split.means, strict=False):
        assert torch.equal(one, x[None])


def test_captures_of_nuclei_are_not_clipped():
    """At black, noise of gain 0.01 and sigma 0.02 reaches 0 at 3.4 standard deviations only."""
    x = sets.recorded(torch.arange(0.0, 250, 10).repeat(200, 8), 100, 200)
    assert x.min() == pytest.approx(0.15) and x.max() == pytest.approx(0.85)
    assert float(x[0, 15]) == pytest.approx(0.5)  # 150, in the middle between 100 and 200
    y = Problem("identity", sets.CAMERA).simulate(x[None, None], 0)
    black, white = (y[0, 0][x == end] for end in (x.min(), x.max()))
    assert float((black <= 0).float().mean()) < 1e-3 and float((white >= 1).float().mean()) < 0.1
    assert float(black.std()) == pytest.approx((0.01 * 0.15 + 0.02**2) ** 0.5, rel=0.02)


def test_data_that_are_none_are_refused(tmp_path):
    with pytest.raises(InputError, match="give --data"):
        sets.load("fmd", None, 0)
    (tmp_path / "microscopy").mkdir()
    file = tmp_path / "microscopy" / "fmd_confocal_bpae_b.npz"
    np.savez(file, raw=np.zeros((4, 5, 8, 8), np.float32))
    with pytest.raises(InputError, match="8 bits"):
        sets.load("fmd", tmp_path, 0)
    np.savez(file, raw=np.zeros((4, 5, 8, 8), np.uint8))
    with pytest.raises(InputError, match="cannot read 'gt'"):
        sets.load("fmd", tmp_path, 0)


# -- the page -------------------------------------------------------------------------------------


def result(**rows):
    found = {
        key: {"psnr": p, "published": p, "bright": p, "ssim": [0.9, 0.8]}
        for key, p in rows.items()
    }
    found = {key.replace("_min", "min").replace("__", "-"): row for key, row in found.items()}
    settings = json.loads(json.dumps(benchmark.settings(benchmark.Options())))
    return header(settings) | {"results": found, "noise": {}}


def test_a_row_scored_on_the_published_truth_alone_shows_that_score_only():
    figures = result(fmd__bm3d_anscombe__0=[34.0, 36.0], fmd__noise2void__0__2min__0=[31.0, 33.0])
    old = figures["results"]["fmd-noise2void-0-2min-0"]
    figures["results"]["fmd-noise2void-0-2min-0"] = {"published": old["published"]}
    line = tables.table(figures, "fmd").splitlines()[3]
    assert line.startswith("| Noise2Void | 2 | 2 | 1 |  |  |  |  |  | 32.00 |")
    text = tables.finding(figures, "fmd")
    assert "Best of the rows with all fields: BM3D, transform, 35.00 dB." in text
    assert "Noise2Void" not in text


def test_the_table_and_the_finding_are_those_of_the_figures():
    figures = result(
        fmd__bm3d_anscombe__0=[34.0, 36.0],
        fmd__bm3d_anscombe__1=[35.0, 37.0],
        fmd__flowdiff__0__5min__0=[36.0, 37.5],
        fmd__flowdiff__1__5min__0=[36.0, 37.5],
        fmd__flowdiff__0__5min__1=[36.0, 38.5],
        fmd__flowdiff__1__5min__1=[36.0, 38.5],
    )
    bm3d, ours = tables.table(figures, "fmd").splitlines()[2:]
    assert bm3d.startswith("| BM3D, transform |  | 4 | 1 | 35.50 | 34.00 | 37.00 | 35.50 |")
    assert ours.startswith("| `flowdiff`, from nothing | 5 | 4 | 2 | 37.00 ± 0.35 | 36.00 | 38.50")
    text = tables.finding(figures, "fmd")
    assert "+1.50 dB from BM3D, transform in the median of 4 fields; the aim of +0 dB is" in text
    assert "Best of the rows with all fields: `flowdiff`, from nothing, 37.00 dB" in text
    assert "Noise2Void" in text.split("Not run here: ")[1]
    gaps = (
        "After 5 minutes `flowdiff`, from nothing: field by field +1.25 dB from BM3D, transform "
        "on average (standard error 0.32), above it in 4 of 4."
    )
    assert gaps in text  # 2, 1.5, 1 and 0.5 dB: of the first seed
    low = result(fmd__bm3d_anscombe__0=[36.0], fmd__flowdiff__0__15min__0=[36.05])
    assert "missed by 0.15 dB" in tables.finding(low, "fmd")
    part = {
        "fmd__bm3d_anscombe__0": [34.0, 36.0],
        "fmd__bm3d_anscombe__1": [44.0, 45.0],
        "fmd__flowdiff_generic__0__5min__0": [35.0, 37.5],
    }
    text = tables.finding(result(**part), "fmd")
    assert "from `generic`, is +1.25 dB from BM3D, transform in the median of 2 fields" in text
    assert "Best of the rows with all fields: BM3D, transform, 40.00 dB" in text


def test_the_page_has_the_tables_and_the_large_images(tmp_path):
    figures = result(nuclei__capture__0=[30.0, 31.0])
    figures["results"]["large"] = {
        "images": 50,
        "side": 2048,
        "kimg": 1.0,
        "peak_gib": 1.234,
        "seconds": 61.0,
        "said": "50 images",
    }
    with pytest.raises(InputError, match="no results of captures in"):
        benchmark.SUITE.published(tmp_path)
    text = benchmark.SUITE.render([figures])
    assert tables.table(figures, "nuclei") in text and "1.23 GiB" in text
    assert "Abacus, 2 threads, no GPU" in text and "c0ffee" in text


def test_every_row_has_a_label():
    rows = set(benchmark.get_args(benchmark.RowName)) - {"large"}
    assert rows == set(tables.LABELS) and set(benchmark.NEEDS) <= rows
    learned = {row for row in rows if row.startswith("flowdiff")} | {"noise2void"}
    assert set(tables.RATES) == learned
