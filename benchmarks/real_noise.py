"""Restoring real microscope captures, learnt from such captures alone, beside what others do.

FMD, confocal, BPAE cells, blue channel (Y. Zhang et al., "A Poisson-Gaussian denoising dataset
with real fluorescence microscopy images", CVPR 2019, arXiv 1812.10366): fields of view, five
single captures of each, and the average of fifty. Every fourth field is held out, and its first
capture restored. What learns is given the captures of the other fields; their averages only choose
the strength of the filters, those of the held-out fields only score.

    python benchmarks/real_noise.py --data FILE --out OUT                    # two cores
    python benchmarks/real_noise.py --data FILE --out OUT --profile full     # a GPU
    python benchmarks/real_noise.py --table

FILE is an .npz with `raw`, (F, 5, H, W), and `gt`, (F, H, W), of 8 bits. The same command goes on
where the last one ended. OUT/real_noise.json has all figures, OUT/real_noise.png a picture of
parts of the captures, which is not to be passed on where the captures are not. From a copy kept
as benchmarks/results/real_noise.json `--table` writes docs/benchmark_real.md.
"""

import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import real_methods as others
import torch
import tyro
from provenance import command, machine, write_json
from real_methods import Anscombe, BlindSpot
from real_page import LABELS, NEEDS, PAGE, draw_picture, finding, middle, page, table
from torch import Tensor
from torch.nn import functional as F

from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.evaluation.metrics import psnr, ssim
from unmurk.flows.posterior import Posterior
from unmurk.io.atomic import write as write_atomically
from unmurk.noise import PoissonGaussian
from unmurk.noise_estimation import estimate_noise
from unmurk.operators import as_operator
from unmurk.problem import Problem
from unmurk.rng import generator
from unmurk.tiling import posterior_for, prior_for
from unmurk.training import Recipe, Settings, learn

__all__: list[str] = []

ProfileName = Literal["small", "full", "toy"]
RowName = Literal[
    "capture",
    "gaussian",
    "nlm",
    "nlm_anscombe",
    "bm3d_anscombe",
    "noise2void",
    "noisy",
    "flowdiff",
    "ambient_anscombe",
    "flowdiff_anscombe",
]


@dataclass(frozen=True)
class Profile:
    """How large the comparison is.

    Attributes:
        settings: How every network is trained.
        kimg: Crops seen by single rows, in thousands, where a row's differ from the settings'.
        crops: Crops to learn from.
        side: Their side.
        draws: Draws behind a posterior mean, in antithetic pairs.
        tuned: Fields that the filters' strength is chosen on.
        recipe: Schedule of `flowdiff`.
    """

    settings: Settings
    crops: int
    side: int = 64
    draws: int = 8
    tuned: int = 4
    recipe: Recipe = Recipe()
    kimg: dict[str, float] = field(default_factory=dict)


# what a run of minutes can afford: the mean start is cheap, draws for the buffer and the flow dear
SHORT = Recipe(r2r=0.7, e_step=0.85, flow=0.92, buffer=128, steps=6, refresh=0.02)
PROFILES = {
    # about 3 minutes of learning for each row on two cores, under half an hour for everything;
    # crops do not cost the same in all rows
    "small": Profile(
        Settings("tiny", kimg=28.0, batch=16, precision="bf16"),
        crops=4096,
        recipe=SHORT,
        kimg={"noise2void": 24.0, "noisy": 6.0, "ambient_anscombe": 8.0},
    ),
    # every row within 10 minutes on one GPU
    "full": Profile(
        Settings("small", kimg=600.0, batch=64, precision="bf16"), crops=16_384, draws=16
    ),
    # seconds, on made images: shows that the benchmark runs, and nothing else
    "toy": Profile(
        Settings("tiny", kimg=0.032, batch=8, precision="fp32"),
        *(32, 32, 2, 1),
        recipe=Recipe(buffer=8, steps=2),
    ),
}
EVERY = 4  # one field in so many is held out, the last of each
TEST = 60_000  # number of the first held-out capture: no draw is one of the learning
CROPS = 81  # path of the stream that places the crops


