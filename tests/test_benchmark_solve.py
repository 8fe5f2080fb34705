"""The comparison of solvers: its rows against solving by hand, its tables against sums."""

import json
from pathlib import Path

import pytest
import torch
from scripts import imported

from unmurk.errors import InputError
from unmurk.metrics import psnr
from unmurk.prior import Prior
from unmurk.problem import Problem
from unmurk.solve import solve

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "solve.py"


benchmark = imported("solve")


@pytest.fixture
def out(tmp_path):
    """A folder that holds an untrained prior for the digits."""
    torch.manual_seed(0)
    prior = Prior.create("tiny", (1, 28, 28))
    prior.save(tmp_path / "priors" / "digits-clean" / "prior")
    return tmp_path


def test_a_row_is_what_solving_by_hand_gives(out):
    options = benchmark.Options(out=out, profile="toy", jobs=1)
    task = benchmark.Task("digits", "clean", "inpaint:box,size=10", 0.05, "ddnm")
    benchmark.run_task(task, options)
    row = json.loads((out / "rows" / f"{task.file}.json").read_text())
    truth = benchmark.images("digits", "test")[:2]
    problem = Problem(task.operator, task.noise)
    prior = Prior.load(out / "priors" / "digits-clean" / "prior")
    result = solve(problem.simulate(truth, 0), problem, prior, "ddnm")
    assert row["psnr"] == pytest.approx(float(psnr(result.mean, truth).mean()), abs=1e-3)
    assert row["evaluations"] == result.nfe and row["error"] is None
    assert row["accuracy"] in (0.0, 0.5, 1.0) and row["memory_mib"] >= 0
    # finished rows are not made again, however they were made
    before = (out / "rows" / f"{task.file}.json").stat().st_mtime_ns
    assert benchmark.run_task(task, options) == ""
    assert (out / "rows" / f"{task.file}.json").stat().st_mtime_ns == before


def test_the_paper_preset_has_the_settings_released_for_the_task():
    def options(operator, noise):
        return benchmark.chosen(
            benchmark.Task("digits", "clean", operator, noise, benchmark.PAPER)
        )

    assert (
        options("sr:average,factor=4", 0.05)["lr"],
        options("sr:average,factor=4", 0.05)["lam"],
    ) == (0.1, 0.25)
    assert options("inpaint:box,size=10", 0.05)["lam"] == 1.0
    assert options("inpaint:box,size=10", 0.01)["lam"] == 0.25
    assert options("blur:gaussian,sigma=1.5", 0.01)["lr"] == 0.5


def row(method, prior, operator, value, noise=0.05, error=None):
    return {
        "set": "digits",
        "prior": prior,
        "operator": operator,
        "noise": noise,
        "method": method,
        "psnr": value,
        "ssim": 0.9,
        "accuracy": 1.0,
        "residual": 1.1,
        "evaluations": 100,
        "seconds_per_evaluation": 0.02,
        "memory_mib": 30.0,
        "error": error,
    }


def test_means_are_over_the_tasks_that_all_solvers_ran():
    rows = [
        row("a", "clean", "identity", 20.0),
        row("a", "flowdiff", "identity", 18.0),
        row("a", "flowdiff", "blur", 90.0),
        row("b", "clean", "identity", 22.0),
        row("b", "flowdiff", "identity", 21.0),
        row("b", "flowdiff", "blur", 0.0, error="cannot"),
    ]
    lines = benchmark.table(rows, "digits").splitlines()
    assert lines[2].startswith("| b | 100 | 22.00 | 21.00 | 0.900 | 1.00 | 1.10 | 20 | 30 |")
    assert lines[3].startswith("| a | 100 | 20.00 | 18.00 |")
    shown = benchmark.details(rows, "digits", "flowdiff").splitlines()
    assert shown[2:] == ["| identity | 0.05 | 18.00 | 21.00 |", "| blur | 0.05 | 90.00 |  |"]


def test_what_is_wrong_is_said():
    with pytest.raises(InputError, match="give --out, or --table"):
        benchmark.compare(benchmark.Options())
    with pytest.raises(InputError, match="method 'magic' is unknown"):
        list(benchmark.tasks(benchmark.Options(methods=("magic",))))


def test_the_pages_in_the_docs_are_those_of_the_figures_kept():
    assert benchmark.PAGE.read_text() == benchmark.page()
    overhead, certify = imported("overhead"), imported("certify")
    assert overhead.PAGE.read_text() == overhead.page()
    figures = json.loads(certify.FIGURES.read_text())
    assert certify.PAGE.read_text() == certify.page(figures)
