"""What the parts of RED-diff are worth: the released algorithm's settings, and our default's.

One setting at a time is changed, on held-out digits with the packaged prior, which `flowdiff`
learnt from noisy digits alone: a filled hole and 4 x 4 averages at noise 0.05, a Gaussian blur at
noise 0.2. Changed are, as in the ablations of Mardani et al. (2023, arXiv 2305.04391), the weight
g of the prior's term, lambda, the step length, the order of the levels and the optimiser, starting
from what was released for the task; and of our default its evaluations, momentum, pairs, length of
a step and last estimate.

    python benchmarks/ablation.py --out OUT
    python benchmarks/ablation.py --out OUT --profile full
    python benchmarks/ablation.py --table

Rows are added to OUT/rows as they are done; the same command goes on where the last one ended.
OUT/ablation.json has all figures, OUT/ablation.png a picture. From copies kept as
benchmarks/results/ablation-PROFILE.json (and .png) `--table` writes docs/benchmark_ablation.md.
"""

import hashlib
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from provenance import ROOT, command, machine, markdown, write_json
from solve_scores import fidelity
from solve_tasks import PAPER, Task, chosen, images

from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.io.atomic import write as write_atomically
from unmurk.problem import Problem
from unmurk.solvers import solve
from unmurk.solvers.red_diff_paper import WEIGHTS

__all__: list[str] = []

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmark_ablation.md"
TASKS = (
    ("inpaint:box,size=10", 0.05),
    ("sr:average,factor=4", 0.05),
    ("blur:gaussian,sigma=1.5", 0.2),
)
Row = dict[str, Any]
ProfileName = Literal["small", "full", "toy"]


@dataclass(frozen=True)
class Profile:
    """How large it is.

    Attributes:
        images: Digits restored.
        steps: Levels of the released algorithm, a divisor of 1000.
        tasks: How many of TASKS.
    """

    images: int
    steps: int
    tasks: int = len(TASKS)


PROFILES = {"small": Profile(8, 500), "full": Profile(128, 1000), "toy": Profile(2, 5, 1)}


@dataclass(frozen=True)
class Options:
    """Change one setting of RED-diff at a time."""

    out: Path | None = None
    """Folder for rows, figures and picture."""
    profile: ProfileName = "small"
    """small: 8 digits, 500 levels, eight minutes on two cores; full: 128 digits, 1,000 levels, a
    GPU; toy: seconds, figures without meaning."""
    jobs: int = 2
    """Processes, each of one thread, that share the rows on a CPU."""
    seed: int = 0
    """Seed of all noise."""
    table: bool = False
    """Write docs/benchmark_ablation.md from benchmarks/results/ and run nothing."""


@dataclass(frozen=True)
class Study:
    """One setting, and its values.

    Attributes:
        title: What is changed.
        default: Whether our default is changed, or the released algorithm.
        values: For each value, in words, the options that differ from the base.
        base: The value that the base has; where it depends on the task, none of them.
    """

    title: str
    default: bool
    values: dict[str, dict[str, Any]]
    base: str = "released, by task"


def by(option: str, *values: float | str | bool) -> dict[str, dict[str, Any]]:
    """Values of one option."""
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
    # the loss is a mean over an image's 784 numbers: lr 1e6 of the released comment, for 196,608
    # of them, is 4,000 here
    "optimizer": Study(
        "optimiser",
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
        "c, the length of a step in units of the level's variance",
        *(True, by("relax", 0.5, 1.0, 1.5), "1"),
    ),
    "final": Study("last estimate", True, by("final", "mean", "denoised", "mmse"), "mmse"),
}


# ---------------------------------------------------------------------------------------- the rows


@dataclass(frozen=True)
class Run:
    """One row: a solver with all options that are not its defaults, on a task."""

    operator: str
    noise: float
    options: tuple[tuple[str, Any], ...]

    @property
    def file(self) -> str:
        """Name of its file, without suffix: runs that several studies share are run once."""
        text = json.dumps([self.operator, self.noise, self.options])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def runs(profile: Profile) -> Iterator[tuple[str, str, Run]]:
    """All rows as (study, value, run)."""
    for name, study in STUDIES.items():
        for value, change in study.values.items():
            for operator, noise in TASKS[: profile.tasks]:
                yield (
                    name,
                    value,
                    Run(operator, noise, resolved(study, change, operator, noise, profile)),
                )


