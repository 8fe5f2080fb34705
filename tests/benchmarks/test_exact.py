"""The comparison with exact priors: its rows against solving by hand, its page against figures."""

import pytest
import torch

from benchmarks.exact import run as benchmark
from unmurk.errors import InputError
from unmurk.evaluation.exact import GaussianMixture
from unmurk.problem import Problem
from unmurk.solvers import solve


def test_a_row_is_what_solving_by_hand_gives(monkeypatch):
    monkeypatch.setattr(benchmark, "SOLVERS", (benchmark.PAPER, "red-diff", "ddrm"))
    row = benchmark.run_row(("mixture", "sr:average,factor=4", 0.05), 2)
    prior, problem = GaussianMixture.example((1, 16, 16)), Problem("sr:average,factor=4", 0.05)
    truth = prior.sample(2, seed=1)
    y = problem.simulate(truth, seed=2)

    def decibel(x):
        return -10 * torch.log10(((x - truth) ** 2).mean((1, 2, 3))).mean().item()

    paper = solve(y, problem, prior, preset="paper", lr=0.1, lam=0.25)
    assert row["psnr"][benchmark.PAPER] == pytest.approx(decibel(paper.mean), abs=1e-3)
    assert row["psnr"]["red-diff"] == pytest.approx(decibel(solve(y, problem, prior).mean))
    assert row["psnr"]["best"] == pytest.approx(decibel(prior.posterior(y, problem).mean))
    assert row["evaluations"] == {benchmark.PAPER: 1000, "red-diff": 100, "ddrm": 20}


def test_the_summary_is_of_means_and_extremes(monkeypatch):
    monkeypatch.setattr(benchmark, "SOLVERS", ("red-diff", "ddnm", "ddrm"))
    rows = [
        {
            "psnr": {"best": 30.0, "red-diff": 29.0, "ddnm": 28.0, "ddrm": None},
            "evaluations": {"red-diff": 100, "ddnm": 100},
        },
        {
            "psnr": {"best": 20.0, "red-diff": 19.5, "ddnm": 19.75, "ddrm": None},
            "evaluations": {"red-diff": 100, "ddnm": 100},
        },
    ]
    _, _, first, second = benchmark.summary(rows).splitlines()
    assert first == "| red-diff | 100 | 2 | 0.75 | 1.00 | 0.00 | 0.00 |"
    assert second == "| ddnm | 100 | 2 | 1.12 | 2.00 | 0.38 | -0.25 |"


def test_red_diff_is_next_to_the_best_and_ahead_of_the_paper_preset():
    """What docs/solvers.md says of these figures."""
    rows = benchmark.SUITE.published()[0]["rows"]
    gains = benchmark.differences(rows, benchmark.PAPER)
    assert sum(gains) / len(gains) > 1.0 and min(gains) > -0.1
    below = [row["psnr"]["best"] - row["psnr"]["red-diff"] for row in rows]
    assert sum(below) / len(below) < 0.2


def test_finished_rows_are_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "SOLVERS", ("ddrm",))
    options, task = benchmark.Options(out=tmp_path, images=1), ("gaussian", "identity", 0.2)
    row = benchmark.do(task, options)
    assert row["prior"] == "gaussian" and set(row["psnr"]) == {"best", "ddrm"}
    (file,) = (tmp_path / "rows").iterdir()
    stamp = file.stat().st_mtime_ns
    assert benchmark.do(task, options) == row and file.stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="other settings"):
        benchmark.do(task, benchmark.Options(out=tmp_path, images=2))
