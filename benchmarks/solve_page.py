"""The comparison of solvers as tables, pictures and a page."""

import json
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from provenance import ROOT, markdown
from solve_scores import ENOUGH, Row, groups, restored, shared
from solve_tasks import (
    NONLINEAR,
    PAPER,
    RUNS,
    PartName,
    SetName,
    images,
    operators,
    part_of,
)
from torch import Tensor
from torch.nn import functional as F

from unmurk.errors import InputError
from unmurk.problem import Problem
from unmurk.solvers import METHODS

__all__ = ["PAGE", "RESULTS", "details", "draw_picture", "duels", "page", "table", "tables"]

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmark_solve.md"
CHAMPION = "red-diff"
CHEAP = 100  # evaluations of each run that rivals may use

# columns of a table: title, field, format, and how several rows become one figure
Column = tuple[str, str, str, Callable[[list[float]], float]]
CLOSE: tuple[Column, ...] = (
    ("SSIM", "ssim", "{:.3f}", statistics.mean),
    ("LPIPS", "lpips", "{:.3f}", statistics.mean),
    ("accuracy", "accuracy", "{:.2f}", statistics.mean),
)
REAL: tuple[Column, ...] = (
    ("KID", "kid", "{:.3f}", statistics.mean),
    ("FD", "frechet", "{:.1f}", statistics.mean),
    ("SWD", "swd", "{:.4f}", statistics.mean),
)
COST: tuple[Column, ...] = (
    ("residual", "residual", "{:.2f}", statistics.median),
    ("ms/evaluation", "milliseconds", "{:.0f}", statistics.median),
    ("memory, MiB", "memory_mib", "{:.0f}", statistics.median),
)


def table(rows: list[Row], pools: list[Row]) -> str:
    """The solvers of one group (see `groups`), best first: means over the operators that all of
    them could treat. All columns but those in dB are of the last prior shown."""
    kinds = [k for k in ("clean", "flowdiff") if any(row["prior"] == k for row in rows)]
    last, own = kinds[-1], {kind: in_means(rows, kind) for kind in kinds}
    lines = []
    for method in dict.fromkeys(method for kind in kinds for method in own[kind]):
        every = [row for kind in kinds for row in own[kind].get(method, [])]
        shown = own[last].get(method, [])
        timed = [row | {"milliseconds": 1000 * row["seconds_per_evaluation"]} for row in shown]
        pool = [p for p in pools if (p["prior"], p["method"]) == (last, method)]
        line = {"solver": method}
        line["evaluations"] = f"{statistics.median(row['evaluations'] for row in every):.0f}"
        for kind in kinds:
            decibel: Column = (f"{kind} prior, dB", "psnr", "{:.2f}", statistics.mean)
            line |= cells(own[kind].get(method, []), (decibel,))
        line |= cells(timed, CLOSE) | cells(pool, REAL) | cells(timed, COST)
        score = statistics.mean(row["psnr"] for row in shown) if shown else -1e9
        lines.append((score, line))
    lines.sort(key=lambda entry: -entry[0])
    truth = [p for p in pools if (p["prior"], p["method"]) == (last, "truth")]
    ceiling = [{"solver": "*the truth itself*"} | cells(truth, REAL)] if truth else []
    return markdown(as_lines([line for _, line in lines] + ceiling))


def in_means(rows: list[Row], prior: str) -> dict[str, list[Row]]:
    """The rows behind a solver's means with one prior; see `shared`."""
    own = [row for row in rows if row["prior"] == prior]
    methods, operators = shared(own)
    kept = [row for row in own if row["operator"] in operators]
    found = {method: [row for row in kept if row["method"] == method] for method in methods}
    return {method: found[method] for method in methods if found[method]}


def cells(rows: list[Row], columns: tuple[Column, ...]) -> dict[str, str]:
    """One figure for each column that all rows have one for."""
    return {
        title: form.format(fold([row[field] for row in rows]))
        for title, field, form, fold in columns
        if rows and all(row[field] is not None for row in rows)
    }


def as_lines(lines: list[dict[str, str]]) -> list[list[str]]:
    """Head and lines; the columns are those of the fullest line."""
    head = list(max(lines, key=len, default={}))
    return [head, *([line.get(title, "") for title in head] for line in lines)]


