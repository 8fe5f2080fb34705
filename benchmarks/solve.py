"""Every solver on every task, with priors learnt from clean and from noisy images.

Held-out digits (28 x 28) and nuclei (64 x 64) of the package are measured by operators at several
noise levels and restored by every solver that can treat the operator, with its defaults. Two
priors for each set, of the same network and the same budget of time: one learnt from clean
images, one by `flowdiff` from images with noise 0.3 (digits) or 0.2 (nuclei) alone.

    python benchmarks/solve.py --out OUT                      # two cores
    python benchmarks/solve.py --out OUT --profile full       # a GPU
    python benchmarks/solve.py --table

First the priors are learnt, into OUT/priors; then rows are added to OUT/rows as they are done,
by as many processes as `--jobs` says. The same command goes on where the last one ended.
OUT/solve.json has all figures, OUT/solve-SET.png pictures. From copies kept as
benchmarks/results/solve-PROFILE.json (and .png) `--table` writes docs/benchmark_solve.md.
"""

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

import numpy as np
import safetensors.torch
import torch
import tyro
from provenance import ROOT, forget_peak, held, machine, peak, write_json
from torch import Tensor
from torch.nn import functional as F

import unmurk
from unmurk.errors import InputError
from unmurk.images import read_idx
from unmurk.learn import Settings, learn
from unmurk.learn.loop import write_atomically
from unmurk.metrics import load_digit_classifier, psnr, ssim
from unmurk.prior import Prior
from unmurk.problem import Problem
from unmurk.solve import METHODS, solve

__all__: list[str] = []

SetName = Literal["digits", "nuclei"]
PriorName = Literal["clean", "flowdiff"]
ProfileName = Literal["small", "full", "toy"]
ASSETS = Path(unmurk.__file__).parent / "assets"
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmark_solve.md"
LEARNT_AT = {"digits": 0.3, "nuclei": 0.2}  # noise of the images that flowdiff learns from
HOLE = {"digits": 10, "nuclei": 24}
PAPER = "red-diff paper"


@dataclass(frozen=True)
class Profile:
    """How large the comparison is.

    Attributes:
        network: Preset of the networks.
        batch: Images in a step of learning.
        kimg: Images seen by (clean, flowdiff), for digits and for nuclei.
        images: Images restored, of digits and of nuclei.
        noises: Noise levels of the measurements.
        slow: Network evaluations above which a solver runs at the first noise level only.
        left_out: Solvers that a profile has no time for at all.
    """

    network: str
    batch: int
    kimg: dict[SetName, tuple[float, float]]
    images: dict[SetName, int]
    noises: tuple[float, ...]
    slow: int
    left_out: tuple[str, ...] = ()


PROFILES = {
    "small": Profile(
        *("tiny", 32),
        {"digits": (36.0, 102.0), "nuclei": (20.0, 45.0)},
        {"digits": 16, "nuclei": 4},
        *((0.05, 0.2, 0.01), 150),
        left_out=("tds",),  # 1280 evaluations with gradient for each sample
    ),
    "full": Profile(
        *("small", 128),
        {"digits": (2000.0, 3000.0), "nuclei": (1000.0, 1500.0)},
        {"digits": 256, "nuclei": 100},
        *((0.05, 0.2, 0.01), 10**9),
    ),
    "toy": Profile(
        *("tiny", 8),
        {"digits": (0.016, 0.032), "nuclei": (0.008, 0.016)},
        {"digits": 2, "nuclei": 2},
        *((0.05,), 0),
    ),
}


@dataclass(frozen=True)
class Options:
    """Compare the solvers with learnt priors."""

    out: Path | None = None
    """Folder for priors, rows, figures and pictures."""
    profile: ProfileName = "small"
    """small: two cores; full: a GPU; toy: seconds, figures without meaning."""
    sets: tuple[SetName, ...] = ("digits", "nuclei")
    """Image sets to run now."""
    priors: tuple[PriorName, ...] = ("clean", "flowdiff")
    """Priors to run now."""
    methods: tuple[str, ...] = ()
    """Solvers to run now; none named: all."""
    noises: tuple[float, ...] = ()
    """Noise levels to run now, of the profile's; none named: all."""
    jobs: int = 2
    """Processes, each of one thread, that share the rows on a CPU."""
    seed: int = 0
    """Seed of noise, weights and draws."""
    table: bool = False
    """Write docs/benchmark_solve.md from benchmarks/results/ and run nothing."""


