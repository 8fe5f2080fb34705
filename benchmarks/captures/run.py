"""Compare methods that learn from a folder of captures alone, and filters, on whole captures.

Sets (`sets.py`): real confocal captures (FMD), whole images of nuclei with simulated camera
noise, and synthetic images. The fields are divided into four folds. For each fold the captures of
the other fields are written to a folder as TIFF files, `unmurk.learn(folder, ..., crop=64)` learns
from them, and the first capture of each held-out field is restored. The truth of some fields to
learn from chooses the strength of the filters. The truth of the held-out fields is used for
scoring only.

    python benchmarks/captures/run.py --data DIR --out OUT             # hours on two cores
    python benchmarks/captures/run.py --out OUT --sets toy             # figures without meaning
    python benchmarks/captures/run.py --out OUT --rows large           # 50 images of 2048 x 2048
    python benchmarks/captures/run.py --table

The same command continues an interrupted run; `--budgets`, `--seeds` and `--folds` choose a part.
Figures of OUT/captures.json that are there at the start, such as the published ones, are kept and
not made again. OUT/captures.json has all figures, OUT/captures-SET.png a picture of parts of the
captures, which may not be redistributed if the captures may not. Beside this file: sets.py, the
images; methods.py, what is compared; scores.py, how it is scored; tables.py, the rows and their
tables.
"""

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import tifffile
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import common
from benchmarks.captures import methods as others
from benchmarks.captures.methods import Anscombe, BlindSpot
from benchmarks.captures.scores import Bars, decibels, scores
from benchmarks.captures.sets import BLACK, CAPTURES, FOLDS, WHITE, SetName, Split, load
from benchmarks.captures.tables import LABELS, RATES, RowName, view
from benchmarks.common import DataOptions, Row, Suite
from unmurk.errors import InputError
from unmurk.flows.posterior import Posterior
from unmurk.noise import PoissonGaussian
from unmurk.noise_estimation import estimate_noise
from unmurk.operators import as_operator
from unmurk.problem import Problem
from unmurk.rng import generator
from unmurk.tiling import posterior_for
from unmurk.training import Settings, learn

__all__: list[str] = []

SIDE = 64  # of the crops
BATCH = 16
DRAWS = 8  # of a posterior mean, in antithetic pairs
TUNED = 4  # fields on which the strength of the filters is chosen
CROPS = 4096  # for Noise2Void, which takes a tensor of crops
PATH = 82  # path of the stream that places them
TEST = 60_000  # number of the first held-out capture; its draws are not those of the learning
LARGE, LARGE_SIDE, LARGE_KIMG = 50, 2048, 1.0
NEEDS = {"nlm_anscombe": "skimage", "bm3d_anscombe": "bm3d"}


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions):
    """Compare methods on whole captures."""

    sets: tuple[SetName, ...] = ("fmd", "nuclei")
    """Sets to run now."""
    rows: tuple[RowName, ...] = get_args(RowName)
    """Rows to run now; finished rows are shown with them."""
    budgets: tuple[float, ...] = (2.0, 5.0, 15.0)
    """Minutes of learning on two cores without other load."""
    seeds: int = 3
    """Seeds of the learning at 5 minutes; the other budgets have one."""
    folds: tuple[int, ...] = tuple(range(FOLDS))
    """Folds that are held out, one after the other."""
    network: Literal["tiny", "small", "base"] = "tiny"
    """Size of the networks of every learning row."""


@dataclass(frozen=True)
class Cell:
    """One thing to run: a row on a fold, with a budget and a seed where it learns."""

    set: SetName
    row: RowName
    fold: int
    minutes: float | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """The stem of its file."""
        learned = "" if self.minutes is None else f"-{self.minutes:g}min-{self.seed}"
        return f"{self.set}-{self.row}-{self.fold}{learned}"

    @property
    def kimg(self) -> float:
        """Thousands of crops that it sees."""
        assert self.minutes is not None
        return RATES[self.row] * self.minutes


def cells(options: Options) -> list[Cell]:
    """What the options ask for, quick rows first."""
    found = []
    for which in options.sets:
        for row in options.rows:
            if row == "large":
                continue
            for minutes in options.budgets if row in RATES else (None,):
                count = options.seeds if minutes == 5 else 1
                for seed in range(options.seed, options.seed + count):
                    found += [Cell(which, row, fold, minutes, seed) for fold in options.folds]
    return sorted(found, key=lambda cell: (cell.minutes or 0, cell.seed))


