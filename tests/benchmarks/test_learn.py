"""The comparison of ways to learn: who sees what, its scores on known laws, and its page."""

import gzip
import json
import math
import sys
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.learn import profiles, scores, sets
from benchmarks.learn import run as benchmark
from tests import programs
from tests.benchmarks.test_common import header
from unmurk.diffusion import networks
from unmurk.diffusion.networks import Preset
from unmurk.errors import InputError
from unmurk.evaluation.distances import sliced_wasserstein
from unmurk.evaluation.metrics import load_digit_classifier
from unmurk.io.images import read_idx

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "learn" / "run.py"
ASSETS = Path(__file__).parents[2] / "unmurk" / "assets"

TOY = profiles.PROFILES["toy"].plans["digits"]
PARTS = (TOY.held, TOY.reference, TOY.samples)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files like the originals: 40 training and 80 test images of each kind."""
    folder = tmp_path_factory.mktemp("data")
    for below in ("mnist", "cifar10", "microscopy"):
        (folder / below).mkdir()
    for ours, original, count in (("train", "train", 40), ("test", "t10k", 80)):
        array = read_idx(ASSETS / "digits" / f"{ours}.idx3-ubyte.gz")[:count]
        head = bytes([0, 0, 8, 3]) + np.array(array.shape, ">u4").tobytes()
        packed = gzip.compress(head + array.tobytes())
        (folder / "mnist" / f"{original}-images-idx3-ubyte.gz").write_bytes(packed)
    with np.load(ASSETS / "nuclei" / "nuclei.npz", allow_pickle=False) as nuclei:
        train, val = nuclei["train"][:40], nuclei["val"][:80]
    np.savez(folder / "microscopy" / "dsb2018_patches64.npz", train=train, val=val)
    colour = [
        np.concatenate([x[:, :32, :32], x[:, 32:, 32:], x[:, :32, 32:]], 3) for x in (train, val)
    ]
    np.savez(folder / "cifar10" / "cifar10_dogs.npz", train_x=colour[0], test_x=colour[1])
    return folder


# ------------------------------------------------------------------ images


@pytest.mark.parametrize("name", sets.SETS)
def test_the_parts_of_the_test_set_share_no_image(name, data):
    images = sets.load(name, data, TOY.train, PARTS)
    parts = (images.train, images.held, images.reference, images.others)
    assert [len(part) for part in parts] == [TOY.train, *PARTS]
    assert {tuple(part.shape[1:]) for part in parts} == {sets.SETS[name].shape}
    assert 0 <= min(p.min() for p in parts) and 0.5 < max(p.max() for p in parts) <= 1
    different = {image.numpy().tobytes() for part in parts for image in part}
    assert len(different) == TOY.train + sum(PARTS)


def test_the_test_images_are_shuffled(data):
    images = sets.load("digits", data, TOY.train, (16, 32, 16))
    raw = torch.tensor(read_idx(ASSETS / "digits" / "test.idx3-ubyte.gz")[:80])
    test = torch.nn.functional.pad(raw[:, None] / 255, (2, 2, 2, 2))
    places = [(test == x).flatten(1).all(1).nonzero().item() for x in images.held]
    assert max(places) > 40 > min(places)  # not the easy first half alone


def test_files_that_do_not_fit_are_told_in_one_line(data, tmp_path):
    with pytest.raises(InputError, match="holds 40 training and 80 test images of digits: 41"):
        sets.load("digits", data, 41, PARTS)
    for name, what in (("digits", "28 x 28 digits"), ("dogs-blur", r"'train_x' \(N, 32, 32, 3\)")):
        with pytest.raises(InputError, match=f"{name} needs .* with .*{what}") as error:
            sets.load(name, tmp_path, 1, PARTS)
        assert "\n" not in str(error.value)
    file = tmp_path / "cifar10" / "cifar10_dogs.npz"
    file.parent.mkdir()
    np.savez(file, train_x=np.zeros((9, 32, 32, 1), np.uint8))
    with pytest.raises(InputError, match=r"got uint8 \(9, 32, 32, 1\)"):
        sets.load("dogs-masks", tmp_path, 1, PARTS)


def test_noise_and_masks_depend_on_the_seed_and_the_image_number_only():
    problem = sets.SETS["digits"].problem
    x = torch.zeros(1003, 1, 4, 4)
    y = sets.measure(problem, x, 5, 20)
    assert abs(y.std().item() / 0.3 - 1) < 0.02
    assert torch.equal(y[1001:], sets.measure(problem, x[:2], 5, 1021))
    assert not torch.equal(y, sets.measure(problem, x, 6, 20))
    masked = sets.measure(sets.SETS["dogs-masks"].problem, torch.ones(30, 3, 32, 32), 0, 0)
    unmasked = masked != 0
    assert abs(unmasked.float().mean().item() - 0.4) < 0.02
    assert not torch.equal(unmasked[0], unmasked[1])  # a mask for each image


# ------------------------------------------------------------------ rows


def test_every_set_has_the_rows_that_its_problem_permits():
    every = set(profiles.ROWS)
    has = {s: {r for r in every if not profiles.absent_reason(r, s)} for s in sets.SETS}
    assert has["digits"] == every
    assert has["dogs-masks"] == has["nuclei"] == every - {"elbo", "mean"}
    assert has["dogs-blur"] == every - {"elbo", "mean", "ambient"}
    reason = profiles.absent_reason("ambient", "dogs-blur")
    assert reason == "cannot learn from blur:gaussian,sigma=1.5"
    for name, profile in product(sets.SETS, ("small", "long")):  # with a budget for each row
        plan, variants = (
            profiles.PROFILES[profile].plans[name],
            {"flowdiff_generic", "flowdiff_clean"},
        )
        assert set(plan.kimg) == has[name] - variants and min(plan.kimg.values()) > 0.5
        assert {plan.budget(row) for row in variants} == {plan.kimg["flowdiff"]}
    # 15 minutes of one thread: two are 1.8 times as fast, with 3.5 ms an image and 14 s in all
    kimg = profiles.PROFILES["long"].plans["digits"].kimg["flowdiff"]
    assert kimg == round((900 / 1.8 - 14) / 3.5, 1)


@pytest.mark.parametrize("name", sets.SETS)
def test_only_the_ceiling_and_the_row_with_a_few_see_clean_images(
    name, data, monkeypatch, tmp_path
):
    how = benchmark.Options(data=data, out=tmp_path, profile="toy", seed=3)
    images = benchmark.images(name, how)
    y = sets.measure(sets.SETS[name].problem, images.train, 3, 0)
    for row in profiles.ROWS:
        if profiles.absent_reason(row, name):
            continue
        given = {}

        def learn(data, problem, method, *, to=given, **options):
            to.update(options, data=data, method=method, problem=problem)

        monkeypatch.setattr(benchmark, "learn", learn)
        benchmark.train(name, row, images, how, tmp_path)
        assert torch.equal(given["data"], images.train if row == "clean" else y)
        few = given.get("clean")
        assert (few is not None) == (row == "flowdiff_clean")
        assert few is None or torch.equal(few, images.train[-50:])
        assert given["problem"] == sets.SETS[name].problem
        flow = dict.fromkeys(("elbo", "mean", "flowdiff_generic", "flowdiff_clean"), "flowdiff")
        known = flow | {"diffem": "em"}
        assert (method := given["method"]) == known.get(row, row)
        assert given.get("e_step") == ("conditional" if row == "diffem" else None)
        assert given.get("objective", "default") == ("elbo" if row == "elbo" else "default")
        assert (given["settings"].kimg, given["settings"].seed) == (0.064, 3)
        bare = replace(TOY.recipe, e_step=1.0, flow=1.0, ambient_target="none")
        recipe = TOY.recipe if method == "flowdiff" else None
        assert given.get("recipe") == {"mean": bare, "elbo": None}.get(row, recipe)
        started = row == "flowdiff_generic"
        assert given["start"] == ("generic" if started else "none")
        rounds = {"em": TOY.rounds, "diffem": replace(TOY.rounds, steps=1)}
        assert given.get("rounds") == rounds.get(row)
        assert ("solver" in given) == (row == "em" and name.startswith("dogs"))


# ------------------------------------------------------------------ scores


class Exact(nn.Module):
    """Posterior and prior of images with p(x | y) = N(1/2, 0.1^2), whatever y."""

    def __init__(self, samples):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.samples, self.autocast = samples, None

    def sample(self, *arguments):
        if isinstance(arguments[0], int):
            self.autocast = torch.is_autocast_enabled("cpu")
            return self.samples
        y, _, n, seed, _ = arguments
        noise = torch.randn(n, *y.shape, generator=torch.Generator().manual_seed(seed))
        return 0.5 + 0.1 * noise

    def mean_std(self, y, problem, n, seed, index, calibrated=True):
        return torch.full_like(y, 0.5), torch.full_like(y, 0.2 if calibrated else 0.1)

    def interval(self, y, problem, level, n, seed, index):
        assert level == 0.9
        return torch.full_like(y, 0.4), torch.full_like(y, 0.6)

    def denoise(self, y, sigma):
        assert sigma == 0.3
        return torch.full_like(y, 0.6)


def test_scores_of_an_exact_posterior():
    """20 dB, spread = error = 0.1, coverage 0.9; a denoiser off by 0.1 has 3.01 dB less; the
    samples know nothing of y, so that their residual is (0.3^2 + 2 0.1^2) / 0.3^2."""
    g = torch.Generator().manual_seed(0)
    held, reference, others = (
        0.5 + 0.1 * torch.randn(n, 1, 32, 32, generator=g) for n in (64, 32, 32)
    )
    images = sets.Images(held, held, reference, others)
    model = Exact(reference)
    how = scores.Scoring(3, 2, 4, True, 0)
    found, singly, pictures = scores.evaluate(model, model, "digits", images, how)
    assert {*singly} == {"posterior_psnr", "ssim", "denoiser_psnr"}
    for key, values in singly.items():
        assert len(values) == 64 and sum(values) / 64 == pytest.approx(found[key], rel=1e-6)
    assert abs(found["posterior_psnr"] - 20) < 0.1
    assert abs(found["denoiser_psnr"] - (20 - 10 * math.log10(2))) < 0.1
    assert abs(found["spread"] / 0.1 - 1) < 0.01
    assert abs(found["error"] / 0.1 - 1) < 0.01
    assert abs(found["coverage"] - 0.9) < 0.005
    assert abs(found["calibrated_spread"] - 0.2) < 1e-6
    assert abs(found["calibrated_coverage"] - math.erf(0.5**0.5)) < 0.005  # of one deviation
    assert abs(found["chi2"] / (0.11 / 0.09) - 1) < 0.02
    assert abs(found["prior_frechet"]) < 1e-6
    assert found["prior_swd"] == 0
    assert 0 < found["posterior_swd"] < 0.01
    assert 0 < found["measurement_swd"] < 0.01  # corrupted again, the samples have the law of y
    assert {key: len(x) for key, x in pictures.items()} == dict.fromkeys(pictures, 6)
    assert model.autocast


def test_the_scale_of_the_scores_and_the_kernel_distance_in_other_words(data):
    images = sets.load("digits", data, TOY.train, (8, 32, 16))
    scale = scores.reference_scores("digits", images, 0)
    y = sets.measure(sets.SETS["digits"].problem, images.held, 0, sets.TEST)
    mse = (y.clamp(0, 1) - images.held).square().flatten(1).mean(1)
    assert abs(scale["noisy"]["posterior_psnr"] - float(-10 * mse.log10().mean())) < 1e-4
    for score in ("prior_frechet", "prior_kid", "prior_swd"):
        assert scale["clean"][score] < scale["noisy"][score]
    net = load_digit_classifier()
    a, b = (net.features(x).double().numpy() for x in (images.reference, images.others))
    kernel = [[(float(u @ v) / 128 + 1) ** 3 for v in (*a, *b)] for u in (*a, *b)]
    n, m = len(a), len(b)
    real = sum(kernel[i][j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    fake = sum(kernel[n + i][n + j] for i in range(m) for j in range(m) if i != j)
    cross = sum(kernel[i][n + j] for i in range(n) for j in range(m)) / (n * m)
    expected = real + fake / (m * (m - 1)) - 2 * cross
    assert abs(scale["clean"]["prior_kid"] - expected) < 1e-9 * real


def test_the_other_problems_are_solved_with_the_prior_given(monkeypatch):
    """A solver that returns 0.6 for images of 0.5 scores 20 dB on each."""
    images = sets.Images(*[torch.full((3, 3, 32, 32), 0.5)] * 4)
    prior, given = nn.Module(), []
    prior.log_levels = torch.zeros(1)

    def solve(y, problem, prior, method, seed, steps):
        given.append((problem.operator.spec, problem.sigma, method, len(y), steps))
        return type("Result", (), {"mean": torch.full_like(y, 0.6)})

    monkeypatch.setattr(scores, "solve", solve)
    found = scores.downstream_psnr(prior, "dogs-blur", images, scores.Scoring(3, 2, 50, False, 0))
    assert all(abs(v - 20) < 1e-4 for values in found.values() for v in values)
    assert {len(values) for values in found.values()} == {2}
    assert [*found] == ["denoise", "deblur", "inpaint", "denoise + deblur"]
    assert [(sigma, *rest) for _, sigma, *rest in given] == [
        (sigma, "red-diff", 2, 50) for sigma in (0.2, 0.05, 0.05, 0.2)
    ]
    assert "size=10" in given[2][0]


# ------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A row of each set, of four methods; distances are those of 2,000 patches, not of 20,000."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "sliced_wasserstein", partial(sliced_wasserstein, patches=2000))
        yield from toy_runs(data, tmp_path_factory)


def toy_runs(data, tmp_path_factory):
    how = benchmark.Options(data=data, out=tmp_path_factory.mktemp("out"), profile="toy")
    rows = {"digits": "mean", "dogs-blur": "em", "dogs-masks": "ambientflow", "nuclei": "flowdiff"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(networks.PRESETS, "tiny", Preset((8, 8), 1, False, 8, 8, 1, 8))
        for name, row in rows.items():
            benchmark.run_row(name, row, how)
        yield replace(how, rows=()), rows


def test_finished_rows_of_all_sets_are_shown_and_not_run_again(runs, monkeypatch):
    how, rows = runs
    monkeypatch.setattr(benchmark.common, "in_new_process", None)
    result = benchmark.measure(how)
    assert json.loads((how.out / "learn-toy.json").read_text()) == json.loads(json.dumps(result))
    assert {name: [*part["rows"]] for name, part in result["sets"].items()} == {
        name: [row] for name, row in rows.items()
    }
    for name, row in rows.items():
        figures = result["sets"][name]["rows"][row]
        for key in ("posterior_psnr", "ssim", "prior_swd", "coverage", "chi2", "measurement_swd"):
            assert math.isfinite(figures[key])
        assert (figures["denoiser_psnr"] is None) == name.startswith("dogs")
        assert all(5 < value < 60 for value in figures["downstream"].values())
        assert figures["hardware"]["threads"] == 1
        assert figures["seconds"] > 0 and figures["peak_memory_mib"] > 100
        assert (how.out / f"learn-toy-{name}.png").read_bytes()[1:4] == b"PNG"
    # the flow never started: its spread is the one it was made with
    assert abs(result["sets"]["digits"]["rows"]["mean"]["spread"] / 0.05 - 1) < 0.03
    assert "ambient" in result["sets"]["dogs-blur"]["absent"]
    with pytest.raises(InputError, match="other settings"):
        benchmark.measure(replace(how, seed=1))


def test_rows_that_are_published_are_kept_and_not_run_again(runs, tmp_path, monkeypatch):
    """Also after a change of options that concern other rows alone; a note stays."""
    how, _ = runs
    monkeypatch.setattr(benchmark.common, "in_new_process", None)
    original, there = benchmark.measure(how) | {"note": "One seed."}, replace(how, out=tmp_path)
    file = tmp_path / "learn-toy.json"
    file.write_text(json.dumps(original))
    toy, plan = profiles.PROFILES["toy"], TOY

    def again(**changes):
        plans = toy.plans | {"digits": replace(plan, **changes)}
        monkeypatch.setitem(profiles.PROFILES, "toy", replace(toy, plans=plans))
        return benchmark.measure(replace(there, rows=("mean",), sets=("digits",)))

    found = again(kimg={"": 0.064, "em": 9.0}, rounds=replace(plan.rounds, images=4))
    assert benchmark.plain(found["sets"]) == benchmark.plain(original["sets"])
    assert found["note"] == "One seed." and [*tmp_path.iterdir()] == [file]  # no picture
    with pytest.raises(InputError, match=r"learn-toy.json: the row mean of digits was made"):
        again(recipe=replace(plan.recipe, alpha=0.7))


def test_a_scoring_that_was_cut_off_goes_on_from_what_was_learnt(runs):
    how, _ = runs
    file = how.out / "rows" / "digits-mean.json"
    row = json.loads(file.read_text())
    file.unlink()
    benchmark.run_row("digits", "mean", how)
    again = json.loads(file.read_text())
    assert again | {"scoring_seconds": 0} == row | {"scoring_seconds": 0}


@pytest.mark.parametrize("profile", ["small", "long"])
def test_published_rows_say_what_they_were_made_with(profile):
    """So that they can be continued; rows of older versions are refused, not mixed with others."""
    how = benchmark.Options(profile=profile)
    result = json.loads((benchmark.common.RESULTS / f"learn-{profile}.json").read_text())
    for name, part in result["sets"].items():
        assert part["settings"] == benchmark.settings(name, how)
        for row, figures in part["rows"].items():
            expected = benchmark.row_settings(name, how, row)
            assert figures["settings"]["options"].keys() == expected["options"].keys()
            assert figures["kimg"] == pytest.approx(figures["settings"]["kimg"], abs=0.05)


@pytest.mark.slow
def test_the_command_runs_a_row_in_a_process_of_its_own(data, tmp_path):
    command = [sys.executable, SCRIPT, "--profile", "toy", "--rows", "mean", "--sets", "digits"]
    command += ["--data", data, "--out", tmp_path]
    done = programs.run(command)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "learn-toy.json").read_text())
    assert done.stdout == benchmark.SUITE.render([result])


@pytest.mark.parametrize("argv", [[], ["--data", "in", "--out", "out"]])
def test_bad_options_are_told_in_one_line(argv, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["learn.py", *argv])
    assert benchmark.SUITE.main(benchmark.Options, benchmark.measure) == 2
    error = capsys.readouterr().err
    assert error.startswith("learn: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ the page


def row(**changes):
    figures = {column.key: 0.5 for column in benchmark.COLUMNS} | {"peak_gpu_memory_mib": None}
    made = {key: header({})[key] for key in ("hardware", "software", "commit")}
    tasks = dict.fromkeys(sets.downstream_tasks("digits"), 20.0)
    how = {"precision": "fp32", "sampling": "fp32", **made, "downstream": tasks}
    return figures | how | changes


def part(name, **rows):
    return {
        "settings": benchmark.settings(name, benchmark.Options(seed=4)),
        "scale": {
            "noisy": {"posterior_psnr": 13.4, "prior_swd": 0.2},
            "clean": {"prior_swd": 0.001},
        },
        "absent": {"elbo": "is not here"},
        "rows": rows,
    }


RESULT = {
    **header({"profile": "small"}),
    "sets": {
        "digits": part(
            "digits",
            em=row(posterior_psnr=22.346, lpips=None, prior_swd=0.02, coverage=0.95),
            flowdiff=row(posterior_psnr=22.0, lpips=None, prior_swd=0.03, coverage=0.84),
            flowdiff_generic=row(posterior_psnr=25.0, lpips=None, prior_swd=0.01, coverage=0.9),
            clean=row(posterior_psnr=30.0, lpips=None, prior_swd=0.0, precision="bf16"),
        ),
        "dogs-blur": part("dogs-blur", clean=row(posterior_kid=None)),
    },
}


def cells(text):
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]


def test_the_table_shows_the_figures():
    found = cells(benchmark.table(RESULT["sets"]["digits"], benchmark.COLUMNS, scale=True))
    assert "GPU memory, MiB" not in found[0] and "LPIPS" not in found[0]  # no row has them
    assert {len(line) for line in found} == {len(benchmark.COLUMNS) - 1}
    assert found[2][:3] == ["em", "22.35", "0.500"]
    assert found[4][0] == "flowdiff --start generic"
    assert found[5][0] == "clean" and found[5][found[0].index("SWD, prior")] == "0.0000"
    assert found[6][:3] == ["*noisy images themselves*", "13.40", ""]
    assert found[7][found[0].index("SWD, prior")] == "0.0010"


def test_the_verdict_is_computed_from_the_figures_without_ceiling_and_start():
    """em: 22.346 dB, SWD 0.02, 0.05 from the level; flowdiff: 22 dB, 1.5 % less, 0.03 and 0.06."""
    verdict = benchmark.verdict(RESULT["sets"]["digits"])
    found = {line[0]: line[1:] for line in cells(verdict["table"])[2:]}
    assert found["posterior mean, dB"] == ["22.00", "22.35", "em", "near the best", "0.35"]
    assert found["SWD, prior"] == ["0.0300", "0.0200", "em", "behind", "0.0100"]
    assert found["90 % coverage"] == ["0.840", "0.950", "em", "near the best", "0.010"]
    assert found["SSIM"][2:] in (["em", "first", ""], ["flowdiff", "first", ""])
    assert "spread" not in found and "LPIPS" not in found
    near, behind = 2, 1
    total = len(found)
    assert total == 15  # ten of eleven columns of quality, coverage, four problems
    counts = {"first": total - near - behind, "level": 0, "near the best": near}
    counts |= {"behind": behind}
    assert verdict["rows"] == 2 and verdict["counts"] == counts
    assert benchmark.verdict(RESULT["sets"]["dogs-blur"]) is None
    text = " ".join(benchmark.SUITE.render([RESULT]).split())
    rows = "among the 2 rows that start from nothing and see no clean image"
    assert f"{rows}: first in {total - 3} of {total}" in text
    assert "within 2% of the best in 2, further behind in 1." in text


def test_a_difference_that_the_images_do_not_resolve_is_level(monkeypatch):
    """Differences of 1, 3, -1, 1: their mean is 1, their deviation sqrt(8/3), its error 0.816."""
    mine, other = [20.0, 21.0, 22.0, 23.0], [21.0, 24.0, 21.0, 24.0]
    assert benchmark.paired(other, mine) == pytest.approx((1.0, (8 / 3) ** 0.5 / 2))

    def verdict(theirs):
        rows = {
            "em": row(posterior_psnr=sum(theirs) / 4)
            | {"of each image": {"posterior_psnr": theirs}},
            "flowdiff": row(posterior_psnr=21.5) | {"of each image": {"posterior_psnr": mine}},
        }
        rows = {k: benchmark.published(v, rows["flowdiff"]) for k, v in rows.items()}
        assert benchmark.published(rows["em"], rows["flowdiff"]) == rows["em"]
        bare = {k: {j: w for j, w in v.items() if j != "of each image"} for k, v in rows.items()}
        assert benchmark.published(bare["em"], bare["flowdiff"]) == bare["em"]  # both are old
        assert "difference" not in benchmark.published(bare["em"], rows["flowdiff"])
        result = {**RESULT, "sets": {"digits": part("digits", **rows)}}
        found = benchmark.verdict(result["sets"]["digits"])
        lines = {line[0]: line[4] for line in cells(found["table"])[2:]}
        return lines["posterior mean, dB"], " ".join(benchmark.SUITE.render([result]).split())

    kind, text = verdict(other)
    assert kind == "level"
    assert (
        "level in 1 (within two standard errors of the paired difference over the images)" in text
    )
    kind, text = verdict([x + 3 for x in mine])  # always three better
    assert kind == "behind" and "level in" not in text


def test_the_page_names_its_conditions_and_shows_what_may_be_shown(tmp_path):
    with pytest.raises(InputError, match="no results of learn in"):
        benchmark.SUITE.published(tmp_path)
    text = " ".join(benchmark.SUITE.render([RESULT]).split())
    for words in (
        "## Profile small",
        "### digits: MNIST",
        "20,000 images to learn from",
        "in fp32, bf16; seed 4",
        "absent: LPIPS. Abacus, 2 threads, no GPU, torch 2.9, commit c0ffee.",
        "absent: KID. Abacus",
        "Not here: `elbo` is not here.",
        "Not run: `noisy`,",
        "denoise: identity, noise 0.2; deblur: blur:gaussian,sigma=1.5,pad=reflect, noise 0.05",
        "learn-small-digits.png)",
        "No picture of dogs-blur here",
    ):
        assert words in text
    assert "learn-small-dogs-blur.png)" not in text