@dataclass(frozen=True)
class Options:
    """Compare ways to restore real captures."""

    data: Path | None = None
    """The captures: an .npz with `raw` and `gt`; the toy profile makes its own."""
    out: Path | None = None
    """Folder for runs, figures and picture."""
    profile: ProfileName = "small"
    """small: two cores, half an hour; full: a GPU; toy: seconds, figures without meaning."""
    rows: tuple[RowName, ...] = get_args(RowName)
    """Rows to run now; rows that are finished are shown with them."""
    seed: int = 0
    """Seed of crops, weights, batches and draws."""
    table: bool = False
    """Write docs/benchmark_real.md from benchmarks/results/ and run nothing."""


# -- data -----------------------------------------------------------------------------------------


def captures(options: Options) -> Tensor:
    """Single captures of every field (F, K, H, W) in [0, 1]; the averages are not read."""
    if options.profile == "toy":
        noise = Problem("identity", "poisson-gaussian,gain=0.02,sigma=0.01")
        clean = made().repeat_interleave(2, 0)[:, None]
        return noise.simulate(clean, options.seed).reshape(4, 2, 64, 64)
    return eight_bits(options, "raw", 4)


def ema(options: Options) -> Tensor:
    """What captures are scored against, (F, 1, H, W) in [0, 1]."""
    return made()[:, None] if options.profile == "toy" else eight_bits(options, "gt", 3)[:, None]


def eight_bits(options: Options, key: str, axes: int) -> Tensor:
    """An array of the file; raises InputError where it is not there."""
    assert options.data
    try:
        with np.load(options.data, allow_pickle=False) as file:
            found = file[key]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot read '{key}' of {options.data}: {error}") from error
    if found.dtype != np.uint8 or found.ndim != axes or len(found) < EVERY:
        raise InputError(
            f"'{key}' of {options.data} is {found.dtype} {found.shape}: 8 bits, {axes} axes and "
            f"{EVERY} fields are needed"
        )
    return torch.from_numpy(found).float() / 255


def made() -> Tensor:
    """Four smooth images (4, 64, 64)."""
    coarse = torch.rand(4, 1, 8, 8, generator=generator(0, CROPS))
    return F.interpolate(coarse, 64, mode="bicubic").clamp(0, 1)[:, 0]


def split(fields: Tensor) -> tuple[Tensor, Tensor]:
    """The fields to learn from, and the held-out ones."""
    held = torch.arange(len(fields)) % EVERY == EVERY - 1
    return fields[~held], fields[held]


def crops(observed: Tensor, count: int, side: int, seed: int) -> Tensor:
    """Squares (count, 1, side, side) of captures (F, K, H, W), anywhere, turned and mirrored."""
    draw = generator(seed, CROPS, 1)
    found = []
    for number in range(count):
        which, capture = number % len(observed), number // len(observed) % observed.shape[1]
        spare = (n - side + 1 for n in observed.shape[-2:])
        top, left, way = (int(torch.randint(n, (), generator=draw)) for n in (*spare, 8))
        crop = observed[which, capture, top : top + side, left : left + side].rot90(way % 4)
        found.append(crop.T if way > 3 else crop)
    return torch.stack(found)[:, None].contiguous()


