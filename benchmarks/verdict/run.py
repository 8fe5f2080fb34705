"""Test the verdict on restorations that are right, or wrong in a known way.

    python benchmarks/verdict/run.py --out OUT     # learns three short runs in OUT/runs if missing
    python benchmarks/verdict/run.py --table

The limits of `unmurk.evaluation.verdict` were chosen on the seeds `CHOSEN`; the page shows the
seeds `TESTED`, which played no part in that.
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.common import CommonOptions, Row, Suite, read_row, tabulate, write_json
from benchmarks.verdict.cases import (
    KINDS,
    NOISE,
    RIGHT,
    SMOOTH,
    STEPS,
    UNDECIDABLE,
    Denoised,
    Fitted,
    Made,
    Textures,
    assets,
)
from unmurk.diffusion.prior import Prior
from unmurk.evaluation.metrics import psnr
from unmurk.evaluation.verdict import LIMITS
from unmurk.flows.posterior import Posterior
from unmurk.io.images import load_images
from unmurk.problem import Problem
from unmurk.training import learn

__all__: list[str] = []

CHOSEN, TESTED = (0, 1), tuple(range(100, 108))
COUNT = {"digits": 16, "nuclei": 4, "textures": 48}
FITTED = {"digits": 96, "nuclei": 24}
KIMG = {"digits-short": 10.0, "nuclei-short": 5.0, "nuclei-clean": 20.0}
SHORT = 4000  # noisy digits of the short run; of the nuclei all
Maker = Callable[[str, Tensor, int], Made | None]


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Test the verdict on restorations that are right, or wrong in a known way."""

    sets: tuple[str, ...] = tuple(COUNT)
    """Sets of images: digits, nuclei, textures."""
    seeds: tuple[int, ...] = TESTED
    """Seeds of images and noise."""


def run_of(name: str, folder: Path) -> Path:
    """The folder of a short run, which is learned if it is missing."""
    run, (images, kind) = folder / "runs" / name, name.split("-")
    if (run / "posterior" / "model.safetensors").exists():
        return run
    problem = Problem("identity", NOISE[images])
    x = load_images(images, limit=SHORT).images
    data, method = (x, "clean") if kind == "clean" else (problem.simulate(x), "flowdiff")
    learn(data, problem, method, out=run, start="none", kimg=KIMG[name])
    return run


def makers(name: str, folder: Path) -> list[tuple[Maker, Callable[[int], Tensor]]]:
    """The makers of a set's restorations, each with the clean images of a seed."""
    if name == "textures":
        textures = Textures()
        return [(textures.make, lambda seed: textures.images(COUNT[name], seed))]
    prior = Prior.load("digits" if name == "digits" else run_of("nuclei-clean", folder))
    short = Posterior.load(run_of(f"{name}-short", folder))
    count, fitted = COUNT[name], FITTED[name]
    return [
        (Denoised(name, prior, short).make, lambda seed: assets(name, count * seed, count)),
        (Fitted(name).make, lambda seed: assets(name, fitted * seed, fitted)),
    ]


def judged(name: str, kind: str, seed: int, made: Made, x: Tensor) -> Row:
    """The row of a restoration."""
    verdict = made.verdict()
    found: Row = {figure.name: figure.value for figure in verdict.figures}
    loss = None
    if made.mean is not None and abs(float(made.y.std() / x.std())) < 5:
        loss = float(psnr(made.mean(made.y), x).mean())
    return {
        "set": name,
        "kind": kind,
        "seed": seed,
        "trusted": verdict.trusted,
        "failed": [figure.name for figure in verdict.figures if not figure.passed],
        "figures": found,
        "psnr": loss,
    }


def measure(options: Options) -> Row:
    """Judge every restoration; rows that are finished are not made again."""
    rows: list[Row] = []
    torch.set_num_threads(1)
    for name in options.sets:
        for make, images in makers(name, options.folder):
            for kind in KINDS:
                for seed in options.seeds:
                    file = options.folder / "rows" / f"{name}-{KINDS.index(kind)}-{seed}.json"
                    row = read_row(file)
                    if row is None:
                        x = images(seed)
                        made = make(kind, x, seed)
                        if made is None:
                            break
                        row = judged(name, kind, seed, made, x)
                        write_json(file, row)
                        print(name, kind, seed, row["trusted"], file=sys.stderr, flush=True)
                    if row not in rows:
                        rows.append(row)
    settings = {"images": COUNT, "fitted": FITTED, "noise": NOISE, "smooth": SMOOTH}
    settings |= {"steps": STEPS, "kimg": KIMG, "chosen": CHOSEN, "tested": TESTED}
    limits = {k: [end if math.isfinite(end) else None for end in v] for k, v in LIMITS.items()}
    return SUITE.store(options, settings, limits=limits, rows=rows)


def _groups(rows: list[Row]) -> Iterator[tuple[str, str, list[Row]]]:
    for kind in KINDS:
        for name in COUNT:
            held = [row for row in rows if row["kind"] == kind and row["set"] == name]
            if held:
                yield kind, name, held


def view(result: Row) -> Row:
    """What the page shows: a row for each kind and set, and the totals."""
    tested = [row for row in result["rows"] if row["seed"] in result["settings"]["tested"]]
    table, wrong = [], []
    for kind, name, held in _groups(tested):
        failed = [key for row in held for key in row["failed"]]
        known = [row["psnr"] for row in held if row["psnr"] is not None]
        table.append(
            {
                "case": kind,
                "images": name,
                "trusted": f"{sum(row['trusted'] for row in held)} of {len(held)}",
                "PSNR": f"{sum(known) / len(known):.1f}" if known else "",
                **{key: _mean(held, key) for key in LIMITS},
                "failed": ", ".join(f"{key} {failed.count(key)}" for key in dict.fromkeys(failed)),
            }
        )
        if kind not in UNDECIDABLE:
            wrong += [row for row in held if row["trusted"] != (kind in RIGHT)]
    right = [row for row in tested if row["kind"] in RIGHT]
    bad = [row for row in tested if row["kind"] not in RIGHT + UNDECIDABLE]
    limits = [
        f"{name} {'at least ' if high is None else ''}{low:g}"
        + ("" if high is None else f" to {high:g}")
        for name, (low, high) in result["limits"].items()
    ]
    return {
        "limits": ", ".join(limits),
        "table": tabulate(table),
        "right": f"{sum(row['trusted'] for row in right)} of {len(right)}",
        "wrong": f"{sum(row['trusted'] for row in bad)} of {len(bad)}",
        "mistaken": tabulate(
            [
                {key: row[key] for key in ("kind", "set", "seed")}
                | {"failed": ", ".join(row["failed"]) or "nothing"}
                for row in wrong
            ]
        )
        if wrong
        else "",
    }


def _mean(rows: list[Row], key: str) -> str:
    values = [row["figures"].get(key) for row in rows]
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.3g}" if known else ""


SUITE = Suite("verdict", view, "verdict")

if __name__ == "__main__":
    sys.exit(SUITE.main(Options, measure))