def resolved(
    study: Study, change: dict[str, Any], operator: str, noise: float, profile: Profile
) -> tuple[tuple[str, Any], ...]:
    """Options of a run: those of its base, then the change."""
    base: dict[str, Any] = {"method": "red-diff"}
    if not study.default:
        base = chosen(Task("digits", "flowdiff", operator, noise, PAPER))
        base |= {"steps": profile.steps}
    own = change if change != study.values.get(study.base) else {}
    return tuple(sorted((base | own).items()))


def do(run: Run, options: Options) -> str:
    """Restores and scores; OUT/rows/RUN.json says that it is done. Returns a line on it."""
    assert options.out
    file = options.out / "rows" / f"{run.file}.json"
    if file.exists():
        return ""
    if options.jobs > 1:
        torch.set_num_threads(1)
    profile = PROFILES[options.profile]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prior = Prior.load("digits").to(device)
    problem = Problem(run.operator, run.noise)
    y = problem.simulate(images("digits", "test")[: profile.images], options.seed).to(device)
    row: Row = {"options": dict(run.options), "error": None}
    began = time.perf_counter()
    try:
        result = solve(y, problem, prior, seed=options.seed, **dict(run.options))
    except InputError as error:
        write_json(file, row | {"error": str(error)})
        return f"{error}"
    row |= fidelity("digits", result.mean.cpu()) | {"evaluations": result.nfe}
    row |= {"residual": result.trace[-1]["chi2"], "seconds": time.perf_counter() - began}
    write_json(file, row)
    return f"{row['psnr']:.2f} dB"


def measure(options: Options) -> dict[str, Any]:
    """Runs what is missing and writes OUT/ablation.json and OUT/ablation.png."""
    if options.out is None:
        raise InputError("give --out, or --table")
    profile = PROFILES[options.profile]
    settings = {"profile": options.profile, "seed": options.seed} | asdict(profile)
    agree(options.out / "settings.json", settings)
    every = list(runs(profile))
    distinct = list(dict.fromkeys(run for _, _, run in every))
    jobs = 1 if torch.cuda.is_available() else options.jobs
    began = time.perf_counter()
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for number, line in enumerate(pool.map(do, distinct, [options] * len(distinct)), 1):
            if line:
                spent = time.perf_counter() - began
                print(
                    f"{number}/{len(distinct)} {line} ({spent:.0f} s)", file=sys.stderr, flush=True
                )
    rows = []
    for study, value, run in every:
        row = json.loads((options.out / "rows" / f"{run.file}.json").read_text())
        where = {"study": study, "value": value, "operator": run.operator, "noise": run.noise}
        rows.append(where | row)
    result = {"settings": settings, "machine": machine(), "rows": rows}
    write_json(options.out / "ablation.json", result)
    draw(options.out / "ablation.png", rows)
    return result


def agree(file: Path, settings: dict[str, Any]) -> None:
    """Notes the settings of the rows of a folder; raises InputError where they are others."""
    if file.exists() and json.loads(file.read_text()) != settings:
        raise InputError(f"{file} has other settings: give another --out")
    write_json(file, settings)


# ------------------------------------------------------------------------------------- the page


