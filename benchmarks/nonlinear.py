"""Operators that are not linear: every solver that can treat them, on held-out digits.

Phase retrieval (noise 0.01) with one, two and four restarts; saturated contrast, a blur that
varies with place and brightness, JPEG and quantisation (noise 0.05). The prior is the one of the
package, learnt from noisy digits alone, or any other by `--prior`. All solvers have their
defaults.

    python benchmarks/nonlinear.py --out OUT                      # two cores
    python benchmarks/nonlinear.py --out OUT --profile full       # a GPU
    python benchmarks/nonlinear.py --table

Rows are added to OUT/rows as they are done, by as many processes as `--jobs` says; the same
command goes on where the last one ended. OUT/nonlinear.json has all figures, OUT/nonlinear.png a
picture. From copies kept as benchmarks/results/nonlinear-PROFILE.json (and .png) `--table` writes
docs/benchmark_nonlinear.md.
"""

import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
import tyro
from provenance import ROOT, machine, write_json
from torch import Tensor
from torch.nn import functional as F

import unmurk
from unmurk.errors import InputError
from unmurk.images import read_idx
from unmurk.learn.loop import write_atomically
from unmurk.metrics import psnr
from unmurk.prior import Prior
from unmurk.problem import Problem
from unmurk.solve import METHODS, solve

__all__: list[str] = []

ProfileName = Literal["small", "full", "toy"]
DIGITS = Path(unmurk.__file__).parent / "assets" / "digits" / "test.idx3-ubyte.gz"
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmark_nonlinear.md"
PHASE = "phase:fourier"
NOISES = {
    PHASE: 0.01,
    "hdr:clip": 0.05,
    "blur:nonlinear": 0.05,
    "jpeg,quality=10": 0.05,
    "quantise,bits=2": 0.05,
}
RESTARTS = (1, 2, 4)
RESTARTED = ("red-diff", "daps")  # solvers that phase retrieval is tried with several times
SOLVED = 25.0  # dB from which on a digit counts as retrieved


@dataclass(frozen=True)
class Profile:
    """How large the comparison is.

    Attributes:
        phase: Digits whose phase is retrieved.
        images: Digits of every other task.
        methods: Solvers.
    """

    phase: int
    images: int
    methods: tuple[str, ...]


QUICK = ("red-diff", "daps", "diffpir", "ddiff", "fast-dips", "dps")
PROFILES = {
    "small": Profile(16, 8, QUICK),
    "full": Profile(256, 256, (*QUICK, "tds")),  # tds: 1280 evaluations with gradient a sample
    "toy": Profile(2, 2, ("red-diff",)),
}


@dataclass(frozen=True)
class Options:
    """Compare the solvers where the operator is not linear."""

    out: Path | None = None
    """Folder for rows, figures and the picture."""
    profile: ProfileName = "small"
    """small: two cores; full: a GPU; toy: two digits and one solver."""
    prior: str = "digits"
    """A prior of 28 x 28 digits: what `unmurk solve --prior` takes."""
    methods: tuple[str, ...] = ()
    """Solvers to run now; none named: all of the profile."""
    jobs: int = 2
    """Processes, each of one thread, that share the rows on a CPU."""
    seed: int = 0
    """Seed of noise and draws."""
    table: bool = False
    """Write docs/benchmark_nonlinear.md from benchmarks/results/ and run nothing."""


# ---------------------------------------------------------------------------------------- the rows


@dataclass(frozen=True)
class Task:
    """One row: a solver on an operator."""

    operator: str
    method: str
    restarts: int = 1

    @property
    def file(self) -> str:
        text = "-".join((self.operator, self.method, str(self.restarts)))
        return "".join(c if c.isalnum() or c in "-.=" else "_" for c in text)


def tasks(options: Options) -> Iterator[Task]:
    """The rows of a profile. Raises InputError for a solver that there is not."""
    wanted = options.methods or PROFILES[options.profile].methods
    unknown = [m for m in wanted if m not in METHODS]
    if unknown:
        raise InputError(f"method '{unknown[0]}' is unknown: choose from {', '.join(METHODS)}")
    for operator in NOISES:
        for method in wanted:
            tried = RESTARTS if operator == PHASE and method in RESTARTED else (1,)
            for restarts in tried:
                yield Task(operator, method, restarts)


def digits(task: Task, options: Options) -> Tensor:
    """The clean digits of a row, (N, 1, 28, 28) in [0, 1]."""
    profile = PROFILES[options.profile]
    count = profile.phase if task.operator == PHASE else profile.images
    return torch.from_numpy(read_idx(DIGITS)[:count].copy())[:, None].float() / 255