def operators(name: SetName) -> tuple[str, ...]:
    """The tasks of a set: text forms of operators."""
    return (
        "identity",
        f"inpaint:box,size={HOLE[name]}",
        "inpaint:random,keep=0.4",
        "sr:average,factor=4",
        "blur:gaussian,sigma=1.5",
        "blur:motion,length=9,angle=30",
    )


def images(name: SetName, part: Literal["train", "test"]) -> Tensor:
    """Clean images (N, 1, H, W) in [0, 1]."""
    if name == "digits":
        data = read_idx(ASSETS / "digits" / f"{part}.idx3-ubyte.gz")
        return torch.from_numpy(data.copy())[:, None].float() / 255
    with np.load(ASSETS / "nuclei" / "nuclei.npz", allow_pickle=False) as file:
        data = file["train" if part == "train" else "val"]
    return torch.from_numpy(data.copy()).permute(0, 3, 1, 2).float() / 255


def labels(count: int) -> Tensor:
    """What the first test digits are, (count,)."""
    return torch.from_numpy(read_idx(ASSETS / "digits" / "test.idx1-ubyte.gz").copy())[:count]


# -------------------------------------------------------------------------------------- the priors


def learn_prior(name: SetName, kind: PriorName, options: Options) -> None:
    """Learns the prior of a set into OUT/priors/SET-KIND, or finds it there."""
    assert options.out
    profile = PROFILES[options.profile]
    folder = options.out / "priors" / f"{name}-{kind}"
    if (folder / "prior").exists():
        return
    x, problem = images(name, "train"), Problem("identity", LEARNT_AT[name])
    budget = profile.kimg[name][kind == "flowdiff"]
    settings = Settings(profile.network, budget, profile.batch, seed=options.seed)
    data = x if kind == "clean" else problem.simulate(x, options.seed)
    prior, _ = learn(data, problem, kind, out=folder, settings=settings)
    prior.save(folder / "prior")


# ---------------------------------------------------------------------------------------- the rows


@dataclass(frozen=True)
class Task:
    """One row: a solver on a problem with a prior."""

    set: SetName
    prior: PriorName
    operator: str
    noise: float
    method: str

    @property
    def file(self) -> str:
        text = "-".join((self.set, self.prior, self.operator, f"{self.noise:g}", self.method))
        return "".join(c if c.isalnum() or c in "-.=" else "_" for c in text)


def tasks(options: Options) -> Iterator[Task]:
    """The rows of a profile, the first noise level first."""
    profile = PROFILES[options.profile]
    fit = [m for m in METHODS if m not in profile.left_out]
    wanted = options.methods or (*fit, PAPER)
    unknown = [m for m in wanted if m not in METHODS and m != PAPER]
    if unknown:
        raise InputError(f"method '{unknown[0]}' is unknown: choose from {', '.join(METHODS)}")
    for noise in options.noises or profile.noises:
        for name in options.sets:
            for operator in operators(name):
                for prior in options.priors:
                    for method in wanted:
                        yield Task(name, prior, operator, noise, method)


def chosen(task: Task) -> dict[str, Any]:
    """Method and options of a row: defaults, but for the paper preset the released settings.

    They are by task (Mardani et al., 2023, arXiv 2305.04391, released code): lr 0.25 for
    inpainting, with lam 1 where there is noise to speak of, lr 0.5 for blur and 0.1 for averages,
    lam 0.25. Denoising, not among them, has those of inpainting.
    """
    if task.method != PAPER:
        return {"method": task.method}
    family = task.operator.split(":")[0]
    lr = {"blur": 0.5, "sr": 0.1}.get(family, 0.25)
    lam = 1.0 if family in ("inpaint", "identity") and task.noise >= 0.05 else 0.25
    return {"method": "red-diff", "preset": "paper", "lr": lr, "lam": lam}


