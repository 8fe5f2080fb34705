"""The rows of the suite, and what its page says of their figures."""

import statistics
from collections.abc import Collection
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

from benchmarks.captures.sets import SetName
from benchmarks.common import Row, markdown

__all__ = ["LABELS", "RATES", "RowName", "finding", "table", "view"]

RowName = Literal[
    "capture",
    "average",
    "gaussian_anscombe",
    "nlm_anscombe",
    "bm3d_anscombe",
    "noise2void",
    "flowdiff",
    "flowdiff_repeats",
    "flowdiff_clean",
    "flowdiff_generic",
    "generic",
    "large",
]
RATES = {"noise2void": 5.3} | dict.fromkeys(
    ("flowdiff", "flowdiff_repeats", "flowdiff_clean", "flowdiff_generic"), 10.0
)
"""Thousands of crops that a row sees in a minute, as counted on two cores of an Intel Xeon
without other load. A budget in minutes is turned into crops by it, so that no figure depends on
the load."""

LABELS: dict[str, str] = {
    "capture": "the capture itself",
    "average": "the average of five captures",
    "gaussian_anscombe": "Gaussian filter, transform",
    "nlm_anscombe": "non-local means, transform",
    "bm3d_anscombe": "BM3D, transform",
    "noise2void": "Noise2Void",
    "flowdiff": "`flowdiff`, from nothing",
    "flowdiff_repeats": "`flowdiff`, repeated captures",
    "flowdiff_clean": "`flowdiff` with a few clean images",
    "flowdiff_generic": "`flowdiff`, from `generic`",
    "generic": "`generic`, nothing learned",
}
TARGETS = {
    5.0: (("bm3d_anscombe", 0.0), ("noise2void", 0.4)),
    15.0: (("bm3d_anscombe", 0.2),),
}
"""dB by which flowdiff, from nothing or a start, is to be above another row, by minutes."""


@dataclass(frozen=True)
class Line:
    """A line of the table: all folds and seeds of a row with one budget."""

    row: str
    minutes: float | None
    fields: dict[int, dict[int, Row]]
    """The results of a fold, by seed and fold."""

    def median(self, score: str = "psnr", folds: Collection[int] | None = None) -> float:
        """The median over the held-out fields, averaged over the seeds."""
        return statistics.mean(self.medians(score, folds))

    def medians(self, score: str = "psnr", folds: Collection[int] | None = None) -> list[float]:
        """The median over the held-out fields of some folds (None: of all) for each seed."""
        return [
            statistics.median(
                [v for k, row in rows.items() if folds is None or k in folds for v in row[score]]
            )
            for rows in self.fields.values()
        ]

    def cost(self, key: str) -> float | None:
        """The mean of a cost over folds and seeds."""
        every = [row for rows in self.fields.values() for row in rows.values()]
        values = [row[key] for row in every if key in row]
        return statistics.mean(values) if values else None

    def has(self, score: str) -> bool:
        """Whether every field has a score."""
        return all(score in row for rows in self.fields.values() for row in rows.values())

    def several(self) -> bool:
        """Whether there is more than one field."""
        return sum(len(row["psnr"]) for row in next(iter(self.fields.values())).values()) > 1

    def folds(self) -> set[int]:
        """The folds that every seed has."""
        return set.intersection(*(set(rows) for rows in self.fields.values()))


def lines_of(result: Row, which: str) -> list[Line]:
    """The lines of a set, in the order of the rows and budgets."""
    found: dict[tuple[str, float | None], dict[int, dict[int, Row]]] = {}
    for stem, row in result["results"].items():
        name, *rest = stem.split("-")
        if name != which:
            continue
        minutes = float(rest[2].removesuffix("min")) if len(rest) > 2 else None
        seed = int(rest[3]) if len(rest) > 2 else 0
        found.setdefault((rest[0], minutes), {}).setdefault(seed, {})[int(rest[1])] = row
    order = list(LABELS)
    keys = sorted(found, key=lambda key: (order.index(key[0]), key[1] or 0))
    return [Line(*key, found[key]) for key in keys]