def run_task(task: Task, options: Options) -> str:
    """Restores and scores; OUT/rows/TASK.json is written last. Returns a line on the outcome."""
    assert options.out
    if options.jobs > 1:
        torch.set_num_threads(1)
    file = options.out / "rows" / f"{task.file}.json"
    if file.exists():
        return ""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prior = Prior.load(options.prior).to(device)
    truth, problem = digits(task, options), Problem(task.operator, NOISES[task.operator])
    y = problem.simulate(truth, options.seed).to(device)
    began = time.perf_counter()
    result = solve(y, problem, prior, task.method, restarts=task.restarts, seed=options.seed)
    seconds = time.perf_counter() - began
    x = result.mean.cpu()
    row = asdict(task) | {
        "noise": NOISES[task.operator],
        "psnr": [round(float(value), 3) for value in psnr(x, truth)],
        "residual": result.trace[-1]["residual"],
        "evaluations": result.nfe,
        "seconds": seconds,
    }
    write_atomically(
        file.with_suffix(".safetensors"), safetensors.torch.save({"x": x.contiguous()})
    )
    write_json(file, row)
    return f"{task.file}: {statistics.median(row['psnr']):.2f} dB"


# ------------------------------------------------------------------------------------- the page


def retrieval(rows: list[dict[str, Any]]) -> str:
    """Phase retrieval: a line for each solver and number of restarts, best first."""
    lines = [["solver", "restarts", "evaluations", "median PSNR, dB", "share from 25 dB on"]]
    lines[0] += ["residual", "seconds"]
    for row in best_first(rows):
        share = statistics.mean(value >= SOLVED for value in row["psnr"])
        cells = [row["method"], str(row["restarts"]), str(row["evaluations"])]
        cells += [f"{statistics.median(row['psnr']):.2f}", f"{share:.2f}"]
        lines.append([*cells, f"{row['residual']:.2f}", f"{row['seconds']:.0f}"])
    return markdown(lines)


def others(rows: list[dict[str, Any]]) -> str:
    """The other operators: median PSNR of every solver, those with the best mean of them first."""
    operators = list(dict.fromkeys(row["operator"] for row in rows))
    lines = [["solver", "evaluations", *operators, "seconds"]]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in best_first(rows):
        found.setdefault(row["method"], {})[row["operator"]] = row
    shown = {
        method: [statistics.median(own[o]["psnr"]) for o in operators if o in own]
        for method, own in found.items()
    }
    for method in sorted(shown, key=lambda method: -statistics.mean(shown[method])):
        own = found[method]
        cells = [f"{statistics.median(own[o]['psnr']):.2f}" if o in own else "" for o in operators]
        evaluations = str(max(row["evaluations"] for row in own.values()))
        seconds = statistics.mean(row["seconds"] for row in own.values())
        lines.append([method, evaluations, *cells, f"{seconds:.0f}"])
    return markdown(lines)