def values(rows: list[Row], study: str) -> dict[str, list[Row]]:
    """The rows of a study by value, a row for each task."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["study"] == study:
            found.setdefault(row["value"], []).append(row)
    return found


def mean(rows: list[Row], field: str) -> float | None:
    """Mean over the tasks; None if one of them failed."""
    failed = any(row["error"] is not None for row in rows)
    return None if failed else statistics.mean(row[field] for row in rows)


def table(rows: list[Row], study: str) -> str:
    """A line for each value: PSNR on each task, and means over the tasks."""
    found = values(rows, study)
    own = next(iter(found.values()))
    head = [STUDIES[study].title, *(f"{row['operator']}, noise {row['noise']:g}" for row in own)]
    head += ["mean dB", "SSIM", "accuracy", "residual", "evaluations"]
    lines = [head]
    for value, own in found.items():
        shown = f"**{value}**" if value == STUDIES[study].base else value
        line = [shown, *("failed" if r["error"] else f"{r['psnr']:.2f}" for r in own)]
        for field, form in (("psnr", "{:.2f}"), ("ssim", "{:.3f}"), ("accuracy", "{:.2f}")):
            line.append("" if (m := mean(own, field)) is None else form.format(m))
        worst = max((row["residual"] for row in own if not row["error"]), default=None)
        line.append("" if worst is None else f"{worst:.2f}" if worst < 1000 else f"{worst:.0e}")
        line.append(f"{max((r['evaluations'] for r in own if not r['error']), default=0)}")
        lines.append(line)
    return markdown(lines)


def finding(rows: list[Row], study: str) -> str:
    """The best value and what the base loses to it."""
    means = {
        v: m for v, own in values(rows, study).items() if (m := mean(own, "psnr")) is not None
    }
    base, best = STUDIES[study].base, max(means, key=lambda v: means[v])
    if best == base:
        second = sorted(means.values())[-2]
        return f"Best: {best}, by {means[best] - second:.2f} dB."
    return f"Best: {best}, {means[best] - means[base]:.2f} dB above {base}."


READING = """\
One setting changed at a time, on held-out digits with the packaged prior (learnt by `flowdiff`
from digits with noise 0.3 alone). The base of each table is in bold. PSNR in dB, *residual* that
of the worst task (chi-square per measured value, 1 for a good fit). All runs have the same
measurements and seed, so that small differences are of the setting; with so few images they need
not be those of other images.

The paper reports for ImageNet photographs that descending levels beat random ones and ascending
ones, and that the linear weight and the square root are best; it has no noise in most of its
tasks. Of other optimisers than Adam only a line of SGD was released, as a comment."""


def page(folder: Path = RESULTS) -> str:
    """The page, from the figures kept in a folder; raises InputError if there are none."""
    parts = [
        "# Benchmark: what the parts of RED-diff are worth",
        "Written by `python benchmarks/ablation.py --table` from `benchmarks/results/`; made by "
        "`python benchmarks/ablation.py --out OUT --profile PROFILE`.",
        READING,
    ]
    kept = [folder / f"ablation-{name}.json" for name in ("small", "full")]
    if not any(file.exists() for file in kept):
        raise InputError(f"no figures in {folder}: put OUT/ablation.json there")
    for file in filter(Path.exists, kept):
        result = json.loads(file.read_text())
        parts += [f"## {result['settings']['profile']}", conditions(result)]
        if file.with_suffix(".png").exists():
            link = os.path.relpath(file.with_suffix(".png"), PAGE.parent)
            parts.append(f"![PSNR over the values of every setting]({link})")
        for default in (False, True):
            parts.append(f"### {'The default' if default else 'The released algorithm'}")
            for study in (name for name in STUDIES if STUDIES[name].default == default):
                parts += [table(result["rows"], study), finding(result["rows"], study)]
    return "\n\n".join(parts) + "\n"


def conditions(result: dict[str, Any]) -> str:
    """Under what conditions the figures were made, in words."""
    how, made = result["settings"], result["machine"]
    return (
        f"{how['images']} digits; the released algorithm with {how['steps']} levels (released: "
        f"1,000); seed {how['seed']}. {made['cpu']}, {made['gpu'] or 'no GPU'}, torch "
        f"{made['torch']}, commit {made['commit']}."
    )


def draw(path: Path, rows: list[Row]) -> None:
    """A panel for each study: PSNR over its values, a line for each task and one for the mean."""
    from matplotlib.figure import Figure

    figure = Figure((3.1 * len(STUDIES) / 2, 6.4), 100, layout="constrained")
    panels = figure.subplots(2, len(STUDIES) // 2)
    for axes, (name, study) in zip(panels.flat, STUDIES.items(), strict=True):
        found = values(rows, name)
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


@command
def main() -> None:
    options = tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,))
    if options.table:
        write_atomically(PAGE, page().encode())
        return
    rows = measure(options)["rows"]
    print("\n\n".join(table(rows, study) for study in STUDIES))


if __name__ == "__main__":
    sys.exit(main())