def table(result: Row, which: str) -> str:
    """The figures of a set; a row that was not run has no line."""
    heads = ["", "minutes", "fields", "seeds", "PSNR, dB", "lowest", "highest", "bright part, dB"]
    heads += ["SSIM", "as published, dB", "spread / error", "held by 90 %"]
    lines = [[*heads, "strength", "learning, s", "kimg", "restoring, s"]]
    for line in lines_of(result, which):
        first = next(iter(line.fields.values()))
        cells = [LABELS[line.row], "" if line.minutes is None else f"{line.minutes:g}"]
        cells += [str(sum(len(row["published"]) for row in first.values())), str(len(line.fields))]
        cells += quality(line) + [f"{line.median('published'):.2f}"]
        for score, form in (("spread", ".2f"), ("coverage", ".1%")):
            cells.append(format(line.median(score), form) if line.has(score) else "")
        for key, form in (("strength", ".2g"), ("seconds", ".0f"), ("kimg", "g")):
            cost = line.cost(key)
            cells.append("" if cost is None else format(cost, form))
        restoring = line.cost("restoring")
        lines.append([*cells, "" if restoring is None else f"{restoring:.1f}"])
    return markdown(lines)


def quality(line: Line) -> list[str]:
    """The cells of PSNR, its extremes, the bright part and SSIM; empty for an older row, whose
    only score is that from the truth as published."""
    if not line.has("psnr"):
        return [""] * 5
    every = [v for rows in line.fields.values() for row in rows.values() for v in row["psnr"]]
    seeds = line.medians()
    spread = f" ± {statistics.stdev(seeds):.2f}" if len(seeds) > 1 else ""
    cells = [f"{line.median():.2f}{spread}", f"{min(every):.2f}", f"{max(every):.2f}"]
    return [*cells, f"{line.median('bright'):.2f}", f"{line.median('ssim'):.4f}"]


def finding(result: Row, which: str) -> str:
    """How far flowdiff is from what it is compared with, over the folds that both have."""
    lines = {(line.row, line.minutes): line for line in lines_of(result, which)}
    found = {key: line for key, line in lines.items() if line.has("psnr")}
    parts = []
    for minutes, targets in TARGETS.items():
        for ours, (row, least) in product(("flowdiff", "flowdiff_generic"), targets):
            one, other = found.get((ours, minutes)), found.get((row, budget_of(row, minutes)))
            both = one.folds() & other.folds() if one and other else None
            if one is None or other is None or not both:
                continue
            gap = one.median(folds=both) - other.median(folds=both)
            met = "met" if gap >= least else f"missed by {least - gap:.2f} dB"
            count = sum(len(other.fields[min(other.fields)][fold]["psnr"]) for fold in both)
            parts.append(
                f"After {minutes:g} minutes {LABELS[ours]}, is {gap:+.2f} dB from {LABELS[row]} "
                f"in the median of {count} fields; the aim of {least:+g} dB is {met}."
            )
    bm3d = found.get(("bm3d_anscombe", None))
    for (row, minutes), line in found.items():
        if bm3d is not None and row in RATES and line.folds() == bm3d.folds() and line.several():
            parts.append(f"After {minutes:g} minutes {LABELS[row]}: {paired(line, bm3d)}.")
    every = set.union(*(line.folds() for line in found.values())) if found else set()
    whole = {key: line.median() for key, line in found.items() if line.folds() == every}
    if whole:
        best = max(whole, key=lambda key: whole[key])
        parts.append(f"Best of the rows with all fields: {LABELS[best[0]]}, {whole[best]:.2f} dB.")
    missing = [label for row, label in LABELS.items() if row not in {row for row, _ in lines}]
    if missing:
        parts.append(f"Not run here: {', '.join(missing)}.")
    return " ".join(parts)


def paired(one: Line, other: Line) -> str:
    """The PSNR of a row beside that of another, field by field, over the first seed."""
    gaps = [
        a - b
        for fold in sorted(one.folds())
        for a, b in zip(
            one.fields[min(one.fields)][fold]["psnr"],
            other.fields[min(other.fields)][fold]["psnr"],
            strict=True,
        )
    ]
    error = statistics.stdev(gaps) / len(gaps) ** 0.5
    above = sum(gap > 0 for gap in gaps)
    return (
        f"field by field {statistics.mean(gaps):+.2f} dB from {LABELS[other.row]} on average "
        f"(standard error {error:.2f}), above it in {above} of {len(gaps)}"
    )


def budget_of(row: str, minutes: float) -> float | None:
    """The budget of a row beside one of some minutes; None if it does not learn."""
    return minutes if row in RATES else None


def view(result: Row) -> Row:
    """What the page shows: a table and a finding for each set, and the large images."""
    names = [name for name in get_args(SetName) if lines_of(result, name)]
    tables = {name: (table(result, name), finding(result, name)) for name in names}
    return {"tables": tables, "large": result["results"].get("large")}
