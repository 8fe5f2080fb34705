"""The certification against oracles: solvers whose faults are known because they were put in."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from unmurk.cli import certificate
from unmurk.cli import main as cli
from unmurk.cli.certificate import INKS, TITLE, holds, lines, picture, summary, table
from unmurk.errors import InputError
from unmurk.evaluation.certify import (
    PROBLEMS,
    SHORT,
    Row,
    certify,
    claiming_solvers,
    default_solvers,
    standard_errors,
)
from unmurk.evaluation.exact import operator_matrix
from unmurk.evaluation.exam import PRIORS, Exam, draws_covered
from unmurk.evaluation.exam import exam as exam_of
from unmurk.evaluation.scale_mixture import ScaleMixture
from unmurk.solvers import configure

SOME = [("gaussian", "inpaint:box,size=4", 0.3), ("mixture", "sr:average,factor=2", 0.05)]


WAVELETS = [("wavelet", "inpaint:box,size=4", 0.02), ("wavelet-wide", "sr:average,factor=2", 0.05)]


def oracle(change=lambda x, posterior, problem: x, claims="posterior"):
    """Exact posterior samples, changed."""

    def solver(y, problem, denoise, samples, seed):
        denoise(denoise.prior.sample(1), 0.1)
        posterior = denoise.prior.posterior(y, problem)
        return change(posterior.sample(samples, seed=seed), posterior, problem)

    solver.claims = claims
    return solver


def shrunk(factor):
    return lambda x, posterior, problem: posterior.mean + factor * (x - posterior.mean)


def shrunk_unseen(x, posterior, problem):
    """Deviations in the null space of A times 0.7."""
    matrix = operator_matrix(problem, x.shape[-3:], x[0])
    away = (x - posterior.mean).double().flatten(2)
    seen = (torch.linalg.pinv(matrix, rtol=1e-3) @ matrix @ away[..., None])[..., 0]
    return posterior.mean + (seen + 0.7 * (away - seen)).reshape_as(x).to(x)


def shifted(x, posterior, problem):
    """Each pixel off by 0.2 posterior standard deviations."""
    return x + 0.2 * posterior.std


def bars(row, images=4):
    """Standard errors of both spreads (None: A has no such directions), and of mean_error^2."""
    exam = exam_of((row.prior, row.operator, row.noise), images, 0)
    if "wavelet" in row.prior:
        return exam.spread_bars(row.draws), exam.square_bar(row.draws, 0)
    sides = [None if p is None else p @ exam.covariance @ p for p in exam.sides]
    spreads = [None if side is None else standard_errors(side, row.draws)[0] for side in sides]
    return spreads, standard_errors(exam.covariance, row.draws)[1]


@pytest.fixture
def sampled_once(monkeypatch):
    """Posteriors by Gibbs sampling, kept: the exam and the oracle ask for the same ones."""
    known, sample = {}, ScaleMixture.posterior

    def posterior(prior, y, problem, seed=0):
        key = (y.numpy().tobytes(), problem.operator.spec, problem.sigma, seed)
        if key not in known:
            known[key] = sample(prior, y, problem, seed)
        return known[key]

    monkeypatch.setattr(ScaleMixture, "posterior", posterior)


@pytest.mark.usefixtures("sampled_once")
def test_exact_samples_earn_posterior_everywhere_within_the_derived_errors():
    some = [case for case in PROBLEMS if "wavelet" not in case[0] or case in WAVELETS]
    assert len(some) == 36
    pulls, rows = [], []
    for case in some:  # one by one: the last exam is kept for `bars`
        (row,) = certify({"oracle": oracle()}, problems=[case])
        rows.append(row)
        assert (row.prior, row.operator, row.noise) == case
        assert row.earned == "posterior" and 120 <= row.draws <= 512, row
        spreads, square = bars(row)
        assert row.mean_error**2 < 3.5 * square < 0.003 and square <= row.square_bar
        assert row.spread_bar == max(bar for bar in spreads if bar is not None)
        for ratio, bar in zip((row.spread_observed, row.spread_unobserved), spreads, strict=True):
            assert (ratio is None) == (bar is None)
            if bar is not None:
                assert abs(ratio - 1) < 4.5 * bar < 0.08
                pulls.append((ratio - 1) / bar)
        assert abs(row.coverage - 0.9) < 0.02
        assert 0.7 < row.excess < 1.4
        assert row.evaluations == 1 and row.error is None
    assert 0.6 < torch.tensor(pulls).square().mean().sqrt() < 1.5  # the bars are the scatter
    assert holds(rows) == {"oracle": True}


def test_standard_errors_are_those_of_repeated_experiments():
    exam = Exam(("gaussian", "inpaint:box,size=4", 0.3), 4, 0)
    moments = [exam.moments(exam.posterior.sample(32, seed=s)) for s in range(200)]
    square = torch.tensor([m[0] for m in moments])
    spread_bar, _ = standard_errors(exam.sides[1] @ exam.covariance @ exam.sides[1], 32)
    _, square_bar = standard_errors(exam.covariance, 32)
    unseen = torch.tensor([m[1][1] for m in moments])
    assert float(unseen.std()) == pytest.approx(spread_bar, rel=0.2)
    assert float(square.std()) == pytest.approx(square_bar, rel=0.25)
    assert abs(float(square.mean())) < 4 * square_bar / 200**0.5
    assert abs(float(unseen.mean()) - 1) < 0.01


def test_faults_are_caught_and_measured():
    solvers = {
        "shrunk": oracle(shrunk(0.7)),
        "shifted": oracle(shifted),
        "mean": oracle(shrunk(0.0), claims="point"),
        "unseen": oracle(shrunk_unseen),
    }
    rows = certify(solvers, problems=SOME)
    assert len(rows) == 8
    for row in rows:
        assert row.earned == "point", row
        if row.solver == "shrunk":
            assert row.spread_observed == pytest.approx(0.7, rel=0.06)
            assert row.spread_unobserved == pytest.approx(0.7, rel=0.06)
            assert row.coverage == pytest.approx(0.75, abs=0.04)  # P(|z| < 0.7 * 1.645)
        elif row.solver == "shifted":
            near = 0.03 if row.draws > 128 else 0.08  # an early look may settle it
            assert row.mean_error == pytest.approx(0.2, abs=near)
            assert row.spread_observed == pytest.approx(1, abs=0.05)
        elif row.solver == "mean":
            assert row.mean_error < 1e-5 and row.coverage == 0 and row.excess > 2
            assert row.spread_observed < 1e-5 and row.spread_unobserved < 1e-5
            assert row.draws == 32  # settled by the first look
        else:
            assert row.spread_observed == pytest.approx(1, abs=0.05)
            assert row.spread_unobserved == pytest.approx(0.7, rel=0.06)
    assert holds(rows) == {"shrunk": False, "shifted": False, "mean": True, "unseen": False}


def test_coverage_is_exact_for_any_number_of_samples():
    g = torch.Generator().manual_seed(0)
    for draws in (7, 32, 100):
        samples, exact = (torch.rand(n, 20000, generator=g) for n in (draws, 3))
        assert draws_covered(samples, exact) == pytest.approx(0.9, abs=0.006)
    assert draws_covered(torch.zeros(32, 5), torch.ones(4, 5)) == 0


def test_solvers_by_name_and_by_options():
    seen = []
    solvers = {
        "red-diff": {"steps": 20},
        "short": {"method": "dps", "steps": 20},
    }
    rows = certify(solvers, problems=SOME[:1], progress=seen.append)
    assert rows == seen
    assert [(r.solver, r.claims, r.evaluations, r.draws) for r in rows] == [
        ("red-diff", "point", 40, 32),
        ("short", "heuristic", 20, 32),
    ]
    assert rows[0].earned == "point" and rows[0].spread_observed < 0.1
    assert holds(rows) == {"red-diff": True, "short": True}
    again = certify(solvers, problems=SOME)
    assert [r.mean_error for r in again[:2]] == [r.mean_error for r in rows]
    assert [r.mean_error for r in again[2:]] != [r.mean_error for r in rows]
    assert json.loads(json.dumps([dataclasses.asdict(r) for r in rows]))[1]["solver"] == "short"


def test_refusals_and_failures_are_told_apart():
    def choosy(y, problem, denoise, samples, seed):
        if "box" in problem.operator.spec:
            raise InputError("no boxes")
        return denoise.prior.posterior(y, problem).sample(samples, seed)

    def broken(y, problem, denoise, samples, seed):
        return torch.full((samples, len(y), 1, 8, 8), float("nan"))

    choosy.claims = broken.claims = "posterior"
    rows = certify({"choosy": choosy, "broken": broken}, problems=SOME)
    assert (rows[0].earned, rows[0].error, rows[0].coverage) == (None, "no boxes", None)
    assert rows[2].earned == "posterior"
    assert rows[1].earned == "heuristic" and "not finite" in rows[1].error
    found = summary(rows)
    assert (found["choosy"].earned, found["choosy"].refused) == ("posterior", 1)
    assert holds(rows) == {"choosy": True, "broken": False}
    assert holds(rows[:1]) == {"choosy": False}
    wrong = certify({"wrong": lambda *_: torch.zeros(1)}, problems=SOME[:1])[0]
    assert "shape (32, 4, 1, 8, 8), got (1,)" in wrong.error


def test_problems_cover_noise_shapes_and_priors():
    assert len(PROBLEMS) == len(set(PROBLEMS)) >= 30 and set(SHORT) <= set(PROBLEMS)
    assert len(SHORT) == 12
    for some in (PROBLEMS, SHORT):
        priors, operators, noises = (set(column) for column in zip(*some, strict=True))
        assert min(noises) == 0.005 and max(noises) == 0.5 and {0.01, 0.02} <= noises
        assert len(operators) == 5
        shapes = {PRIORS[prior]().shape for prior in priors}
        assert shapes == {(1, 8, 8), (1, 6, 10)}
        assert {prior.split("-")[0] for prior in priors} == {"gaussian", "mixture", "wavelet"}
        for prior in ("gaussian", "mixture", "wavelet"):
            assert (prior, "inpaint:box,size=4", 0.02) in some
        assert {n for _, o, n in some if o.startswith("blur")} >= {0.01, 0.02}


def rows_by_hand():
    def row(solver, earned, mean_error, unobserved, operator="identity"):
        return Row(
            *(solver, "gaussian", operator, 0.3, "posterior", earned),
            *(mean_error, 1.0, unobserved, 0.9, 0.02, 0.01, 512, 100, 2.0),
        )

    return [
        row("a", "posterior", 0.01, None),
        row("a", "posterior", 0.03, 0.95),
        row("a", "posterior", 0.02, 1.02),
        row("b", "posterior", 0.01, 1.01),
        row("b", "point", 0.2, 0.0),
        Row("c", "gaussian", "identity", 0.3, "point", None, error="no"),
    ]


def test_summary_is_the_weakest_and_the_worst(tmp_path):
    found = summary(rows_by_hand())
    assert [s.earned for s in found.values()] == ["posterior", "point", None]
    assert found["a"].figures["mean_error"] == (0.02, 0.03)
    assert found["a"].figures["spread_unobserved"] == pytest.approx((0.985, 0.95))
    assert found["b"].figures["spread_unobserved"] == pytest.approx((0.505, 0.0))
    assert found["a"].figures["excess"] == (2.0, 2.0) and found["a"].seconds == 6.0
    written = table(rows_by_hand()).splitlines()
    assert len(written) == 5 and len({line.count("|") for line in written}) == 1
    assert "| a | posterior | posterior | 3, 0, 0 | 0.02 (0.03) | 1.00 (1.00) |" in written[2]
    assert "| b | posterior | point (!) | 1, 1, 0 |" in written[3]
    assert "| c | point | refused all (!) | 0, 0, 0 |" in written[4]
    assert lines(rows_by_hand()).row_count == 3
    picture(rows_by_hand(), tmp_path / "dots.svg")
    drawn = (tmp_path / "dots.svg").read_text()
    assert drawn.count(INKS["posterior"]) >= 4 and drawn.count(INKS["point"]) >= 1
    words = re.findall(r"<!-- (.*?) -->", drawn)
    assert TITLE in words
    assert all(f'id="{what}"' in drawn for what in ("region", "name a", "name b"))
    assert not any("beyond" in word for word in words)
    with pytest.raises(InputError, match="cannot draw to"):
        picture(rows_by_hand(), tmp_path / "dots.doc")


def test_points_beyond_the_axes_are_counted_in_the_picture(tmp_path):
    rows = rows_by_hand()
    far = [
        dataclasses.replace(rows[0], mean_error=25.0),
        dataclasses.replace(rows[1], spread_unobserved=3.5),
    ]
    picture([*rows, *far], tmp_path / "far.svg")
    words = re.findall(r"<!-- (.*?) -->", (tmp_path / "far.svg").read_text())
    assert "hollow, on the edge: 2 of 7 points lie beyond the axes" in words


def test_the_names_in_the_picture_do_not_overlap():
    """Twelve solvers whose worst points are close together."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [
        dataclasses.replace(rows_by_hand()[4], solver=f"solver-{i}", mean_error=0.2 + 0.01 * i)
        for i in range(12)
    ]
    figure = Figure(figsize=(7.6, 5.4), dpi=150)
    axes = figure.add_axes((0.09, 0.17, 0.88, 0.74))
    axes.set(xlim=(-0.02, 2), ylim=(0.01, 10), yscale="log")
    names = certificate._name(figure, axes, [certificate._Point.of(row) for row in rows])
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [certificate.extent_of(name, renderer) for name in names]
    assert len(boxes) == 12
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