def best_first(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by their median PSNR."""
    return sorted(rows, key=lambda row: -statistics.median(row["psnr"]))


def markdown(lines: list[list[str]]) -> str:
    """A table; the first line is its head."""
    rule = ["---", *("---:" for _ in lines[0][1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


READING = """\
Held-out digits, 28 x 28, and a prior learnt from noisy digits alone; every solver with its
defaults. PSNR is the median over the digits. *Residual*: chi-square per measured value at the
end; *seconds*: of all digits together, on a machine that may have been shared. `method="auto"`
takes red-diff as it is here, with four restarts for phase retrieval. The paper of `dps` has a
length of its pull for each task and 256 x 256 colour images; here it has the default for all.
Parts can be run at a time (`--methods`): what is not in the tables has not been run."""

RETRIEVED = """\
Magnitudes cannot tell an image from the same image turned by 180 degrees or moved within its
black borders. Without restarts a solver returns whichever it came upon, however well it fits.
With restarts, of the runs the one that fits best is kept, moved to where the prior expects an
image, and turned if the prior likes it better so; the evaluations that this takes are among those
shown."""


def page(folder: Path = RESULTS) -> str:
    """The page, from the figures kept in a folder; raises InputError if there are none."""
    parts = [
        "# Benchmark: operators that are not linear",
        "Written by `python benchmarks/nonlinear.py --table` from `benchmarks/results/`; made by "
        "`python benchmarks/nonlinear.py --out OUT --profile PROFILE`.",
        READING,
    ]
    kept = [folder / f"nonlinear-{name}.json" for name in ("small", "full")]
    if not any(file.exists() for file in kept):
        raise InputError(
            f"no figures in {folder}: put OUT/nonlinear.json there, as {kept[0].name}"
        )
    for file in filter(Path.exists, kept):
        result = json.loads(file.read_text())
        rows, how, made = (result[part] for part in ("rows", "settings", "machine"))
        phase = [row for row in rows if row["operator"] == PHASE]
        parts += [
            f"## {how['profile']}",
            f"Prior `{how['prior']}`; seed {how['seed']}; {made['cpu']}, "
            f"{made['gpu'] or 'no GPU'}, torch {made['torch']}, commit {made['commit']}.",
            f"### Phase retrieval, noise {NOISES[PHASE]:g}, {how['phase']} digits",
            RETRIEVED,
            retrieval(phase),
            f"### Noise 0.05, {how['images']} digits",
            others([row for row in rows if row["operator"] != PHASE]),
        ]
        picture = file.with_suffix(".png")
        if picture.exists():
            link = os.path.relpath(picture, PAGE.parent)
            parts.append(f"![Truth, measurement and restorations of two digits]({link})")
    return "\n\n".join(parts) + "\n"


def draw_picture(path: Path, rows: list[dict[str, Any]], options: Options) -> None:
    """Two lines for each task: truth, y, and every solver's image (with the most restarts)."""
    from matplotlib.figure import Figure

    assert options.out
    panels: dict[str, dict[str, Tensor]] = {}
    for operator, noise in NOISES.items():
        truth = digits(Task(operator, "red-diff"), options)
        y = Problem(operator, noise).simulate(truth, options.seed)
        # magnitudes are shown by their roots, around the middle
        y = F.interpolate(y.clamp_min(0).sqrt() / 2, (28, 28)) if operator == PHASE else y
        shown = {"truth": truth, "y": y}
        for row in (row for row in rows if row["operator"] == operator):
            task = Task(operator, row["method"], row["restarts"])
            file = options.out / "rows" / f"{task.file}.safetensors"
            shown[row["method"]] = safetensors.torch.load_file(file)["x"]
        for number in (0, 1):
            panels[f"{operator} ({number + 1})"] = {k: v[number] for k, v in shown.items()}
    columns = list(dict.fromkeys(label for shown in panels.values() for label in shown))
    blank = torch.ones(1, 28, 28)
    sheet = torch.cat(
        [
            torch.cat([F.pad(shown.get(c, blank)[0], (1,) * 4, value=1.0) for c in columns], 1)
            for shown in panels.values()
        ]
    )
    figure = Figure((0.8 * len(columns) + 1.6, 0.8 * len(panels) + 0.7), 110, layout="constrained")
    axes = figure.subplots()
    axes.imshow(sheet.clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    middles = [30 * (i + 0.5) for i in range(max(len(columns), len(panels)))]
    axes.set_xticks(middles[: len(columns)], columns, fontsize=8, rotation=30)
    axes.set_yticks(middles[: len(panels)], list(panels), fontsize=8)
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    axes.spines[:].set_visible(False)
    figure.savefig(path)


def settings(options: Options) -> dict[str, Any]:
    """All that decides a figure."""
    own = {"profile": options.profile, "prior": options.prior, "seed": options.seed}
    return own | asdict(PROFILES[options.profile])


def compare(options: Options) -> dict[str, Any]:
    """Runs what rows are missing, and writes OUT/nonlinear.json. Raises InputError."""
    if options.out is None:
        raise InputError("give --out, or --table")
    wanted = list(tasks(options))
    jobs = 1 if torch.cuda.is_available() else options.jobs
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for number, line in enumerate(pool.map(run_task, wanted, [options] * len(wanted)), 1):
            if line:
                print(f"{number}/{len(wanted)} {line}", file=sys.stderr, flush=True)
    everything = tasks(replace(options, methods=()))
    files = [options.out / "rows" / f"{task.file}.json" for task in everything]
    rows = [json.loads(file.read_text()) for file in files if file.exists()]
    result = {"settings": settings(options), "machine": machine(), "rows": rows}
    write_json(options.out / "nonlinear.json", result)
    draw_picture(options.out / "nonlinear.png", rows, options)
    return result


def main() -> int:
    options = tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        if options.table:
            write_atomically(PAGE, page().encode())
        else:
            rows = compare(options)["rows"]
            print(retrieval([row for row in rows if row["operator"] == PHASE]))
            print(others([row for row in rows if row["operator"] != PHASE]))
    except InputError as error:
        print(f"nonlinear.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
