"""The ablation of RED-diff: what is run, once; its tables against sums."""

import json
from collections import Counter

import pytest

from benchmarks.ablation import run as benchmark
from tests.benchmarks.test_common import header
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.evaluation.metrics import psnr
from unmurk.problem import Problem
from unmurk.solvers import configure, solve


def test_every_value_is_a_solver_and_what_studies_share_is_run_once():
    every = list(benchmark.runs(benchmark.PROFILES["small"]))
    for _, _, run in every:
        options = dict(run.options)
        assert configure(options.pop("method"), options)
    count = Counter(run for _, _, run in every)
    for operator, noise in benchmark.TASKS:
        for studies, extra in (
            (("weight", "lam", "lr", "order", "optimizer"), {"preset": "paper", "steps": 500}),
            (("steps", "momentum", "pairs", "relax", "final"), {}),
        ):
            base = {
                run
                for study, value, run in every
                if study in studies
                and value == benchmark.STUDIES[study].base
                and (run.operator, run.noise) == (operator, noise)
            }
            assert len(base) == 1
            only = base.pop()
            assert count[only] >= 5
            assert extra.items() <= dict(only.options).items()
    assert len({run.file for _, _, run in every}) == len(count)


def test_a_row_is_what_solving_by_hand_gives(tmp_path):
    options = benchmark.Options(out=tmp_path, profile="toy", jobs=1)
    study, value, run = next(
        entry for entry in benchmark.runs(benchmark.PROFILES["toy"]) if entry[1] == "sqrt"
    )
    assert study == "weight" and dict(run.options)["weight"] == "sqrt"
    row = benchmark.do(run, options)
    file = tmp_path / "rows" / f"{run.file}.json"
    stamp = file.stat().st_mtime_ns
    truth = benchmark.images("digits", "test")[:2]
    problem = Problem("inpaint:box,size=10", 0.05)
    how = {"preset": "paper", "steps": 5, "lr": 0.25, "lam": 1.0, "weight": "sqrt"}
    result = solve(problem.simulate(truth, 0), problem, Prior.load("digits"), **how)
    assert row["psnr"] == pytest.approx(float(psnr(result.mean, truth).mean()), abs=1e-3)
    assert row["evaluations"] == 5
    assert benchmark.do(run, options) == json.loads(json.dumps(row))
    assert file.stat().st_mtime_ns == stamp  # finished rows are not made again
    with pytest.raises(InputError, match="made with other settings"):
        benchmark.do(run, benchmark.Options(out=tmp_path, profile="toy", seed=1))


def row(study, value, number, psnr, error=None):
    operator, noise = benchmark.TASKS[number]
    how = {"study": study, "value": value, "operator": operator, "noise": noise, "error": error}
    scores = {"psnr": psnr, "ssim": 0.5, "accuracy": 1.0, "chi2": 1.0 + number}
    return how if error else how | scores | {"evaluations": 50}


ROWS = [
    row("order", "descending", 0, 20.0),
    row("order", "descending", 1, 22.0),
    row("order", "ascending", 0, 25.0),
    row("order", "ascending", 1, 18.0),
    row("order", "random", 0, 24.0),
    row("order", "random", 1, 0.0, error="diverged"),
]


def test_tables_are_means_and_what_fails_has_none():
    lines = benchmark.table(ROWS, "order").splitlines()
    assert lines[2] == "| **descending** | 20.00 | 22.00 | 21.00 | 0.500 | 1.00 | 2.00 | 50 |"
    assert lines[4] == "| random | 24.00 | failed |  |  |  | 1.00 | 50 |"
    assert benchmark.finding(ROWS, "order") == "Best: ascending, 0.50 dB above descending."
    assert benchmark.finding(ROWS[:2] + [row("order", "ascending", 0, 20.5)], "order") == (
        "Best: descending, by 0.50 dB."
    )


def test_what_is_missing_is_one_line(tmp_path):
    with pytest.raises(InputError, match="give --out OUT, or --table"):
        benchmark.measure(benchmark.Options())
    with pytest.raises(InputError, match="no results of ablation in"):
        benchmark.SUITE.published(tmp_path)


def test_the_page_shows_every_study(tmp_path):
    every = benchmark.runs(benchmark.PROFILES["small"])
    number = {operator: i for i, (operator, _) in enumerate(benchmark.TASKS)}
    rows = [row(study, value, number[run.operator], 20.0) for study, value, run in every]
    settings = {"profile": "small", "images": 8, "steps": 500}
    benchmark.draw(tmp_path / "ablation-small.png", rows)
    assert (tmp_path / "ablation-small.png").read_bytes()[1:4] == b"PNG"
    text = benchmark.SUITE.render([header(settings) | {"rows": rows}])
    assert "8 digits; the released algorithm with 500 levels" in text
    assert "Abacus, 2 threads, no GPU" in text and "c0ffee" in text
    for study in benchmark.STUDIES:
        assert benchmark.table(rows, study) in text