# -- rows -----------------------------------------------------------------------------------------


Restored = tuple[list[Tensor], dict[str, Any], list[Bars]]
"""Restored fields (H, W), what the row cost, and error bars if it has them, else an empty list."""


def noise_of(split: Split) -> PoissonGaussian:
    """The noise of all captures, estimated from those to learn from."""
    side = min(min(x.shape[-2:]) for x in split.observed)
    parts = torch.cat([x[:, None, :side, :side] for x in split.observed])
    found = estimate_noise(parts, as_operator("identity"), "poisson-gaussian")
    assert isinstance(found, PoissonGaussian)
    return found


FILTERS: dict[str, tuple[tuple[float, ...], Callable[[Tensor, float, float], Tensor]]] = {
    "gaussian_anscombe": (
        (0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0, 4.0),
        lambda z, sigma, width: others.gaussian_filter(z, width),
    ),
    "nlm_anscombe": (
        (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0),
        lambda z, sigma, h: others.non_local_means(z, sigma, h),
    ),
    "bm3d_anscombe": (
        (0.8, 1.0, 1.2),
        lambda z, sigma, scale: others.bm3d(z, scale * sigma),
    ),
}
"""The candidates for the strength of a filter, and the filter of (image, sigma, strength)."""


def filtered(cell: Cell, split: Split) -> Restored:
    """The row of a filter, with its best strength on fields to learn from."""
    strengths, apply = FILTERS[cell.row]
    change, count = Anscombe(noise_of(split)), min(TUNED, len(split.means))

    def with_strength(strength: float, y: Tensor) -> Tensor:
        def restore(z: Tensor, sigma: float) -> Tensor:
            return apply(z, sigma, strength)

        return change.around(restore, y[None, None])[0, 0]

    scores = [
        statistics.mean(
            decibels(with_strength(s, y[0]), x)
            for y, x in zip(split.observed[:count], split.means, strict=False)
        )
        for s in strengths
    ]
    best = strengths[scores.index(max(scores))]
    begin = time.perf_counter()
    found = [with_strength(best, y[0]) for y in split.held]
    return found, {"strength": best, "restoring": (time.perf_counter() - begin) / len(found)}, []


def blind(cell: Cell, split: Split, options: Options) -> Restored:
    """The row of Noise2Void."""
    settings = how(cell, options)
    crops = random_crops(split.observed, CROPS, cell.seed)
    method = BlindSpot(crops, options.network, cell.seed)
    seconds = method.learn(settings)
    begin = time.perf_counter()
    found = [method.restore(y[None, :1])[0, 0] for y in split.held]
    restoring = (time.perf_counter() - begin) / len(found)
    return found, {"seconds": seconds, "kimg": settings.kimg, "restoring": restoring}, []