def details(rows: list[Row]) -> str:
    """PSNR of every solver on every task among rows of one set, part and prior."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found = {(row["operator"], row["noise"], row["method"]): row for row in rows}
    lines = [["operator", "noise", *methods]]
    for operator, noise in dict.fromkeys((row["operator"], row["noise"]) for row in rows):
        own = [found.get((operator, noise, method)) for method in methods]
        lines.append([operator, f"{noise:g}", *decibels(own, "psnr")])
        if any(row and row.get("psnr_turned") is not None for row in own):
            turned = decibels(own, "psnr_turned")
            lines.append([f"{operator}, up to a turn", f"{noise:g}", *turned])
    return markdown(lines)


def decibels(rows: list[Row | None], field: str) -> list[str]:
    """A field as text; empty where there is no row or an error."""
    return [f"{row[field]:.2f}" if row and row["error"] is None else "" for row in rows]


# ------------------------------------------------------------------------- one against the others


def duels(rows: list[Row]) -> list[Row]:
    """`red-diff` against each other solver, on the tasks that both did: differences in dB.

    The first line is against the best of the others on each task that needs no more than CHEAP
    evaluations a run: a rival that chooses its solver with the truth in hand.
    """
    by: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row["error"] is None:
            key = (row["prior"], row["operator"], row["noise"])
            by.setdefault(key, {})[row["method"]] = row
    by = {key: found for key, found in by.items() if CHAMPION in found}
    gaps: dict[str, dict[tuple[Any, ...], float]] = {}
    cost: dict[str, int] = {}
    for key, found in by.items():
        mine, cheap = found.pop(CHAMPION)["psnr"], []
        for method, row in found.items():
            cost[method] = row["evaluations"] // RUNS.get(row["operator"], 1)
            gaps.setdefault(method, {})[key] = mine - row["psnr"]
            if cost[method] <= CHEAP:
                cheap.append(row["psnr"])
        if cheap:
            gaps.setdefault("", {})[key] = mine - max(cheap)
    order = sorted(gaps, key=lambda m: (m != "", statistics.mean(gaps[m].values())))
    return [
        {
            "rival": method,
            "evaluations": cost.get(method),
            "tasks": len(gaps[method]),
            "mean": statistics.mean(gaps[method].values()),
            "worst": min(gaps[method].values()),
            "at": min(gaps[method], key=lambda key: gaps[method][key]),
            "won": sum(gap > 0 for gap in gaps[method].values()),
        }
        for method in order
    ]


def verdict(rows: list[Row]) -> Iterator[str]:
    """The duels in words, and as a table."""
    found = duels(rows)
    for duel in found:
        if duel["rival"] in ("", PAPER):
            rival = f"its paper preset ({duel['evaluations']} evaluations)"
            if not duel["rival"]:
                rival = f"the best of the others with at most {CHEAP} evaluations, chosen "
                rival += "for each task by the truth"
            yield (
                f"`{CHAMPION}` against {rival}: {duel['mean']:+.2f} dB on average over "
                f"{duel['tasks']} tasks, better on {duel['won']}, at worst "
                f"{duel['worst']:+.2f} dB ({spoken(duel['at'])})."
            )
    head = f"`{CHAMPION}` against,evaluations,tasks,better on,mean dB,worst,where"
    lines = [head.split(",")]
    for duel in found:
        lines.append(
            [
                duel["rival"] or f"*the best with at most {CHEAP} evaluations*",
                "" if duel["evaluations"] is None else str(duel["evaluations"]),
                str(duel["tasks"]),
                str(duel["won"]),
                f"{duel['mean']:+.2f}",
                f"{duel['worst']:+.2f}",
                spoken(duel["at"]),
            ]
        )
    if found:
        yield markdown(lines)


def spoken(key: tuple[Any, ...]) -> str:
    """A task in words."""
    prior, operator, noise = key
    return f"{operator}, noise {noise:g}, {prior} prior"


# ------------------------------------------------------------------------------------- the page

READING = f"""\
Every solver with its defaults; "red-diff paper" is the released algorithm with 1,000 evaluations
and its settings for the task. Priors were learnt with the same network, from clean images, and
by `flowdiff` from noisy ones alone. Figures are means over images and over the operators that all
solvers of the table could treat; those after the decibels are of the last prior shown. Columns for
which there are no figures are left out.

