"""The comparison on operators that are not linear: its rows, tables and page."""

import json

import pytest
import torch
from scripts import imported

from unmurk.errors import InputError
from unmurk.prior import Prior
from unmurk.problem import Problem
from unmurk.solve import solve

benchmark = imported("nonlinear")


def test_a_row_is_what_solving_by_hand_gives(tmp_path):
    torch.manual_seed(0)
    prior = Prior.create("tiny", (1, 28, 28)).eval()
    prior.save(tmp_path / "prior")
    options = benchmark.Options(out=tmp_path, profile="toy", prior=str(tmp_path / "prior"), jobs=1)
    task = benchmark.Task("hdr:clip", "diffpir")
    benchmark.run_task(task, options)
    row = json.loads((tmp_path / "rows" / f"{task.file}.json").read_text())
    truth = benchmark.digits(task, options)
    problem = Problem("hdr:clip", 0.05)
    result = solve(problem.simulate(truth, 0), problem, prior, "diffpir")
    wanted = -10 * (result.mean.clamp(0, 1) - truth).square().mean((1, 2, 3)).log10()
    assert row["psnr"] == pytest.approx(wanted.tolist(), abs=2e-3)
    assert row["evaluations"] == result.nfe == 100
    assert benchmark.run_task(task, options) == ""  # a finished row is not made again


def row(method, operator, values, restarts=1):
    return {
        "method": method,
        "operator": operator,
        "restarts": restarts,
        "psnr": values,
        "residual": 1.0,
        "evaluations": 100,
        "seconds": 2.0,
    }


def test_tables_show_medians_and_shares():
    rows = [row("a", benchmark.PHASE, [10, 22, 30, 31]), row("b", benchmark.PHASE, [26, 28], 4)]
    lines = benchmark.retrieval(rows).splitlines()
    assert lines[2] == "| b | 4 | 100 | 27.00 | 1.00 | 1.00 | 2 |"
    assert lines[3] == "| a | 1 | 100 | 26.00 | 0.50 | 1.00 | 2 |"
    rows = [row("a", "jpeg", [20, 22]), row("b", "jpeg", [23]), row("a", "hdr", [30])]
    lines = benchmark.others(rows).splitlines()
    assert lines[0].startswith("| solver | evaluations | jpeg | hdr |")
    assert "| a | 100 | 21.00 | 30.00 | 2 |" in lines and "| b | 100 | 23.00 |  | 2 |" in lines


def test_what_is_wrong_is_said():
    with pytest.raises(InputError, match="give --out, or --table"):
        benchmark.compare(benchmark.Options())
    with pytest.raises(InputError, match="method 'magic' is unknown"):
        list(benchmark.tasks(benchmark.Options(methods=("magic",))))
