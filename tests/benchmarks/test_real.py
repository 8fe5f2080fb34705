"""The benchmark on real captures: its transform and blind spots, its protocol, its page."""

import json
import math
import statistics

import numpy as np
import pytest
import torch

from benchmarks.real import methods
from benchmarks.real import run as benchmark
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
    few = benchmark.replace(how, kimg=0.016)
    again = [methods.BlindSpot(y[:32], "tiny", 0) for _ in range(2)]
    for method in again:
        method.learn(few)
    assert torch.equal(again[0].restore(y[:1]), again[1].restore(y[:1]))


# -- the protocol ---------------------------------------------------------------------------------


def test_crops_are_parts_of_single_captures_turned_or_mirrored():
    captures = torch.arange(2 * 3 * 16 * 16.0).reshape(2, 3, 16, 16)
    found = benchmark.random_crops(captures, 24, 8, 0)
    assert found.shape == (24, 1, 8, 8)
    assert {int(crop.min()) // 256 for crop in found} == set(range(6))
    ways = set()
    for crop in found[:, 0]:
        values = crop.sort().values
        steps = (float(crop[0, 1] - crop[0, 0]), float(crop[1, 0] - crop[0, 0]))
        ways.add(steps)
        assert {abs(s) for s in steps} == {1.0, 16.0}
        assert float(values.max() - values.min()) == 7 * 16 + 7
    assert len(ways) == 8


def test_every_fourth_field_is_held_out_and_averages_reach_no_learner():
    learn, held = benchmark.split(torch.arange(16))
    assert held.tolist() == [3, 7, 11, 15] and len(learn) == 12
    given = benchmark.Task.__dataclass_fields__
    assert set(given) == {"observed", "y", "noise", "profile", "seed", "run"}


def test_scores_by_an_independent_formula():
    rng = np.random.default_rng(0)
    truth = rng.random((2, 1, 16, 16)).astype(np.float32)
    x = truth + 0.1 * rng.standard_normal(truth.shape).astype(np.float32)
    found = benchmark.scores(torch.from_numpy(x), torch.from_numpy(truth))
    for i in range(2):
        error = (np.clip(x[i], 0, 1) - truth[i]) ** 2
        order = np.sort(truth[i].ravel())
        bright = truth[i] > order[127]  # the lower median of 256 numbers
        assert bright.sum() == 128
        assert found["psnr"][i] == pytest.approx(-10 * np.log10(error.mean()), abs=1e-4)
        assert found["bright"][i] == pytest.approx(-10 * np.log10(error[bright].mean()), abs=1e-4)
    same = benchmark.scores(torch.from_numpy(truth), torch.from_numpy(truth))
    assert same["ssim"] == pytest.approx([1.0, 1.0])


def test_a_filters_strength_is_the_best_on_fields_to_learn_from():
    captures, truth = torch.rand(3, 2, 8, 8), torch.rand(3, 1, 8, 8)
    captures[:2, 0] = 2 * truth[:2, 0]  # of the fields it is chosen on, halving is right
    profile = benchmark.PROFILES["toy"]
    task = benchmark.Task(captures, captures[:, :1], PoissonGaussian(0.1), profile, 0, None)
    halving = benchmark.Filter((0.25, 0.5, 1.0), lambda task, y, strength: strength * y)
    task = benchmark.replace(task, profile=benchmark.replace(profile, tuned=2))
    assert benchmark.choose(halving, task, truth) == 0.5


def test_a_run_is_gone_on_with_and_others_are_not_mixed(tmp_path):
    rows = ("capture", "gaussian", "flowdiff_anscombe")
    options = benchmark.Options(out=tmp_path, profile="toy", rows=rows)
    result = benchmark.measure(options)
    truth, y = benchmark.mean_captures(options)[3:], benchmark.captures(options)[3:, :1]
    assert result["results"]["capture"]["psnr"] == pytest.approx(psnr(y, truth).tolist())
    with np.load(tmp_path / "rows" / "flowdiff_anscombe.npz") as file:
        x = torch.from_numpy(file["flowdiff_anscombe_denoiser"])
    found = result["results"]["flowdiff_anscombe_denoiser"]
    assert found["psnr"] == pytest.approx(psnr(x, truth).tolist())
    assert found["kimg"] == 0.032 and found["seconds"] > 0
    stamps = [file.stat().st_mtime_ns for file in sorted((tmp_path / "rows").iterdir())]
    assert benchmark.measure(options) == result
    assert stamps == [file.stat().st_mtime_ns for file in sorted((tmp_path / "rows").iterdir())]
    assert (tmp_path / "real-toy.png").stat().st_size > 1000
    with pytest.raises(InputError, match="other settings"):
        benchmark.measure(benchmark.Options(out=tmp_path, profile="toy", seed=1))
    with pytest.raises(InputError, match="give --data"):
        benchmark.measure(benchmark.Options(out=tmp_path / "other"))


def test_data_that_are_none_are_refused(tmp_path):
    file = tmp_path / "a.npz"
    np.savez(file, raw=np.zeros((4, 5, 8, 8), np.float32))
    for key, text in (("raw", "8 bits"), ("gt", "cannot read 'gt'")):
        with pytest.raises(InputError, match=text):
            benchmark.eight_bits(benchmark.Options(data=file), key, 4)


# -- the page -------------------------------------------------------------------------------------


def result(**rows):
    found = {key: {"psnr": p, "bright": p, "ssim": [0.9, 0.8]} for key, p in rows.items()}
    found["flowdiff_anscombe"] |= {"seconds": 90.4, "kimg": 7.0, "restoring": 3.21}
    settings = json.loads(json.dumps(benchmark.settings(benchmark.Options())))
    other = {"noise": "poisson,gain=0.01", "held": 4, "learnt": 12}
    return header(settings) | {"results": found} | other


def test_the_table_and_the_finding_are_those_of_the_figures():
    figures = result(capture=[30.0, 33.0], nlm=[34.0, 36.0], flowdiff_anscombe=[36.0, 37.5])
    lines = benchmark.table(figures).splitlines()
    assert lines[2].startswith("| the capture itself | 31.50 | 30.00 | 33.00 | 31.50 | 0.8500 |")
    assert lines[-1].endswith("| 36.75 | 36.00 | 37.50 | 36.75 | 0.8500 |  | 90 | 7 | 3.2 |")
    text = benchmark.finding(figures)
    assert "+1.75 dB" in text and "is met" in text and "BM3D, transform (needs bm3d)." in text
    low = result(nlm=[36.0, 36.5], flowdiff_anscombe=[36.0, 37.0])
    assert "missed by 0.75 dB" in benchmark.finding(low)
    assert benchmark.median(low, "nlm") == statistics.median([36.0, 36.5])


def test_the_page_has_the_table_and_no_picture(tmp_path):
    figures = result(nlm=[34.0, 36.0], flowdiff_anscombe=[36.0, 37.5])
    with pytest.raises(InputError, match="no results of real in"):
        benchmark.SUITE.published(tmp_path)
    text = benchmark.SUITE.render([figures])
    assert benchmark.table(figures) in text and "no picture" in text and "![" not in text
    assert "Abacus, 2 threads, no GPU" in text and "c0ffee" in text


def test_every_result_has_a_label():
    rows = set(benchmark.get_args(benchmark.RowName))
    assert rows <= set(benchmark.LABELS) and set(benchmark.NEEDS) <= rows
    assert rows == {"capture", "noise2void", *benchmark.FILTERS, *benchmark.LEARNED}