def run_task(task: Task, options: Options) -> str:
    """Restores and scores; OUT/rows/TASK.json is written last. Returns a line on the outcome."""
    assert options.out
    if options.jobs > 1:
        torch.set_num_threads(1)
    profile, rows = PROFILES[options.profile], options.out / "rows"
    file = rows / f"{task.file}.json"
    if file.exists() or too_slow(task, options):
        return ""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prior = Prior.load(options.out / "priors" / f"{task.set}-{task.prior}" / "prior").to(device)
    truth = images(task.set, "test")[: profile.images[task.set]]
    problem = Problem(task.operator, task.noise)
    y = problem.simulate(truth, options.seed).to(device)
    row: dict[str, Any] = asdict(task) | {"images": len(truth), "error": None}
    try:
        forget_peak()
        began, before = time.perf_counter(), held()
        result = solve(y, problem, prior, seed=options.seed, **chosen(task))
        seconds, memory = time.perf_counter() - began, peak() - before
    except InputError as error:
        write_json(file, row | {"error": str(error)})
        return f"{task.file}: {error}"
    row |= scores(task, result.mean.cpu(), truth)
    row |= {
        "residual": result.trace[-1]["residual"],
        "evaluations": result.nfe,
        "seconds_per_evaluation": seconds / max(result.nfe, 1),
        "memory_mib": memory,
    }
    write_atomically(
        rows / f"{task.file}.safetensors",
        safetensors.torch.save({"x": result.mean.cpu().contiguous()}),
    )
    write_json(file, row)
    return f"{task.file}: {row['psnr']:.2f} dB"


def too_slow(task: Task, options: Options) -> bool:
    """Whether a profile has no time for it: its row at the first noise level cost too much."""
    assert options.out
    profile = PROFILES[options.profile]
    first = Task(task.set, task.prior, task.operator, profile.noises[0], task.method)
    file = options.out / "rows" / f"{first.file}.json"
    if task.noise == first.noise or not file.exists():
        return False
    return (json.loads(file.read_text()).get("evaluations") or 0) > profile.slow


def scores(task: Task, x: Tensor, truth: Tensor) -> dict[str, Any]:
    """PSNR and SSIM, medians over images; for digits the share that is read as what it is."""
    found: dict[str, Any] = {
        "psnr": float(psnr(x, truth).mean()),
        "psnr_median": float(psnr(x, truth).median()),
        "ssim": float(ssim(x, truth).mean()),
        "accuracy": None,
    }
    if task.set == "digits":
        read = load_digit_classifier()(x.clamp(0, 1)).argmax(1)
        found["accuracy"] = float((read == labels(len(x))).float().mean())
    return found


# ------------------------------------------------------------------------------------- the page


def table(rows: list[dict[str, Any]], name: SetName) -> str:
    """The solvers of a set, best first: means over the tasks that all of them ran."""
    rows = [row for row in rows if row["set"] == name and row["error"] is None]
    kinds = [k for k in ("clean", "flowdiff") if any(row["prior"] == k for row in rows)]
    head = ["solver", "evaluations", *(f"{kind} prior, dB" for kind in kinds)]
    head += ["SSIM", "accuracy"]
    head += ["residual", "ms/evaluation", "memory, MiB"]
    if name != "digits":
        head.remove("accuracy")
    ran = {m: {key(r) for r in rows if r["method"] == m} for m in {r["method"] for r in rows}}
    common = set.intersection(*ran.values()) if ran else set()
    lines = []
    for method in ran:
        own = [row for row in rows if row["method"] == method and key(row) in common]
        by = {kind: [row for row in own if row["prior"] == kind] for kind in kinds}
        values = [mean(by[kind], "psnr") for kind in by]
        last = by[kinds[-1]]
        cells = [method, f"{statistics.median(row['evaluations'] for row in own):.0f}"]
        cells += ["" if v is None else f"{v:.2f}" for v in values]
        cells.append(f"{mean(last, 'ssim'):.3f}")
        if name == "digits":
            cells.append(f"{mean(last, 'accuracy'):.2f}")
        cells.append(f"{statistics.median(row['residual'] for row in last):.2f}")
        pace = statistics.median(row["seconds_per_evaluation"] for row in last)
        cells.append(f"{1000 * pace:.0f}")
        cells.append(f"{statistics.median(row['memory_mib'] for row in last):.0f}")
        lines.append((values[-1] if values[-1] is not None else values[0], cells))
    lines.sort(key=lambda line: -(line[0] or 0.0))
    return markdown([head, *(cells for _, cells in lines)])