# -- rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What a row is given; there is no average in it.

    Attributes:
        seen: Captures to learn from (F, K, H, W).
        y: Captures to restore (N, 1, H, W).
        noise: Of all of them, told from `observed` alone.
        run: Folder for what the learning keeps.
    """

    observed: Tensor
    y: Tensor
    noise: PoissonGaussian
    profile: Profile
    seed: int
    run: Path

    def crops(self) -> Tensor:
        """The crops that every network learns from."""
        return crops(self.seen, self.profile.crops, self.profile.side, self.seed)

    def kimg(self, name: str) -> float:
        """The budget of a row."""
        return self.profile.kimg.get(name, self.profile.settings.kimg)


@dataclass(frozen=True)
class Filter:
    """A filter of which the strength is chosen.

    Attributes:
        strengths: Those tried.
        apply: The filter, of (task, captures, strength).
    """

    strengths: tuple[float, ...]
    apply: Callable[[Task, Tensor, float], Tensor]


def transformed(restore: Callable[[Tensor, float], Tensor], task: Task, y: Tensor) -> Tensor:
    """A method for Gaussian noise, of (images, sigma), between transform and inverse."""
    change = Anscombe(task.noise)
    return change.inverse(restore(change.forward(y), change.sigma))


FILTERS: dict[str, Filter] = {
    "gaussian": Filter(
        (0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4, 1.7, 2.0),
        lambda task, y, width: others.gaussian_filter(y, width),
    ),
    "nlm": Filter(
        (0.6, 0.8, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
        lambda task, y, h: others.non_local_means(y, h),
    ),
    "nlm_anscombe": Filter(
        (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0),
        lambda task, y, h: transformed(
            lambda z, sigma: others.non_local_means(z, h, sigma), task, y
        ),
    ),
    "bm3d_anscombe": Filter((1.0,), lambda task, y, _: transformed(others.bm3d, task, y)),
}
LEARNT: dict[str, tuple[str, bool]] = {
    "noisy": ("noisy", False),
    "flowdiff": ("flowdiff", False),
    "ambient_anscombe": ("ambient", True),
    "flowdiff_anscombe": ("flowdiff", True),
}
"""Rows of unmurk: method, and whether the captures are transformed first."""


def choose(filter: Filter, task: Task, truth: Tensor) -> float:
    """The strength that is best, by the averages (F, 1, H, W), on captures to learn from."""
    if len(filter.strengths) == 1:
        return filter.strengths[0]
    count = task.profile.tuned
    y = task.seen[:count, :1]
    scores = [psnr(filter.apply(task, y, s), truth[:count]).mean() for s in filter.strengths]
    return filter.strengths[int(torch.stack(scores).argmax())]


def learnt(name: str, task: Task) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A row of unmurk: {label: restored captures}, and what it took."""
    method, changes = LEARNT[name]
    change, y, observed = Anscombe(task.noise), task.y, task.crops()
    problem = Problem("identity", task.noise)
    if changes:
        y, observed, problem = (
            *map(change.forward, (y, observed)),
            Problem("identity", change.sigma),
        )
    how = replace(task.profile.settings, kimg=task.kimg(name), seed=task.seed)
    recipe = {"recipe": task.profile.recipe} if method == "flowdiff" else {}
    prior, posterior = learn(observed, problem, method, out=task.run, settings=how, **recipe)
    begin = time.perf_counter()
    found = {name: mean(posterior, y, problem, task)}
    cost = training(task.run) | {"restoring": (time.perf_counter() - begin) / len(y)}
    if changes:
        found[f"{name}_denoiser"] = denoised(prior, y, problem)
        found = {key: change.inverse(x) for key, x in found.items()}
    return found, cost


def mean(posterior: Posterior, y: Tensor, problem: Problem, task: Task) -> Tensor:
    """The posterior mean of large images, in tiles."""
    device = next(posterior.parameters()).device
    tiled, draw = posterior_for(posterior, y.shape[1:]), task.seed + 1
    parts = [
        tiled.mean_std(y[i : i + 1].to(device), problem, task.profile.draws, draw, [TEST + i])[0]
        for i in range(len(y))
    ]
    return torch.cat(parts).cpu()


@torch.no_grad()
def denoised(prior: Prior, y: Tensor, problem: Problem) -> Tensor:
    """D(y, sigma) of large images, in tiles."""
    device = next(prior.parameters()).device
    tiled = prior_for(prior, y.shape[1:])
    return torch.cat([tiled.denoise(one[None].to(device), problem.sigma) for one in y]).cpu()


def training(run: Path) -> dict[str, float]:
    """Seconds and thousands of crops of a finished run."""
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return {"seconds": last["seconds"], "kimg": last["kimg"]}


def blind(task: Task) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The row of Noise2Void."""
    how = replace(task.profile.settings, kimg=task.kimg("noise2void"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    method = BlindSpot(task.crops().to(device), how.network, task.seed)
    seconds = method.learn(how)
    begin = time.perf_counter()
    found = torch.cat([method.restore(one[None].to(device)) for one in task.y]).cpu()
    restoring = (time.perf_counter() - begin) / len(task.y)
    return {"noise2void": found}, {"seconds": seconds, "kimg": how.kimg, "restoring": restoring}


def filtered(name: str, task: Task, truth: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The row of a filter; only this kind of row sees averages, of fields to learn from."""
    strength = choose(FILTERS[name], task, truth)
    begin = time.perf_counter()
    found = FILTERS[name].apply(task, task.y, strength)
    restoring = (time.perf_counter() - begin) / len(task.y)
    return {name: found}, {"strength": strength, "restoring": restoring}


