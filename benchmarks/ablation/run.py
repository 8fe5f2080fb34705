"""Change one setting of RED-diff at a time: of the released algorithm, and of our default.

The test images are held-out digits, with the packaged prior, which `flowdiff` learned from noisy
digits alone. The tasks are a filled hole and 4 x 4 averages at noise 0.05, and a Gaussian blur at
noise 0.2. As in the ablations of Mardani et al. (2023, arXiv 2305.04391), the settings of the
released algorithm are the weight g of the prior's term, lambda, the step length, the order of the
levels and the optimizer, starting from the released values for the task. The settings of our
default are its evaluations, momentum, pairs, step length and final estimate.

    python benchmarks/ablation/run.py --out OUT
    python benchmarks/ablation/run.py --out OUT --profile full
    python benchmarks/ablation/run.py --table

The rows are stored in OUT/rows; the same command continues an interrupted run.
OUT/ablation-PROFILE.json has all figures, OUT/ablation-PROFILE.png a picture.
"""

import hashlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import common
from benchmarks.common import CommonOptions, Row, Suite, markdown
from benchmarks.solve.scores import fidelity
from benchmarks.solve.tasks import PAPER, images, solver_options
from unmurk.devices import default_device
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.problem import Problem
from unmurk.solvers import solve
from unmurk.solvers.red_diff_loss import WEIGHTS

__all__: list[str] = []

TASKS = (
    ("inpaint:box,size=10", 0.05),
    ("sr:average,factor=4", 0.05),
    ("blur:gaussian,sigma=1.5", 0.2),
)


@dataclass(frozen=True)
class Profile:
    """How large the study is.

    Attributes:
        images: Digits restored.
        steps: Levels of the released algorithm, a divisor of 1000.
        tasks: Number of the TASKS.
    """

    images: int
    steps: int
    tasks: int = len(TASKS)


PROFILES = {"small": Profile(8, 500), "full": Profile(128, 1000), "toy": Profile(2, 5, 1)}


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Change one setting of RED-diff at a time."""

    profile: Literal["small", "full", "toy"] = "small"
    """small: 8 digits, 500 levels, eight minutes on two cores; full: 128 digits, 1,000 levels, a
    GPU; toy: seconds, figures without meaning."""
    jobs: int = 2
    """Processes, each of one thread, that share the rows on a CPU."""


@dataclass(frozen=True)
class Study:
    """One setting, and its values.

    Attributes:
        title: What is changed.
        default: Whether our default is changed, or the released algorithm.
        values: For each value, in words, the options that differ from the base.
        base: The value of the base; its options are left as they are for the task.
    """

    title: str
    default: bool
    values: dict[str, dict[str, Any]]
    base: str = "released, by task"


def by(option: str, *values: float | str | bool) -> dict[str, dict[str, Any]]:
    """The values of one option."""
    return {
        f"{value:g}" if isinstance(value, float) else str(value): {option: value}
        for value in values
    }


STUDIES = {
    "weight": Study("g, the weight of the prior's term", False, by("weight", *WEIGHTS), "linear"),
    "lam": Study("lambda", False, {"released, by task": {}} | by("lam", 0.05, 0.25, 1.0, 4.0)),
    "lr": Study(
        "lr, the step of Adam", False, {"released, by task": {}} | by("lr", 0.02, 0.1, 0.5)
    ),
    "order": Study(
        *("order of the levels", False),
        by("order", "descending", "ascending", "random"),
        "descending",
    ),
    # the loss is a mean over the 784 numbers of an image: lr 1e6 of the released comment, for
    # 196,608 numbers, is 4,000 here
    "optimizer": Study(
        "optimizer",
        False,
        {"adam": {}, "adamw": {"optimizer": "adamw"}}
        | {f"sgd, lr {lr:g}": {"optimizer": "sgd", "lr": lr} for lr in (4.0, 40.0, 400.0, 4000.0)}
        | {f"lbfgs, lr {lr:g}": {"optimizer": "lbfgs", "lr": lr} for lr in (0.001, 0.01, 0.1)},
        "adam",
    ),
    "steps": Study(
        *("noise levels, of two evaluations each", True), by("steps", 5, 10, 25, 50, 100), "50"
    ),
    "momentum": Study("momentum", True, by("momentum", 0.0, 0.25, 0.5, 0.75), "0.5"),
    "pairs": Study(
        "pairs of noise",
        True,
        {
            "pairs, 100 evaluations": {},
            "single, 100 evaluations": {"pairs": False, "steps": 100},
            "single, 50 evaluations": {"pairs": False},
        },
        "pairs, 100 evaluations",
    ),
    "relax": Study(
        "c, the step length in units of the level's variance",
        *(True, by("relax", 0.5, 1.0, 1.5), "1"),
    ),
    "final": Study("final estimate", True, by("final", "mean", "denoised", "mmse"), "mmse"),
}


# -- rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A row: a solver, with all options that are not its defaults, on a task."""

    operator: str
    noise: float
    options: tuple[tuple[str, Any], ...]

    @property
    def file(self) -> str:
        """The name of its file, without suffix; studies share equal runs."""
        text = json.dumps([self.operator, self.noise, self.options])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def runs(profile: Profile) -> Iterator[tuple[str, str, Run]]:
    """All rows as (study, value, run)."""
    for name, study in STUDIES.items():
        for value, change in study.values.items():
            for operator, noise in TASKS[: profile.tasks]:
                options = all_options(study, change, operator, noise, profile)
                yield name, value, Run(operator, noise, options)