def details(rows: list[dict[str, Any]], name: SetName, prior: PriorName) -> str:
    """PSNR of every solver on every task, with one prior."""
    own = [row for row in rows if row["set"] == name and row["prior"] == prior]
    methods = list(dict.fromkeys(row["method"] for row in own))
    found = {(row["operator"], row["noise"], row["method"]): row for row in own}
    lines = [["operator", "noise", *methods]]
    for operator, noise in dict.fromkeys((row["operator"], row["noise"]) for row in own):
        cells = []
        for method in methods:
            row = found.get((operator, noise, method))
            shown = row is not None and row["error"] is None
            cells.append(f"{row['psnr']:.2f}" if row is not None and shown else "")
        lines.append([operator, f"{noise:g}", *cells])
    return markdown(lines)


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Which task a row is of."""
    return row["prior"], row["operator"], row["noise"]


def mean(rows: list[dict[str, Any]], field: str) -> float | None:
    """Mean of a field, or None without rows."""
    return statistics.mean(row[field] for row in rows) if rows else None


def markdown(lines: list[list[str]]) -> str:
    """A table; the first line is its head."""
    rule = ["---", *("---:" for _ in lines[0][1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


READING = """\
Every solver with its defaults; "red-diff paper" is the released algorithm with 1,000 evaluations
and its settings for the task. Priors were learnt with the same network, from clean images, and
by `flowdiff` from noisy ones alone. Figures are means over images and over the tasks that all
solvers ran; SSIM and the columns after it are those of the last prior shown. *Accuracy*: share
of the restored digits that a classifier reads as what they are. *Residual*: chi-square per
measured value at the end, 1 for a good fit (below: the noise is fitted, above: the data are
missed). *ms/evaluation*: the time of all images together over the evaluations. *Memory*: what
the solver took beyond what was held before. LPIPS is not shown: its weights cannot be had
without a network. Sampling solvers (`docs/certification.md`) pay for their spread with the
distance of one sample: their mean over several is better. Parts can be run at a time: what is
not in the tables has not been run."""


def page(folder: Path = RESULTS) -> str:
    """The page, from the figures kept in a folder; raises InputError if there are none."""
    parts = [
        "# Benchmark: solvers with learnt priors",
        "Written by `python benchmarks/solve.py --table` from `benchmarks/results/`; made by "
        "`python benchmarks/solve.py --out OUT --profile PROFILE`.",
        READING,
    ]
    kept = [folder / f"solve-{name}.json" for name in ("small", "full")]
    if not any(file.exists() for file in kept):
        raise InputError(f"no figures in {folder}: put OUT/solve.json there as solve-small.json")
    for file in filter(Path.exists, kept):
        result = json.loads(file.read_text())
        rows, how = result["rows"], result["settings"]
        parts.append(f"## {how['profile']}")
        made = result["machine"]
        parts.append(
            f"Network `{how['network']}`; kimg for (clean, flowdiff): {how['kimg']}; images: "
            f"{how['images']}; seed {how['seed']}; {made['cpu']}, "
            f"{made['gpu'] or 'no GPU'}, torch {made['torch']}, commit {made['commit']}."
        )
        for name in dict.fromkeys(row["set"] for row in rows):
            parts += [f"### {name}", table(rows, name)]
            picture = file.with_name(f"{file.stem}-{name}.png")
            if picture.exists():
                link = os.path.relpath(picture, PAGE.parent)
                parts.append(f"![{name}: truth, measurement and restorations]({link})")
            for prior in dict.fromkeys(row["prior"] for row in rows if row["set"] == name):
                parts += [f"PSNR, {prior} prior:", details(rows, name, prior)]
    return "\n\n".join(parts) + "\n"


def draw_picture(path: Path, name: SetName, options: Options) -> None:
    """A line for each task at the first noise level: truth, A^+ y, and every solver's image."""
    from matplotlib.figure import Figure

    assert options.out
    noise = PROFILES[options.profile].noises[0]
    truth = images(name, "test")[: PROFILES[options.profile].images[name]]
    kind: PriorName = "flowdiff" if "flowdiff" in options.priors else "clean"
    panels: dict[str, dict[str, Tensor]] = {}
    for operator in operators(name):
        problem = Problem(operator, noise)
        start = problem.at(range(len(truth)), truth.shape[1:])
        y = problem.simulate(truth, options.seed)
        panels[operator] = {"truth": truth[1], "A+ y": start.A_dagger(y)[1]}
        for method in (*METHODS, PAPER):
            file = options.out / "rows" / f"{Task(name, kind, operator, noise, method).file}"
            stored = file.with_name(file.name + ".safetensors")
            if stored.exists():
                panels[operator][method] = safetensors.torch.load_file(stored)["x"][1]
    columns = list(dict.fromkeys(label for shown in panels.values() for label in shown))
    blank = torch.ones_like(truth[0])
    tiles = [
        torch.cat(
            [F.pad(shown.get(c, blank)[0].clamp(0, 1), (1,) * 4, value=1.0) for c in columns], 1
        )
        for shown in panels.values()
    ]
    sheet = torch.cat(tiles)
    side = truth.shape[-1] + 2
    figure = Figure((0.8 * len(columns) + 1.6, 0.8 * len(panels) + 0.7), 110, layout="constrained")
    axes = figure.subplots()
    axes.imshow(sheet.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks(
        [side * (i + 0.5) for i in range(len(columns))], columns, fontsize=7, rotation=30
    )
    axes.set_yticks([side * (i + 0.5) for i in range(len(panels))], list(panels), fontsize=7)
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    axes.spines[:].set_visible(False)
    figure.savefig(path)


def settings(options: Options) -> dict[str, Any]:
    """All that decides a figure."""
    return {"profile": options.profile, "seed": options.seed} | asdict(PROFILES[options.profile])


def compare(options: Options) -> dict[str, Any]:
    """Learns what priors are missing, runs what rows are missing, and writes OUT/solve.json."""
    if options.out is None:
        raise InputError("give --out, or --table")
    wanted = list(tasks(options))
    for name in options.sets:
        for kind in options.priors:
            print(f"prior of {name}, {kind} ...", file=sys.stderr, flush=True)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                process.submit(learn_prior, name, kind, options).result()
    jobs = 1 if torch.cuda.is_available() else options.jobs
    began = time.perf_counter()
    # the first noise level decides what is too slow for the others
    for noise in options.noises or PROFILES[options.profile].noises:
        now = [task for task in wanted if task.noise == noise]
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            for number, line in enumerate(pool.map(run_task, now, [options] * len(now)), 1):
                if line:
                    spent = time.perf_counter() - began
                    print(
                        f"{noise:g}: {number}/{len(now)} {line} ({spent:.0f} s)", file=sys.stderr
                    )
    files = sorted((options.out / "rows").glob("*.json"))
    order = {m: i for i, m in enumerate((*METHODS, PAPER))}
    rows = [json.loads(file.read_text()) for file in files]
    rows.sort(key=lambda r: (r["set"], r["prior"], r["noise"], r["operator"], order[r["method"]]))
    result = {"settings": settings(options), "machine": machine(), "rows": rows}
    write_json(options.out / "solve.json", result)
    for name in options.sets:
        draw_picture(options.out / f"solve-{name}.png", name, options)
    return result


def main() -> int:
    options = tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        if options.table:
            write_atomically(PAGE, page().encode())
        else:
            result = compare(options)
            for name in options.sets:
                print(table(result["rows"], name))
    except InputError as error:
        print(f"solve.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