- *Evaluations* of the network for each image. Solvers that differentiate it (`dps`, `pigdm`,
  `tmpd`, `mmps`) pay more for each, as *ms/evaluation* shows: the time of all images together over
  the evaluations, on a CPU in one thread. *Memory*: what the solver took beyond what was held
  before.
- *Accuracy*: share of the restored digits that a classifier reads as what they are.
- *KID* (kernel distance, unbiased) and *FD* (Frechet distance) on the classifier's 128 features,
  *SWD* (sliced Wasserstein distance of 7 x 7 patches): the images of all operators of the table
  together, against clean test images that are not among the restored; lower is better. The last
  line has the true images in their place: what is below its figures or near them is as good as
  these images can tell. FD is shown from {ENOUGH} images on: of fewer it says more of their number
  than of what they look like. No network is at hand whose features suit nuclei, so they have SWD
  alone.
- *Residual*: chi-square per measured value at the end, 1 for a good fit (below: the noise is
  fitted, above: the data are missed).
- LPIPS is taken where the extra `inception` and its weights are there.

Sampling solvers (`docs/certification.md`) pay for their spread with the distance of one sample:
their mean over several is better. Parts can be run at a time: what is not in the tables has not
been run, and a solver that has not run all of a table's tasks is in the last tables alone."""

NONLINEAR_READING = f"""\
Operators that are not linear, for the solvers that do not need a linear one. Phase retrieval:
{RUNS["phase:fourier,oversample=2"]} runs of each image for every solver, of which the one of least
residual is kept (evaluations count all). An image turned by 180 degrees or shifted has nearly the
same data; *up to a turn* takes the better of x and x turned, a shift counts as wrong. "red-diff
paper" and `hrdis` begin where the released code does: y, half its contrast (HDR), or the middle of
the inverse transform of the magnitudes."""


def tables(result: dict[str, Any]) -> Iterator[str]:
    """The tables of a result, with their headings."""
    rows, pools = result["rows"], result["pools"]
    for (name, part, noise), group in groups(rows):
        key = (name, part, noise)
        own = [p for p in pools if (p["set"], p["part"], p["noise"]) == key]
        title = f"{name}, noise {noise:g}" if noise is not None else f"{name}, not linear"
        yield f"### {title}"
        if part == "nonlinear":
            yield NONLINEAR_READING
        count = {pool["images"] for pool in own if pool["prior"] == own[-1]["prior"]}
        if count:
            yield f"KID, FD and SWD: {max(count)} images against {own[-1]['references']}."
        yield table(group, own)
        short = unfinished(group)
        if short:
            yield short
    for name, part in dict.fromkeys((row["set"], part_of(row["operator"])) for row in rows):
        group = [row for row in rows if (row["set"], part_of(row["operator"])) == (name, part)]
        yield f"### {name}, {part}: single tasks"
        yield from verdict(group)
        for prior in dict.fromkeys(row["prior"] for row in group):
            yield f"PSNR, {prior} prior:"
            yield details([row for row in group if row["prior"] == prior])


def unfinished(rows: list[Row]) -> str:
    """Who is not in the means of a group, and what could not be treated."""
    said = []
    for prior in dict.fromkeys(row["prior"] for row in rows):
        own = [row for row in rows if row["prior"] == prior]
        methods, common = shared(own)
        every = dict.fromkeys(row["operator"] for row in own)
        absent = [m for m in dict.fromkeys(row["method"] for row in own) if m not in methods]
        if absent:
            said.append(f"Not in the means ({prior} prior): {', '.join(absent)}.")
        for row in own:
            if row["error"] is not None:
                said.append(f"{row['method']} on {row['operator']} ({prior}): {row['error']}.")
        left = [operator for operator in every if operator not in common]
        if left and methods:
            said.append(f"Left out of the means ({prior} prior): {', '.join(left)}.")
    return "\n".join(f"- {line}" for line in said)


