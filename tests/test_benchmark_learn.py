"""The comparison of ways to learn: who sees what, its scores on known laws, and its page."""

import gzip
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import imported
from torch import nn

from unmurk.errors import InputError
from unmurk.images import read_idx

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "learn.py"
DIGITS = Path(__file__).parent.parent / "unmurk" / "assets" / "digits"


benchmark = imported("learn")
TOY = benchmark.PROFILES["toy"]


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """Files like MNIST's: 40 training and 80 test digits."""
    folder = tmp_path_factory.mktemp("mnist")
    for ours, original, count in (("train", "train", 40), ("test", "t10k", 80)):
        array = read_idx(DIGITS / f"{ours}.idx3-ubyte.gz")[:count]
        head = bytes([0, 0, 8, 3]) + np.array(array.shape, ">u4").tobytes()
        data = gzip.compress(head + array.tobytes())
        (folder / f"{original}-images-idx3-ubyte.gz").write_bytes(data)
    return folder


# ------------------------------------------------------------------ data


def test_the_parts_of_the_test_set_share_no_digit(mnist):
    digits = benchmark.load(mnist, TOY)
    parts = (digits.train, digits.held, digits.reference, digits.others)
    assert [len(part) for part in parts] == [32, 16, 32, 16]
    assert {tuple(part.shape[1:]) for part in parts} == {(1, 32, 32)}
    different = {image.numpy().tobytes() for part in parts for image in part}
    assert len(different) == 32 + 16 + 32 + 16
    test = benchmark.padded(torch.tensor(read_idx(DIGITS / "test.idx3-ubyte.gz")[:80]))
    places = [(test == x).flatten(1).all(1).nonzero().item() for x in digits.held]
    assert max(places) > 40 > min(places)  # shuffled: not the easy first half alone


def test_too_few_digits_are_refused(mnist):
    with pytest.raises(InputError, match="holds 40 training and 80 test digits: 41 and 64"):
        benchmark.load(mnist, replace(TOY, digits=41))


def test_noise_depends_on_the_seed_and_the_image_number_only():
    x = torch.zeros(1003, 1, 4, 4)
    y = benchmark.measure(x, 5, 20)
    assert abs(y.std().item() / 0.3 - 1) < 0.02
    assert torch.equal(y[1001:], benchmark.measure(x[:2], 5, 1021))
    assert not torch.equal(y, benchmark.measure(x, 6, 20))


@pytest.mark.parametrize("name", benchmark.ROWS)
def test_only_the_ceiling_sees_clean_digits(name, mnist, monkeypatch, tmp_path):
    seen = {}

    def learn(data, problem, method, **options):
        seen.update(options, data=data, method=method)

    monkeypatch.setattr(benchmark, "learn", learn)
    x = benchmark.load(mnist, TOY).train
    benchmark.train(name, x, TOY, 3, tmp_path)
    error = (seen["data"] - x).std().item()
    assert error == 0 if name == "clean" else abs(error / 0.3 - 1) < 0.02
    assert seen["method"] == (name if name in ("noisy", "clean") else "flowdiff")
    assert seen.get("objective", "default") == ("elbo" if name == "elbo" else "default")
    assert seen["settings"] == replace(TOY.settings, seed=3)
    bare = replace(TOY.recipe, polish=1.0, flow=1.0, anchor="none")
    assert seen.get("recipe") == {"mean": bare, "flowdiff": TOY.recipe}.get(name)


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

    def mean_std(self, y, problem, n, seed, index):
        return torch.full_like(y, 0.5), torch.full_like(y, 0.1)

    def denoise(self, y, sigma):
        assert sigma == 0.3
        return torch.full_like(y, 0.6)


@pytest.mark.parametrize("bf16", [False, True])
def test_scores_of_an_exact_posterior(bf16):
    """20 dB, spread = error = 0.1, coverage 0.9; a denoiser off by 0.1 has 3.01 dB less."""
    g = torch.Generator().manual_seed(0)
    held, reference, others = (
        0.5 + 0.1 * torch.randn(n, 1, 32, 32, generator=g) for n in (64, 32, 16)
    )
    digits = benchmark.Digits(held, held, reference, others)
    model = Exact(reference)
    profile = replace(TOY, held=64)
    scores, pictures = benchmark.evaluate(model, model, digits, profile, 0, bf16)
    assert abs(scores["posterior_psnr"] - 20) < 0.1
    assert abs(scores["denoiser_psnr"] - (20 - 10 * math.log10(2))) < 0.1
    assert abs(scores["spread"] / 0.1 - 1) < 0.01
    assert abs(scores["error"] / 0.1 - 1) < 0.01
    assert abs(scores["coverage"] - 0.9) < 0.005
    assert abs(scores["prior_frechet"]) < 1e-6
    assert scores["prior_swd"] == 0
    assert 0 < scores["posterior_swd"] < 0.01
    assert {key: len(x) for key, x in pictures.items()} == dict.fromkeys(pictures, 10)
    assert model.autocast is bf16