def random_crops(observed: list[Tensor], count: int, seed: int) -> Tensor:
    """Random squares (count, 1, SIDE, SIDE) of captures (K, H, W), rotated and mirrored."""
    draw = generator(seed, PATH, 1)
    found = []
    for number in range(count):
        field = observed[number % len(observed)]
        capture = field[number // len(observed) % len(field)]
        spare = (n - SIDE + 1 for n in capture.shape)
        upper, left, way = (int(torch.randint(n, (), generator=draw)) for n in (*spare, 8))
        crop = capture[upper : upper + SIDE, left : left + SIDE].rot90(way % 4)
        found.append(crop.T if way > 3 else crop)
    return torch.stack(found)[:, None].contiguous()


def how(cell: Cell, options: Options) -> Settings:
    """The training settings of a learning row."""
    return Settings(options.network, kimg=cell.kimg, batch=BATCH, seed=cell.seed)


def learned(cell: Cell, split: Split, options: Options) -> Restored:
    """A row of unmurk, which learns from a folder of whole captures."""
    folder = options.folder / "captures" / f"{cell.set}-{cell.fold}"
    write_captures(folder, split.observed)
    extra: dict[str, Any] = {"start": "generic" if cell.row == "flowdiff_generic" else "none"}
    if cell.row == "flowdiff_repeats":
        extra["repeats"] = CAPTURES
    if cell.row == "flowdiff_clean":
        extra["clean"] = [x[None] for x in split.means[:TUNED]]
    noise = noise_of(split)
    run = options.folder / "runs" / cell.name
    problem = Problem("identity", noise)
    learn(folder, problem, out=run, settings=how(cell, options), crop=SIDE, **extra)
    posterior = Posterior.load(run / "posterior")
    found, cost, bars = restored(posterior, problem, split)
    last = common.metrics(run)[-1]
    return found, {"seconds": last["seconds"], "kimg": last["kimg"]} | cost, bars


def write_captures(folder: Path, observed: Iterable[Tensor]) -> None:
    """Write captures (K, H, W) to a folder of 16-bit TIFF files, unless the folder exists."""
    if folder.exists():
        return
    partial_folder = folder.with_name(folder.name + ".part")
    partial_folder.mkdir(parents=True, exist_ok=True)
    for i, captures in enumerate(observed):
        for k, capture in enumerate(captures):
            pixels = (capture.clamp(0, 1) * 65535).round().numpy().astype(np.uint16)
            tifffile.imwrite(partial_folder / f"{i:03d}-{k}.tif", pixels)
    os.rename(partial_folder, folder)


def restored(posterior: Posterior, problem: Problem, split: Split) -> Restored:
    """The posterior means of the first capture of each held-out field, with their error bars."""
    begin, found, bars = time.perf_counter(), [], []
    for number, y in enumerate(split.held):
        tiled = posterior_for(posterior, y[:1].shape)
        mean, std = tiled.mean_std(
            y[None, :1], problem, DRAWS, 1, [TEST + number], calibrated=False
        )
        found.append(mean[0, 0])
        if posterior.error_bars is not None:
            held = posterior.error_bars
            bars.append(Bars(held.std(std)[0, 0], held.half_width(std)[0, 0]))
    return found, {"restoring": (time.perf_counter() - begin) / len(found)}, bars


def generic(split: Split) -> Restored:
    """The packaged generic prior's posterior, without any learning, and so without error bars."""
    return restored(Posterior.load("generic"), Problem("identity", noise_of(split)), split)


def run_cell(cell: Cell, options: Options) -> None:
    """Run and score a cell; its JSON file is written last and says that it is finished."""
    split = load(cell.set, options.data, cell.fold, options.seed)
    cost: dict[str, Any] = {}
    bars: list[Bars] = []
    if cell.row == "capture":
        found = [y[0] for y in split.held]
    elif cell.row == "average":
        found = [y.mean(0) for y in split.held]
    elif cell.row in FILTERS:
        found, cost, bars = filtered(cell, split)
    elif cell.row == "noise2void":
        found, cost, bars = blind(cell, split, options)
    elif cell.row == "generic":
        found, cost, bars = generic(split)
    else:
        found, cost, bars = learned(cell, split, options)
    rows = options.folder / "rows"
    tensors = {f"{i:03d}": x for i, x in enumerate(found)}
    for i, bar in enumerate(bars):
        tensors |= {f"{i:03d} std": bar.std, f"{i:03d} half": bar.half}
    common.write_tensors(rows / f"{cell.name}.safetensors", tensors)
    noise = noise_of(split)
    about = {"settings": settings(options), "noise": noise.spec} | common.provenance()
    results = scores(found, split, noise, bars) | cost
    common.write_json(rows / f"{cell.name}.json", about | {"results": results})


def settings(options: Options) -> dict[str, Any]:
    """The settings that every row must share."""
    return {
        "network": options.network,
        "batch": BATCH,
        "side": SIDE,
        "draws": DRAWS,
        "truth": "with the brightness of the capture",
        "bright part": "by the local mean of the truth",
        "error bars": "with the noise of the truth",
        "nuclei between": [BLACK, WHITE],
        "kimg per minute": RATES,
    }


# -- fifty large images ---------------------------------------------------------------------------


def run_large(options: Options) -> None:
    """Learn from fifty 16-bit images of 2048 x 2048 by the command line, and keep its cost."""
    folder = options.folder / "large"
    write_captures(folder, large_images())
    run = options.folder / "runs" / "large"
    command = [sys.executable, "-m", "unmurk", "learn", str(folder), "--noise", "0.05"]
    command += ["--kimg", str(LARGE_KIMG), "--out", str(run)]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"learning from large images failed: {done.stderr.strip()}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    results = {
        "images": LARGE,
        "side": LARGE_SIDE,
        "kimg": LARGE_KIMG,
        "peak_gib": used.ru_maxrss / 2**20,
        "seconds": time.perf_counter() - begin,
        "said": next((s for s in done.stderr.splitlines() if s.startswith("learning from")), ""),
    }
    about = {"settings": settings(options)} | common.provenance()
    common.write_json(options.folder / "rows" / "large.json", about | {"results": results})