BAD_NUMBERS = [
    *(("draws", bad) for bad in (31, 4097, 64.0, True, None, 10**12)),
    *(("images", bad) for bad in (0, 17, -1, "4", 10**12)),
    *(("processes", bad) for bad in (0, 65, 1.5)),
    *(("seed", bad) for bad in (-1, 0.5, 2**63)),
]
IDENTITY = ("gaussian", "identity", 0.1)
BAD_PROBLEMS = [
    ("identity", "write it as"),
    (("gaussian", "identity"), "write it as"),
    (("cats", "identity", 0.1), "prior 'cats'"),
    (("gaussian", None, 0.1), "operator as text"),
    *((("gaussian", "identity", bad), "from 0.001 to 10") for bad in (0, -1, 11, "0.1", True)),
    (("gaussian", "identity", float("nan")), "from 0.001 to 10"),
    (("gaussian", "jpeg,quality=50", 0.1), "is not linear"),
    (("gaussian-wide", "sr:average,factor=4", 0.1), "sr:average"),
    (("gaussian", "unknown", 0.1), "unknown"),
]


@pytest.mark.parametrize(("name", "bad"), BAD_NUMBERS)
def test_numbers_have_bounds(name, bad):
    with pytest.raises(InputError, match=f"{name} is .*: give an integer from"):
        certify({"oracle": oracle()}, problems=[IDENTITY], **{name: bad})