def all_options(
    study: Study, change: dict[str, Any], operator: str, noise: float, profile: Profile
) -> tuple[tuple[str, Any], ...]:
    """The options of a run: those of the base, then the change."""
    base: dict[str, Any] = {"method": "red-diff"}
    if not study.default:
        base = solver_options(PAPER, operator, noise) | {"steps": profile.steps}
    own = change if change != study.values.get(study.base) else {}
    return tuple(sorted((base | own).items()))


def do(run: Run, options: Options) -> Row:
    """The row of a run, which is stored in OUT/rows/RUN.json."""
    profile = PROFILES[options.profile]
    settings = {"profile": options.profile, "seed": options.seed} | asdict(profile)
    file = options.folder / "rows" / f"{run.file}.json"
    return common.stored_row(file, partial(run_row, run, options), settings)


def run_row(run: Run, options: Options) -> Row:
    """Restore and score."""
    profile, device = PROFILES[options.profile], default_device()
    prior = Prior.load("digits").to(device)
    problem = Problem(run.operator, run.noise)
    y = problem.simulate(images("digits", "test")[: profile.images], options.seed).to(device)
    row: Row = {"options": dict(run.options), "error": None}
    began = time.perf_counter()
    try:
        result = solve(y, problem, prior, seed=options.seed, **dict(run.options))
    except InputError as error:
        return row | {"error": str(error)}
    row |= fidelity("digits", result.mean.cpu()) | {"evaluations": result.nfe}
    return row | {"chi2": result.trace[-1]["chi2"], "seconds": time.perf_counter() - began}


def measure(options: Options) -> Row:
    """Run what is missing; write OUT/ablation-PROFILE.json and the picture."""
    picture, profile = SUITE.file(options, ".png"), PROFILES[options.profile]
    every = list(runs(profile))
    distinct = list(dict.fromkeys(run for _, _, run in every))
    found = dict(zip(distinct, common.run_rows(do, distinct, options, options.jobs), strict=True))
    rows = []
    for study, value, run in every:
        where = {"study": study, "value": value, "operator": run.operator, "noise": run.noise}
        rows.append(where | found[run])
    draw(picture, rows)
    return SUITE.store(options, asdict(profile), rows=rows)


# -- tables ---------------------------------------------------------------------------------------