def test_scale_of_the_scores(mnist):
    digits = benchmark.load(mnist, TOY)
    scale = benchmark.scale(digits, 0)
    y = benchmark.measure(digits.held, 0, benchmark.TEST)
    mse = (y.clamp(0, 1) - digits.held).square().flatten(1).mean(1)
    assert abs(scale["noisy"]["posterior_psnr"] - float(-10 * mse.log10().mean())) < 1e-4
    for score in ("prior_frechet", "prior_swd"):
        assert 0 < scale["clean"][score] < scale["noisy"][score]


# ------------------------------------------------------------------ runs


def test_a_finished_row_is_not_run_again(mnist, tmp_path, monkeypatch):
    options = benchmark.Options(mnist, tmp_path, "toy", ("mean",))
    benchmark.run_row("mean", options)
    file = tmp_path / "rows" / "mean.json"
    row = json.loads(file.read_text())
    # the flow never started: its spread is the one it was made with
    assert abs(row["spread"] / 0.05 - 1) < 0.02
    assert row["machine"]["threads"] == 1
    assert row["seconds"] > 0 and row["peak_memory_mib"] > 100

    file.unlink()  # as if the scoring had been cut off: the learning is kept, and what it took
    benchmark.run_row("mean", options)
    assert json.loads(file.read_text()) == row

    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", None)
    result = benchmark.compare(options)
    assert json.loads((tmp_path / "learn.json").read_text()) == result
    assert set(result["rows"]) == {"mean"}
    assert result["rows"]["mean"]["posterior_psnr"] == row["posterior_psnr"]
    assert (tmp_path / "learn.png").read_bytes()[1:4] == b"PNG"

    with pytest.raises(InputError, match="other settings"):
        benchmark.compare(replace(options, seed=1))


@pytest.mark.slow
def test_the_command_runs_a_row_in_a_process_of_its_own(mnist, tmp_path):
    command = [sys.executable, SCRIPT, "--profile", "toy", "--rows", "mean"]
    command += ["--mnist", mnist, "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "learn.json").read_text())
    assert done.stdout == benchmark.table(result) + "\n"
    figures = [result["rows"]["mean"][c] for c in benchmark.COLUMNS if "gpu" not in c]
    assert all(math.isfinite(figure) for figure in figures)


@pytest.mark.parametrize("argv", [[], ["--mnist", "in", "--out", "out", "--rows"]])
def test_bad_options_are_told_in_one_line(argv, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["learn.py", *argv])
    assert benchmark.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("learn.py: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ the page


def row(**changes):
    figures = {column: 0.5 for column in benchmark.COLUMNS} | {"peak_gpu_memory_mib": None}
    machine = {"cpu": "Abacus", "threads": 2, "gpu": None, "torch": "2.9", "commit": "c0ffee"}
    how = {"precision": "fp32", "sampling": "fp32", "machine": machine}
    return figures | how | changes


RESULT = {
    "settings": benchmark.settings(benchmark.Options(seed=4)),
    "scale": {
        "noisy": {"posterior_psnr": 13.4, "prior_frechet": 692.0, "prior_swd": 0.2},
        "clean": {"prior_frechet": 1.234, "prior_swd": 0.001},
        "halves": {"clean": 0.25, "noisy": 1.0},
    },
    "rows": {
        "elbo": row(posterior_psnr=22.345, kimg=13.0),
        "clean": row(seconds=61.7, precision="bf16"),
    },
}


def test_the_table_shows_the_figures():
    lines = benchmark.table(RESULT).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert "GPU memory, MiB" not in cells[0]  # no row has it
    assert {len(line) for line in cells} == {14}
    assert cells[2][:3] == ["flowdiff --objective elbo", "22.34", "0.50"]
    assert cells[2][cells[0].index("kimg seen")] == "13"
    assert cells[3][0] == "clean" and cells[3][cells[0].index("seconds")] == "62"
    assert cells[4][:4] == ["*noisy digits themselves*", "13.40", "", "692.00"]
    assert cells[5][:4] == ["*clean digits themselves*", "", "", "1.23"]


def test_the_page_names_its_conditions(tmp_path):
    with pytest.raises(InputError, match="learn-small.json"):
        benchmark.page(tmp_path)
    (tmp_path / "learn-small.json").write_text(json.dumps(RESULT))
    text = benchmark.page(tmp_path)
    assert benchmark.table(RESULT) in text
    small = benchmark.PROFILES["small"]
    for words in (
        "## small",
        f"{small.digits:,} noisy digits",
        f"{small.samples:,} samples",
        "in fp32, bf16; seed 4",
        "at FD 0.25",
        "Abacus, 2 threads, no GPU, torch 2.9, commit c0ffee.",
    ):
        assert words in text


def test_the_page_in_the_docs_is_the_one_of_the_figures_kept():
    assert benchmark.PAGE.read_text() == benchmark.page()