@pytest.mark.parametrize(("problem", "message"), BAD_PROBLEMS)
def test_bad_problems_are_named_before_anything_runs(problem, message):
    with pytest.raises(InputError, match=message):
        certify({"broken": broken}, problems=[IDENTITY, problem])


def test_bad_solvers_are_named():
    with pytest.raises(InputError, match="method 'magic'"):
        certify({"magic": {}})
    with pytest.raises(InputError, match="claims 'truth'"):
        certify({"oracle": oracle(claims="truth")})


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """Two problems, in this process."""
    monkeypatch.setattr(certificate, "SHORT", SOME)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


def test_command_prints_the_rows_of_the_library(few, tmp_path, capsys):
    argv = [
        "certify",
        "--methods",
        "red-diff",
        "ddnm",
        "--seed",
        "3",
        "--out",
        str(tmp_path / "a"),
    ]
    assert cli.main([*argv, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    rows = certify({"red-diff": {}, "ddnm": {}}, seed=3, problems=SOME)
    assert [(r["solver"], r["claims"], r["earned"], r["mean_error"]) for r in said["rows"]] == [
        (r.solver, r.claims, r.earned, r.mean_error) for r in rows
    ]
    assert said["holds"] == {"red-diff": True, "ddnm": True} and said["seed"] == 3
    kept = json.loads((tmp_path / "a" / "certify.json").read_text())
    assert kept == said and certificate.read(kept)[0].draws == rows[0].draws
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "certify.json",
        "certify.png",
        "unmurk.jsonl",
    }
    assert cli.main(["certify", "--methods", "red-diff"]) == 0
    shown = capsys.readouterr()
    assert "red-diff" in shown.out and "worst over all problems" in shown.out


def test_command_takes_solvers_that_claim_something_unless_thorough(few, monkeypatch):
    asked = []

    def remember(solvers, **settings):
        asked.append((list(solvers), settings["problems"]))
        return rows_by_hand()

    monkeypatch.setattr(certificate, "certify", remember)
    assert certificate.run()["thorough"] is False
    assert certificate.run(thorough=True)["thorough"] is True
    certificate.run(["dps"], thorough=True)
    claiming = [name for name in default_solvers() if claims_of(name) != "heuristic"]
    assert asked == [
        (claiming, SOME),
        (list(default_solvers()), PROBLEMS),
        (["dps"], PROBLEMS),
    ]
    assert {"red-diff", "snips"} <= set(claiming) < set(default_solvers())
    assert list(claiming_solvers()) == claiming


def claims_of(name):
    options = dict(default_solvers()[name])
    return configure(options.pop("method", name), options).claims


def test_rows_say_how_well_a_sampled_reference_is_known():
    solvers = {"oracle": oracle()}
    (row,) = certify(solvers, problems=[("wavelet", "identity", 0.3)], images=1)
    assert 1 <= row.rhat <= 1.01 and row.ess > 1000 and 0 < row.reference_error < 2e-4**0.5
    exam = exam_of(("wavelet", "identity", 0.3), 1, 0)
    assert row.reference_error**2 == exam.mean_error
    # a reference that is less sure subtracts its error from the figure, and adds it to the bar
    samples = exam.posterior.sample(64, seed=5)
    square, bar = exam.moments(samples)[0], exam.square_bar(64, 0.1)
    exam_of.cache_clear()
    exam.mean_error += 0.01
    assert exam.moments(samples)[0] == pytest.approx(square - 0.01)
    assert exam.square_bar(64, 0.1) > 1.2 * bar
    (known,) = certify(solvers, problems=SOME[:1], draws=32)
    assert known.rhat is known.ess is known.reference_error is None
    assert certificate.reference([known]) == ""
    worse = dataclasses.replace(row, rhat=1.0092, ess=812.4, reference_error=0.0123)
    said = certificate.reference([known, row, worse])
    assert "at most 1.009" in said and "812 effective" in said and "0.0123 posterior" in said


def test_command_names_the_solvers_there_are(tmp_path, capsys):
    assert cli.main(["certify", "--methods", "magic", "--out", str(tmp_path / "a")]) == 2
    said = capsys.readouterr().err
    assert "solver 'magic' is unknown: choose from red-diff, dps" in said
    assert len(said.splitlines()) == 1 and not (tmp_path / "a").exists()


@pytest.mark.slow
def test_processes_do_not_change_the_rows():
    solvers, seen = {"red-diff": {"steps": 5}, "oracle": exact}, []
    one = certify(solvers, problems=SOME)
    two = certify(solvers, problems=SOME, processes=2, progress=seen.append)
    assert len(seen) == 4
    for a, b in zip(one, two, strict=True):
        assert dataclasses.replace(a, seconds=0) == dataclasses.replace(b, seconds=0)
    with pytest.raises(ZeroDivisionError):
        certify({"bad": broken}, problems=SOME, processes=2)


def exact(y, problem, denoise, samples, seed):
    return denoise.prior.posterior(y, problem).sample(samples, seed=seed)


def broken(*_):
    return 1 / 0


@pytest.mark.slow
def test_interrupt_ends_all_processes_and_leaves_nothing(tmp_path):
    """Ctrl-C reaches every process of the terminal's group."""
    argv = [sys.executable, "-m", "unmurk", "certify", "--methods", "dps", "--out", "out"]
    ours = {"PYTHONPATH": str(Path(certificate.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        argv,
        cwd=tmp_path,
        env=os.environ | ours,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell's background jobs ignore interrupts, and what they start inherits that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert run.stderr is not None and "s left" in run.stderr.readline()
    os.killpg(run.pid, signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130 and out == ""
    said = [line for line in err.splitlines() if "s left" not in line]
    assert said == ["unmurk: interrupted; the same command continues or starts again"]
    assert not any(tmp_path.iterdir())
    with pytest.raises(ProcessLookupError):  # within ten seconds
        for _ in range(100):
            os.killpg(run.pid, 0)
            time.sleep(0.1)


def test_the_example_of_the_page_is_right():
    """A solver of one's own, as docs/results/certification.md shows it."""
    page = Path(__file__).parents[2] / "docs" / "results" / "certification.md"
    code = re.findall("```python\n(.*?)```", page.read_text(), re.DOTALL)[0]
    names = {}
    exec(compile(code, str(page), "exec"), names)
    (row,) = names["rows"]
    assert row.solver == "shrink" and row.claims == "point" == row.earned
    assert row.mean_error < 1e-5 and row.spread_observed < 1e-6  # E[x | y] of a denoising problem