def large_images() -> Iterator[Tensor]:
    """Noisy waves of fifty lengths, (1, LARGE_SIDE, LARGE_SIDE)."""
    draw = np.random.default_rng(0)
    y, x = np.mgrid[:LARGE_SIDE, :LARGE_SIDE].astype(np.float32)
    for i in range(LARGE):
        clean = 0.4 + 0.2 * np.sin(x / (20 + i)) * np.cos(y / (33 + i))
        noisy = clean + 0.05 * draw.standard_normal(clean.shape, dtype=np.float32)
        yield torch.from_numpy(noisy)[None]


# -- the whole run --------------------------------------------------------------------------------


def measure(options: Options) -> Row:
    """Run the missing cells; write OUT/captures.json and the pictures."""
    rows = options.folder / "rows"
    stored = common.read_row(SUITE.file(options), settings(options)) or {}
    for cell in cells(options):
        row = common.read_row(rows / f"{cell.name}.json", settings(options))
        if row is not None or cell.name in stored.get("results", {}):
            continue
        if cell.row in NEEDS and not others.available(NEEDS[cell.row]):
            print(f"{cell.row}: not run, {NEEDS[cell.row]} is not installed", file=sys.stderr)
            continue
        print(f"{cell.name} ...", file=sys.stderr, flush=True)
        run_cell(cell, options)
    if "large" in {*options.rows} - {*stored.get("results", {})}:
        if not (rows / "large.json").exists():
            run_large(options)
    found = {file.stem: common.read_row(file, settings(options)) for file in rows.glob("*.json")}
    kept = {stem: row for stem, row in sorted(found.items()) if row is not None}
    if not kept and not stored:
        raise InputError("no row is finished: name one in --rows")
    for which in options.sets:
        draw_picture(which, options)
    return SUITE.store(
        options,
        settings(options),
        noise=stored.get("noise", {})
        | {stem: row["noise"] for stem, row in kept.items() if "noise" in row},
        results=stored.get("results", {}) | {stem: row["results"] for stem, row in kept.items()},
    )


# -- the picture ----------------------------------------------------------------------------------

SHOWN = 128  # pixels to a side of the parts that are shown


def draw_picture(which: SetName, options: Options) -> None:
    """Draw a part of every held-out field of the first fold, one column for each row."""
    fold = options.folds[0]
    split = load(which, options.data, fold, options.seed)
    columns: dict[str, list[Tensor]] = {}
    for row, label in LABELS.items():
        stem = f"{which}-{row}-{fold}"
        files = sorted((options.folder / "rows").glob(f"{stem}.safetensors")) or sorted(
            (options.folder / "rows").glob(f"{stem}-*min-{options.seed}.safetensors"),
            key=lambda file: float(file.stem.split("-")[3].removesuffix("min")),
        )
        if files:
            held = sorted(common.read_tensors(files[-1]).items())
            columns[label] = [x for name, x in held if name.isdecimal()]
    if not columns:
        return
    columns["truth"] = split.truth
    side = min(SHOWN, *(n for x in split.truth for n in x.shape))
    tiles = []
    for i, truth in enumerate(split.truth[:4]):
        upper, left = busiest(truth, side)
        white = float(truth.quantile(0.998) if truth.numel() < 2**24 else truth.max())
        tiles.append(
            [
                (x[i][None, upper : upper + side, left : left + side] / white).clamp(0, 1).sqrt()
                for x in columns.values()
            ]
        )
    titles = [title.replace("`", "").replace(", ", ",\n", 1) for title in columns]
    size = (1.7 * len(columns), 1.75 * len(tiles) + 0.6)
    path = SUITE.file(options, f"-{which}.png")
    common.save_sheet(path, tiles, titles, size=size, dpi=110, fontsize=7)


def busiest(x: Tensor, side: int) -> tuple[int, int]:
    """Upper and left edge of the square of the plane (H, W) that varies most, on a grid."""
    tiles = x.unfold(0, side, side // 2).unfold(1, side, side // 2).flatten(2).var(2)
    upper, left = divmod(int(tiles.argmax()), tiles.shape[1])
    return upper * side // 2, left * side // 2


SUITE = Suite("captures", view, "captures", arguments="--data DIR --out OUT")

if __name__ == "__main__":
    sys.exit(SUITE.main(Options, measure))