def scores(x: Tensor, truth: Tensor) -> dict[str, list[float]]:
    """Scores of every restored image (N, 1, H, W).

    PSNR and SSIM of the whole, in dB for a peak of 1; PSNR of the pixels whose truth is above the
    image's median.
    """
    error = (x.clamp(0, 1) - truth).square().double()
    bright = truth > truth.flatten(1).median(1).values[:, None, None, None]
    parts = torch.stack([e[b].mean() for e, b in zip(error, bright, strict=True)])
    return {
        "psnr": psnr(x, truth).tolist(),
        "bright": (-10 * parts.log10()).tolist(),
        "ssim": ssim(x, truth).tolist(),
    }


def run_row(name: RowName, options: Options) -> None:
    """Runs and scores a row; OUT/rows/NAME.json is written last and says that it is finished."""
    assert options.out
    profile, rows = PROFILES[options.profile], options.out / "rows"
    observed, held = split(captures(options))
    singles = observed.flatten(0, 1)[:, None]
    noise = estimate_noise(singles, as_operator("identity"), "poisson-gaussian")
    assert isinstance(noise, PoissonGaussian)
    task = Task(observed, held[:, :1], noise, profile, options.seed, options.out / "runs" / name)
    if name in LEARNT:
        found, cost = learnt(name, task)
    elif name == "noise2void":
        found, cost = blind(task)
    elif name in FILTERS:
        found, cost = filtered(name, task, split(ema(options))[0])
    else:
        found, cost = {name: task.y}, {}
    truth = split(ema(options))[1]
    write_atomically(rows / f"{name}.npz", _packed(found))
    how = {"settings": settings(options), "machine": machine(), "noise": noise.spec}
    results = {key: scores(x, truth) | cost for key, x in found.items()}
    write_json(rows / f"{name}.json", how | {"results": results})


def _packed(images: dict[str, Tensor]) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **{key: x.numpy() for key, x in images.items()})
    return stream.getvalue()


def settings(options: Options) -> dict[str, Any]:
    """All that decides a figure; rows of other settings are never put side by side."""
    profile = PROFILES[options.profile]
    seeded = replace(profile, settings=replace(profile.settings, seed=options.seed))
    return {"profile": options.profile, "seed": options.seed, **asdict(seeded)}


def finished(options: Options) -> dict[str, dict[str, Any]]:
    """The rows that are done, in their order; raises InputError for rows of other settings."""
    assert options.out
    rows, wanted = {}, json.loads(json.dumps(settings(options)))
    for name in get_args(RowName):
        file = options.out / "rows" / f"{name}.json"
        if file.exists():
            rows[name] = json.loads(file.read_text())
            if rows[name]["settings"] != wanted:
                raise InputError(f"{file} was made with other settings: give another --out")
    return rows


# -- everything -----------------------------------------------------------------------------------


def compare(options: Options) -> dict[str, Any]:
    """Runs the rows that are not finished; writes OUT/real_noise.json and OUT/real_noise.png."""
    if options.out is None or (options.data is None and options.profile != "toy"):
        raise InputError("give --data (the captures) and --out, or --table")
    done = finished(options)
    for name in (name for name in options.rows if name not in done):
        if name in NEEDS and not others.available(NEEDS[name]):
            print(f"{name}: not run, {NEEDS[name]} is not installed", file=sys.stderr)
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        run_row(name, options)
    rows = finished(options)
    if not rows:
        raise InputError("no row is finished: name one in --rows")
    observed, held = split(ema(options))
    result = {
        "settings": settings(options),
        "machine": machine(),
        "commits": {name: row["machine"]["commit"] for name, row in rows.items()},
        "noise": next(iter(rows.values()))["noise"],
        "learnt": len(observed),
        "held": len(held),
        "results": {key: x for row in rows.values() for key, x in row["results"].items()},
    }
    write_json(options.out / "real_noise.json", result)
    images: dict[str, Tensor] = {"average of 50": held}
    for name in rows:
        with np.load(options.out / "rows" / f"{name}.npz") as file:
            images |= {LABELS[key]: torch.from_numpy(file[key]) for key in file}
    scored = {LABELS[key]: middle(result, key) for key in result["results"]}
    draw_picture(options.out / "real_noise.png", images, scored)
    return result


@command
def main() -> None:
    options = tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,))
    if options.table:
        write_atomically(PAGE, page().encode())
    else:
        result = compare(options)
        print(f"{table(result)}\n\n{finding(result)}")


if __name__ == "__main__":
    sys.exit(main())
