"""The comparison of solvers: its rows against solving by hand, its tables against sums."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.solve import run as benchmark
from benchmarks.solve import scores
from benchmarks.solve import tasks as parts
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.evaluation.distances import kid
from unmurk.evaluation.metrics import psnr, sliced_wasserstein
from unmurk.problem import Problem
from unmurk.solvers import solve

TOY, SMALL = parts.PROFILES["toy"], parts.PROFILES["small"]
BOTH, SETS, PRIORS = ("linear", "nonlinear"), ("digits", "nuclei"), ("clean", "flowdiff")


@pytest.fixture
def out(tmp_path):
    """A folder that holds an untrained prior for the digits."""
    torch.manual_seed(0)
    prior = Prior.create("tiny", (1, 28, 28))
    prior.save(tmp_path / "priors" / "digits-clean" / "prior")
    return tmp_path


def test_scores_of_a_row_are_those_of_solving_by_hand(out):
    options = benchmark.Options(out=out, profile="toy", jobs=1)
    done = [
        benchmark.Task("digits", "clean", operator, 0.05, "ddrm")
        for operator in ("identity", "inpaint:box,size=10")
    ]
    for task in done:
        benchmark.do(task, options)
    truth, other = (parts.images("digits", "test")[part] for part in (slice(2), slice(2, None)))
    prior = Prior.load(out / "priors" / "digits-clean" / "prior")
    by_hand = []
    for task in done:
        problem = Problem(task.operator, task.noise)
        by_hand.append(solve(problem.simulate(truth, 0), problem, prior, "ddrm"))

    result = benchmark.score(options)
    assert json.loads((out / "solve-toy.json").read_text()) == json.loads(json.dumps(result))
    assert (out / "solve-toy-digits.png").read_bytes()[1:4] == b"PNG"
    for row, expected in zip(result["rows"], by_hand, strict=True):
        assert row["psnr"] == pytest.approx(float(psnr(expected.mean, truth).mean()), abs=1e-3)
        assert row["evaluations"] == expected.nfe and row["error"] is None
        assert row["accuracy"] in (0.0, 0.5, 1.0) and row["memory_mib"] >= 0
    first, pool = result["pools"]
    x = torch.cat([expected.mean for expected in by_hand])
    families = torch.tensor([0, 1, 0, 1])
    assert pool["kid"] == pytest.approx(kid(other, x, families=families), abs=1e-4)
    assert pool["swd"] == pytest.approx(sliced_wasserstein(other, x.clamp(0, 1)), abs=1e-5)
    assert (first["method"], pool["method"], pool["frechet"]) == ("truth", "ddrm", None)
    # the same truths restored by several operators are no new images: KID does not count them so
    assert first["kid"] == pytest.approx(kid(other, truth), rel=1e-6)

    # finished rows are not made again, and rows of before have what scores there are now
    file = out / "rows" / f"{done[0].file}.json"
    assert "psnr" not in json.loads(file.read_text())
    before = file.stat().st_mtime_ns
    assert benchmark.do(done[0], options) == json.loads(file.read_text())
    assert file.stat().st_mtime_ns == before


def test_the_paper_preset_has_the_settings_released_for_the_task():
    def options(operator, noise):
        found = parts.solver_options(parts.PAPER, operator, noise)
        return found["lr"], found["lam"], found.get("restarts", 1)

    assert options("sr:average,factor=4", 0.05) == (0.1, 0.25, 1)
    assert options("inpaint:box,size=10", 0.05) == (0.25, 1.0, 1)
    assert options("inpaint:box,size=10", 0.01) == (0.25, 0.25, 1)
    assert options("blur:gaussian,sigma=1.5", 0.01) == (0.5, 0.25, 1)
    assert options("hdr:clip,factor=2", 0.01) == (0.5, 0.25, 1)
    assert options("phase:fourier,oversample=2", 0.01) == (0.5, 0.25, 2)


def test_every_solver_runs_what_it_can_and_the_profile_has_time_for():
    found = list(parts.tasks(SMALL, BOTH, SETS, PRIORS))
    assert len({task.file for task in found}) == len(found)
    assert not any(task.method == "tds" for task in found)
    rare = {(t.set, t.prior) for t in found if t.method == "dps"}
    assert rare == {("digits", "flowdiff")}
    bent = [task for task in found if parts.part_of(task.operator) == "nonlinear"]
    assert {(t.set, t.prior, t.noise) for t in bent} == {("digits", "flowdiff", 0.01)}
    assert {"red-diff", "dps", "daps", "red-diff paper"} <= {task.method for task in bent}
    assert not {"ddrm", "mmps"} & {task.method for task in bent}
    assert len(bent) % len(parts.NONLINEAR) == 0
    assert not list(parts.tasks(SMALL, ("nonlinear",), ("nuclei",), PRIORS))
    only = list(parts.tasks(SMALL, ("linear",), ("nuclei",), ("clean",), ("dps",), (0.2,)))
    assert len(only) == 6  # what is named is run


@pytest.mark.parametrize("operator", parts.NONLINEAR)
def test_starts_of_the_released_kind(operator):
    """What is exact for each: unsaturated pixels; a blob in the middle, whose transform is > 0."""
    problem = Problem(operator, 0.01)
    grid = torch.arange(28.0) - 14
    blob = torch.exp(-(grid[:, None] ** 2 + grid**2) / 8)[None, None]
    x = 0.3 + 0.4 * blob if operator.startswith("hdr") else blob
    y = problem.operator.A(x)
    task = parts.Task("digits", "flowdiff", operator, 0.01, parts.PAPER)
    start = parts.released_start(task, problem, y)
    exact = operator.startswith(("hdr", "phase"))
    torch.testing.assert_close(start, x if exact else y, rtol=0, atol=1e-4)
    assert parts.released_start(replace(task, method="red-diff"), problem, y) is None


def test_up_to_a_turn():
    x = parts.images("digits", "test")[:2]
    found = scores.fidelity("digits", (x + 0.1 * torch.rand_like(x)).flip(-2, -1), "phase:fourier")
    assert found["psnr_turned"] > 18 > 12 > found["psnr"]
    assert scores.fidelity("digits", x, "identity")["psnr_turned"] is None


def row(method, prior, operator, value, noise=0.05, error=None, evaluations=100):
    return {
        "set": "digits",
        "prior": prior,
        "operator": operator,
        "noise": noise,
        "method": method,
        "images": 4,
        "psnr": value,
        "psnr_turned": None,
        "ssim": 0.9,
        "lpips": None,
        "accuracy": 1.0,
        "residual": 1.1,
        "evaluations": evaluations,
        "seconds_per_evaluation": 0.02,
        "memory_mib": 30.0,
        "error": error,
    }


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_means_are_over_the_tasks_that_all_solvers_could_treat():
    rows = [
        row("a", "clean", "identity", 20.0),
        row("a", "flowdiff", "identity", 18.0),
        row("a", "flowdiff", "blur", 90.0),
        row("b", "clean", "identity", 22.0),
        row("b", "flowdiff", "identity", 21.0),
        row("b", "flowdiff", "blur", 0.0, error="cannot"),
        row("c", "flowdiff", "identity", 99.0),  # has not run the other
        row("d", "flowdiff", "identity", 0.0, error="cannot"),  # can do nothing
        row("d", "flowdiff", "blur", 0.0, error="cannot"),
    ]
    where = {"set": "digits", "part": "linear", "noise": 0.05, "prior": "flowdiff"}
    pool = where | {"method": "b", "images": 9, "kid": 0.1, "frechet": None, "swd": 0.02}
    lines = cells(benchmark.table(rows, [pool, pool | {"method": "truth", "kid": 0.0123}]))
    assert lines[0] == [
        *("solver", "evaluations", "clean prior, dB", "flowdiff prior, dB", "SSIM", "accuracy"),
        *("KID", "SWD", "chi-square", "ms/evaluation", "memory, MiB"),
    ]
    assert lines[2][:9] == [
        "b",
        "100",
        "22.00",
        "21.00",
        "0.900",
        "1.00",
        "0.100",
        "0.0200",
        "1.10",
    ]
    assert lines[3][:6] == ["a", "100", "20.00", "18.00", "0.900", "1.00"] and lines[3][6] == ""
    assert lines[4][0] == "*the truth itself*" and lines[4][6] == "0.012"
    assert len(lines) == 5
    said = "\n".join(benchmark.unfinished(rows))
    assert "Not in the means (flowdiff prior): c, d." in said
    assert "b on blur (flowdiff): cannot." in said
    assert "Left out of the means (flowdiff prior): blur." in said
    single = cells(benchmark.details([r for r in rows if r["prior"] == "flowdiff"]))
    assert single[2:] == [
        ["identity", "0.05", "18.00", "21.00", "99.00", ""],
        ["blur", "0.05", "90.00", "", "", ""],
    ]


def test_red_diff_against_the_others_is_a_matter_of_sums():
    phase = "phase:fourier,oversample=2"
    rows = [
        row("red-diff", "clean", "identity", 20.0),
        row("red-diff", "clean", phase, 10.0, 0.01, evaluations=200),
        row("a", "clean", "identity", 21.0, evaluations=20),
        row("a", "clean", phase, 8.0, 0.01, evaluations=200),  # 100 for each of two runs
        row("red-diff paper", "clean", "identity", 19.5, evaluations=1000),
        row("red-diff paper", "clean", phase, 16.0, 0.01, evaluations=2000),
    ]
    best, paper, other = benchmark.duels(rows)
    assert (best["rival"], best["tasks"], best["won"]) == ("", 2, 1)
    assert best["mean"] == pytest.approx(0.5) and best["worst"] == pytest.approx(-1.0)
    assert best["where"] == "identity, noise 0.05, clean prior"
    assert (paper["rival"], paper["evaluations"], paper["won"]) == ("red-diff paper", 1000, 1)
    assert paper["mean"] == pytest.approx(-2.75) and paper["worst"] == pytest.approx(-6.0)
    assert (other["rival"], other["mean"]) == ("a", pytest.approx(0.5))
    lines = cells(benchmark.duel_table([best, paper, other]))
    assert lines[2][1:6] == ["", "2", "1", "+0.50", "-1.00"]


def test_what_is_wrong_is_said(monkeypatch, capsys, tmp_path):
    for argv, problem in (
        ([], "give --out OUT, or --table"),
        (["--out", str(tmp_path), "--score"], "no rows in"),
        (["--out", str(tmp_path), "--methods", "magic"], "method 'magic' is unknown"),
    ):
        monkeypatch.setattr("sys.argv", ["run.py", *argv])
        assert benchmark.SUITE.main(benchmark.Options, benchmark.measure) == 2
        error = capsys.readouterr().err
        assert problem in error and error.count("\n") == 1
    with pytest.raises(InputError, match="copy OUT/solve\\*.json there"):
        benchmark.SUITE.published(tmp_path)