def rows_by_value(rows: list[Row], study: str) -> dict[str, list[Row]]:
    """The rows of a study by value, a row for each task."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["study"] == study:
            found.setdefault(row["value"], []).append(row)
    return found


def mean(rows: list[Row], field: str) -> float | None:
    """The mean over the tasks; None if one of them failed."""
    failed = any(row["error"] is not None for row in rows)
    return None if failed else statistics.mean(row[field] for row in rows)


def table(rows: list[Row], study: str) -> str:
    """A line for each value: PSNR on each task, and means over the tasks."""
    found = rows_by_value(rows, study)
    own = next(iter(found.values()))
    heads = [STUDIES[study].title, *(f"{row['operator']}, noise {row['noise']:g}" for row in own)]
    lines = [[*heads, "mean dB", "SSIM", "accuracy", "chi-square", "evaluations"]]
    for value, own in found.items():
        label = f"**{value}**" if value == STUDIES[study].base else value
        line = [label, *("failed" if r["error"] else f"{r['psnr']:.2f}" for r in own)]
        for field, form in (("psnr", "{:.2f}"), ("ssim", "{:.3f}"), ("accuracy", "{:.2f}")):
            line.append("" if (m := mean(own, field)) is None else form.format(m))
        worst = max((row["chi2"] for row in own if not row["error"]), default=None)
        line.append("" if worst is None else f"{worst:.2f}" if worst < 1000 else f"{worst:.0e}")
        line.append(f"{max((r['evaluations'] for r in own if not r['error']), default=0)}")
        lines.append(line)
    return markdown(lines)


def finding(rows: list[Row], study: str) -> str:
    """The best value, and its difference from the base."""
    means = {
        v: m
        for v, own in rows_by_value(rows, study).items()
        if (m := mean(own, "psnr")) is not None
    }
    base, best = STUDIES[study].base, max(means, key=lambda v: means[v])
    if best == base:
        second = sorted(means.values())[-2]
        return f"Best: {best}, by {means[best] - second:.2f} dB."
    return f"Best: {best}, {means[best] - means[base]:.2f} dB above {base}."


def view(result: Row) -> Row:
    """What the page shows: table and finding of every study."""
    rows = result["rows"]
    parts: dict[str, list[tuple[str, str]]] = {"The released algorithm": [], "The default": []}
    for name, study in STUDIES.items():
        title = "The default" if study.default else "The released algorithm"
        parts[title].append((table(rows, name), finding(rows, name)))
    return {"parts": parts}


def draw(path: Path, rows: list[Row]) -> None:
    """Draw a panel for each study: PSNR over its values, for each task and their mean."""
    from matplotlib.figure import Figure

    figure = Figure((3.1 * len(STUDIES) / 2, 6.4), 100, layout="constrained")
    panels = figure.subplots(2, len(STUDIES) // 2)
    for axes, (name, study) in zip(panels.flat, STUDIES.items(), strict=True):
        found = rows_by_value(rows, name)
        places = range(len(found))
        for number, first in enumerate(next(iter(found.values()))):
            heights = [own[number].get("psnr") or float("nan") for own in found.values()]
            axes.plot(places, heights, ".-", lw=0.8, label=f"{first['operator']}")
        means = [mean(own, "psnr") or float("nan") for own in found.values()]
        axes.plot(places, means, "ko-", lw=1.6, ms=4, label="mean")
        axes.axvline(list(found).index(study.base), color="0.85", lw=6, zorder=0)
        axes.set_xticks(places, list(found), rotation=40, ha="right", fontsize=7)
        axes.tick_params(axis="y", labelsize=7)
        axes.set_title(f"{'default' if study.default else 'released'}: {name}", fontsize=9)
    panels.flat[0].set_ylabel("PSNR, dB", fontsize=8)
    panels.flat[0].legend(fontsize=6)
    figure.savefig(path)


SUITE = Suite("ablation", view, "ablation", profiles=("small", "full"))

if __name__ == "__main__":
    sys.exit(SUITE.main(Options, measure))