def conditions(result: dict[str, Any]) -> str:
    """Under what conditions the figures were made, in words."""
    how, made = result["settings"], result["machine"]
    commits = dict.fromkeys(row.get("commit") or "not noted" for row in result["rows"])
    kimg = "; ".join(f"{name} {a:g} and {b:g}" for name, (a, b) in how["kimg"].items())
    count = {row["set"]: row["images"] for row in result["rows"]}
    return (
        f"Network `{how['network']}`; thousands of images seen for the clean and the flowdiff "
        f"prior: {kimg}. Images restored: "
        f"{', '.join(f'{number} {name}' for name, number in count.items())}; seed {how['seed']}. "
        f"{made['cpu']}, {made['gpu'] or 'no GPU'}, torch {made['torch']}; rows at commit "
        f"{', '.join(commits)}, scores at {made['commit']}."
    )


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
        parts += [f"## {result['settings']['profile']}", conditions(result), *tables(result)]
        for picture in sorted(folder.glob(f"{file.stem}-*.png")):
            link = os.path.relpath(picture, PAGE.parent)
            what = picture.stem.removeprefix(f"{file.stem}-")
            parts.append(f"![{what}: truth, measurement and restorations]({link})")
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------- pictures


def draw_picture(
    path: Path, rows: list[Row], folder: Path, name: SetName, part: PartName, seed: int
) -> None:
    """A line for each operator at its first noise level: truth, y, and every solver's image,
    with the flowdiff prior if there are rows of it."""
    own = [r for r in rows if r["set"] == name and part_of(r["operator"]) == part]
    own = [r for r in own if r["error"] is None]
    kind = "flowdiff" if any(r["prior"] == "flowdiff" for r in own) else "clean"
    own = [r for r in own if r["prior"] == kind]
    panels: dict[str, dict[str, Tensor]] = {}
    for operator in operators(name) if part == "linear" else NONLINEAR:
        of_operator = [r for r in own if r["operator"] == operator]
        noise = first_noise(of_operator)
        shown = {r["method"]: r for r in of_operator if r["noise"] == noise}
        if not shown or noise is None:
            continue
        truth = images(name, "test")[: next(iter(shown.values()))["images"]]
        problem = Problem(operator, noise).bind(range(len(truth)), truth.shape[1:])
        y = problem.simulate(truth, seed)
        panels[operator] = {"truth": truth[1]}
        panels[operator]["y"] = sized(y, truth)[1]
        for method in (*METHODS, PAPER):
            if method in shown:
                panels[operator][method] = restored(shown[method], folder)[1]
    if panels:
        paint(path, panels, truth.shape[-1])


def first_noise(rows: list[Row]) -> float | None:
    """The noise level that most solvers ran at, the first where they are equal."""
    levels = [row["noise"] for row in rows]
    return max(dict.fromkeys(levels), key=levels.count, default=None)


def sized(y: Tensor, x: Tensor) -> Tensor:
    """y in the size of x: as it is, its pixels enlarged, or its middle."""
    if y.shape[-1] < x.shape[-1]:
        return F.interpolate(y, x.shape[-2:], mode="nearest")
    cut = [(n - m) // 2 for n, m in zip(y.shape[-2:], x.shape[-2:], strict=True)]
    return F.pad(y, (-cut[1], -cut[1], -cut[0], -cut[0]))


def paint(path: Path, panels: dict[str, dict[str, Tensor]], side: int) -> None:
    """Panels by line and column, (1, side, side) each, into a file."""
    from matplotlib.figure import Figure

    columns = list(dict.fromkeys(label for shown in panels.values() for label in shown))
    blank = torch.ones(1, side, side)
    tiles = [
        torch.cat(
            [F.pad(shown.get(c, blank)[0].clamp(0, 1), (1,) * 4, value=1.0) for c in columns], 1
        )
        for shown in panels.values()
    ]
    figure = Figure((0.8 * len(columns) + 1.6, 0.8 * len(panels) + 0.7), 110, layout="constrained")
    axes = figure.subplots()
    sheet = torch.cat(tiles).numpy()
    axes.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    centres = [(side + 2) * (i + 0.5) for i in range(max(len(columns), len(panels)))]
    axes.set_xticks(centres[: len(columns)], columns, fontsize=7, rotation=30)
    axes.set_yticks(centres[: len(panels)], list(panels), fontsize=7)
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    axes.spines[:].set_visible(False)
    figure.savefig(path)
