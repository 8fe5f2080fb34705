"""Compare methods on real microscope captures, learned from such captures alone.

FMD, confocal, BPAE cells, blue channel (Y. Zhang et al., "A Poisson-Gaussian denoising dataset
with real fluorescence microscopy images", CVPR 2019, arXiv 1812.10366): fields of view, five
single captures of each, and the mean of fifty. Every fourth field is held out, and its first
capture restored. The learning methods see the captures of the other fields. The means of fifty
captures of those fields choose the strength of the filters; those of the held-out fields are used
for scoring only.

    python benchmarks/real/run.py --data FILE --out OUT                    # two cores
    python benchmarks/real/run.py --data FILE --out OUT --profile full     # a GPU
    python benchmarks/real/run.py --table

FILE is an .npz with `raw`, (F, 5, H, W), and `gt`, (F, H, W), of 8 bits. The same command
continues an interrupted run. OUT/real-PROFILE.json has all figures, OUT/real-PROFILE.png a picture
of parts of the captures, which may not be redistributed if the captures may not.
"""

import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import common
from benchmarks.common import CommonOptions, Row, Suite, markdown
from benchmarks.real import methods as others
from benchmarks.real.methods import Anscombe, BlindSpot
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
        settings: Training settings of every network.
        crops: Number of crops to learn from.
        side: Height and width of the crops.
        draws: Draws of a posterior mean, in antithetic pairs.
        tuned: Number of fields on which the strength of the filters is chosen.
        recipe: Schedule of `flowdiff`.
        kimg: Thousands of crops seen by the rows that differ from the settings.
    """

    settings: Settings
    crops: int
    side: int = 64
    draws: int = 8
    tuned: int = 4
    recipe: Recipe = Recipe()
    kimg: dict[str, float] = field(default_factory=dict)


# for a run of minutes: R2R pre-training is cheap, the draws of the buffer and the flow are costly
SHORT = Recipe(r2r=0.7, e_step=0.85, flow=0.92, buffer=128, steps=6, refresh=0.02)
PROFILES = {
    # about 3 minutes of learning for each row on two cores, less than half an hour in all; a crop
    # does not cost the same in all rows
    "small": Profile(
        Settings("tiny", kimg=28.0, batch=16, precision="bf16"),
        crops=4096,
        recipe=SHORT,
        kimg={"noise2void": 24.0, "noisy": 6.0, "ambient_anscombe": 8.0},
    ),
    # every row takes less than 10 minutes on one GPU
    "full": Profile(
        Settings("small", kimg=600.0, batch=64, precision="bf16"), crops=16_384, draws=16
    ),
    # seconds, on synthetic images: figures without meaning
    "toy": Profile(
        Settings("tiny", kimg=0.032, batch=8, precision="fp32"),
        *(32, 32, 2, 1),
        recipe=Recipe(buffer=8, steps=2),
    ),
}
EVERY = 4  # the last of so many fields is held out
TEST = 60_000  # number of the first held-out capture; its draws are not those of the learning
CROPS = 81  # path of the stream that places the crops


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Compare methods on real captures."""

    data: Path | None = None
    """The captures: an .npz with `raw` and `gt`; the toy profile makes its own."""
    profile: ProfileName = "small"
    """small: two cores, half an hour; full: a GPU; toy: seconds, figures without meaning."""
    rows: tuple[RowName, ...] = get_args(RowName)
    """Rows to run now; finished rows are shown with them."""


# -- data -----------------------------------------------------------------------------------------


def captures(options: Options) -> Tensor:
    """Single captures of every field (F, K, H, W) in [0, 1]."""
    if options.profile == "toy":
        noise = Problem("identity", "poisson-gaussian,gain=0.02,sigma=0.01")
        clean = synthetic().repeat_interleave(2, 0)[:, None]
        return noise.simulate(clean, options.seed).reshape(4, 2, 64, 64)
    return eight_bits(options, "raw", 4)


def mean_captures(options: Options) -> Tensor:
    """The mean of fifty captures of every field, (F, 1, H, W) in [0, 1]."""
    found = synthetic() if options.profile == "toy" else eight_bits(options, "gt", 3)
    return found[:, None]


def eight_bits(options: Options, key: str, axes: int) -> Tensor:
    """An array of the file; raises InputError if it is absent or not as expected."""
    if options.data is None:
        raise InputError("no captures: give --data FILE, an .npz with `raw` and `gt`")
    try:
        with np.load(options.data, allow_pickle=False) as file:
            found = file[key]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot read '{key}' of {options.data}: {error}") from error
    if found.dtype != np.uint8 or found.ndim != axes or len(found) < EVERY:
        raise InputError(
            f"expected '{key}' of {options.data} to have 8 bits, {axes} axes and at least {EVERY} "
            f"fields, got {found.dtype} {found.shape}"
        )
    return torch.from_numpy(found).float() / 255


def synthetic() -> Tensor:
    """Four smooth images (4, 64, 64)."""
    coarse = torch.rand(4, 1, 8, 8, generator=generator(0, CROPS))
    return F.interpolate(coarse, 64, mode="bicubic").clamp(0, 1)[:, 0]


def split(fields: Tensor) -> tuple[Tensor, Tensor]:
    """The fields to learn from, and the held-out fields."""
    held = torch.arange(len(fields)) % EVERY == EVERY - 1
    return fields[~held], fields[held]


def random_crops(observed: Tensor, count: int, side: int, seed: int) -> Tensor:
    """Random squares (count, 1, side, side) of captures (F, K, H, W), rotated and mirrored."""
    draw = generator(seed, CROPS, 1)
    found = []
    for number in range(count):
        which, capture = number % len(observed), number // len(observed) % observed.shape[1]
        spare = (n - side + 1 for n in observed.shape[-2:])
        upper, left, way = (int(torch.randint(n, (), generator=draw)) for n in (*spare, 8))
        crop = observed[which, capture, upper : upper + side, left : left + side].rot90(way % 4)
        found.append(crop.T if way > 3 else crop)
    return torch.stack(found)[:, None].contiguous()


# -- rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """The data of a row; they include no mean of captures.

    Attributes:
        observed: Captures to learn from (F, K, H, W).
        y: Captures to restore (N, 1, H, W).
        noise: The noise of all captures, estimated from `observed`.
        profile: How large the comparison is.
        seed: The seed of the run.
        run: Run folder of the learning.
    """

    observed: Tensor
    y: Tensor
    noise: PoissonGaussian
    profile: Profile
    seed: int
    run: Path

    def crops(self) -> Tensor:
        """The crops from which every network learns."""
        return random_crops(self.observed, self.profile.crops, self.profile.side, self.seed)

    def kimg(self, name: str) -> float:
        """The budget of a row, in thousands of crops."""
        return self.profile.kimg.get(name, self.profile.settings.kimg)


@dataclass(frozen=True)
class Filter:
    """A filter with a strength.

    Attributes:
        strengths: Candidates for the strength.
        apply: The filter, of (task, captures, strength).
    """

    strengths: tuple[float, ...]
    apply: Callable[[Task, Tensor, float], Tensor]


def transformed(restore: Callable[[Tensor, float], Tensor], task: Task, y: Tensor) -> Tensor:
    """Apply a method for Gaussian noise, of (images, sigma), between transform and inverse."""
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
LEARNED: dict[str, tuple[str, bool]] = {
    "noisy": ("noisy", False),
    "flowdiff": ("flowdiff", False),
    "ambient_anscombe": ("ambient", True),
    "flowdiff_anscombe": ("flowdiff", True),
}
"""Rows of unmurk: the method, and whether the Anscombe transform is applied."""


def choose(filter: Filter, task: Task, truth: Tensor) -> float:
    """The best strength by PSNR against the means (F, 1, H, W), on captures to learn from."""
    if len(filter.strengths) == 1:
        return filter.strengths[0]
    count = task.profile.tuned
    y = task.observed[:count, :1]
    scores = [psnr(filter.apply(task, y, s), truth[:count]).mean() for s in filter.strengths]
    return filter.strengths[int(torch.stack(scores).argmax())]


def learn_and_restore(name: str, task: Task) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A row of unmurk: {label: restored captures}, and its cost."""
    method, changes = LEARNED[name]
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
    found = {name: posterior_mean(posterior, y, problem, task)}
    cost = training(task.run) | {"restoring": (time.perf_counter() - begin) / len(y)}
    if changes:
        found[f"{name}_denoiser"] = denoised(prior, y, problem)
        found = {key: change.inverse(x) for key, x in found.items()}
    return found, cost


def posterior_mean(posterior: Posterior, y: Tensor, problem: Problem, task: Task) -> Tensor:
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
    """The row of a filter, which uses the means of the fields to learn from."""
    strength = choose(FILTERS[name], task, truth)
    begin = time.perf_counter()
    found = FILTERS[name].apply(task, task.y, strength)
    restoring = (time.perf_counter() - begin) / len(task.y)
    return {name: found}, {"strength": strength, "restoring": restoring}


def scores(x: Tensor, truth: Tensor) -> dict[str, list[float]]:
    """PSNR and SSIM of every restored image (N, 1, H, W), and PSNR of its bright part.

    PSNR is in dB for a peak of 1. The bright part is the pixels whose truth is above the median of
    the image.
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
    """Run and score a row; OUT/rows/NAME.json is written last and says that it is finished."""
    profile, rows = PROFILES[options.profile], options.folder / "rows"
    observed, held = split(captures(options))
    singles = observed.flatten(0, 1)[:, None]
    noise = estimate_noise(singles, as_operator("identity"), "poisson-gaussian")
    assert isinstance(noise, PoissonGaussian)
    task = Task(
        observed, held[:, :1], noise, profile, options.seed, options.folder / "runs" / name
    )
    if name in LEARNED:
        found, cost = learn_and_restore(name, task)
    elif name == "noise2void":
        found, cost = blind(task)
    elif name in FILTERS:
        found, cost = filtered(name, task, split(mean_captures(options))[0])
    else:
        found, cost = {name: task.y}, {}
    truth = split(mean_captures(options))[1]
    write_atomically(rows / f"{name}.npz", _packed(found))
    how = {"settings": settings(options), "noise": noise.spec} | common.provenance()
    results = {key: scores(x, truth) | cost for key, x in found.items()}
    common.write_json(rows / f"{name}.json", how | {"results": results})


def _packed(images: dict[str, Tensor]) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **{key: x.numpy() for key, x in images.items()})
    return stream.getvalue()


def settings(options: Options) -> dict[str, Any]:
    """All settings that decide a figure."""
    profile = PROFILES[options.profile]
    seeded = replace(profile, settings=replace(profile.settings, seed=options.seed))
    return {"profile": options.profile, "seed": options.seed, **asdict(seeded)}


def finished(options: Options) -> dict[str, Row]:
    """The finished rows, in their order; raises InputError if a row has other settings."""
    files = {name: options.folder / "rows" / f"{name}.json" for name in get_args(RowName)}
    rows = {name: common.read_row(file, settings(options)) for name, file in files.items()}
    return {name: row for name, row in rows.items() if row is not None}


def measure(options: Options) -> Row:
    """Run the missing rows; write OUT/real-PROFILE.json and the picture."""
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
    observed, held = split(mean_captures(options))
    shown = {key: value for key, value in settings(options).items() if key != "seed"}
    result = SUITE.store(
        options,
        shown,
        commits={name: row["commit"] for name, row in rows.items()},
        noise=next(iter(rows.values()))["noise"],
        learnt=len(observed),
        held=len(held),
        results={key: x for row in rows.values() for key, x in row["results"].items()},
    )
    images: dict[str, Tensor] = {TRUTH: held}
    for name in rows:
        with np.load(options.folder / "rows" / f"{name}.npz") as file:
            images |= {LABELS[key]: torch.from_numpy(file[key]) for key in file}
    scored = {LABELS[key]: median(result, key) for key in result["results"]}
    draw_picture(SUITE.file(options, ".png"), images, scored)
    return result


# -- tables ---------------------------------------------------------------------------------------

TARGET = 1.0  # dB above non-local means
TRUTH = "mean of 50"
NEEDS = {"nlm": "skimage", "nlm_anscombe": "skimage", "bm3d_anscombe": "bm3d"}
LABELS: dict[str, str] = {
    "capture": "the capture itself",
    "gaussian": "Gaussian filter",
    "nlm": "non-local means",
    "nlm_anscombe": "non-local means, transform",
    "bm3d_anscombe": "BM3D, transform",
    "noise2void": "Noise2Void",
    "noisy": "`noisy`: posterior mean",
    "flowdiff": "`flowdiff`, Poisson likelihood: posterior mean",
    "ambient_anscombe": "`ambient`, transform: posterior mean",
    "ambient_anscombe_denoiser": "`ambient`, transform: prior's denoiser",
    "flowdiff_anscombe": "`flowdiff`, transform: posterior mean",
    "flowdiff_anscombe_denoiser": "`flowdiff`, transform: prior's denoiser",
}
OURS = ("flowdiff", "flowdiff_anscombe", "flowdiff_anscombe_denoiser")
MEANS = ("nlm", "nlm_anscombe")


def median(result: Row, key: str, score: str = "psnr") -> float:
    """The median of a score over the held-out fields."""
    return statistics.median(result["results"][key][score])


def table(result: Row) -> str:
    """The figures; a method that was not run has no line."""
    found = result["results"]
    heads = ["", "PSNR, dB", "lowest", "highest", "bright part, dB", "SSIM", "strength"]
    lines = [[*heads, "learning, s", "kimg", "restoring, s"]]
    for key, label in LABELS.items():
        if key not in found:
            continue
        row, psnrs = found[key], found[key]["psnr"]
        values = [f"{v:.2f}" for v in (median(result, key), min(psnrs), max(psnrs))]
        values += [f"{median(result, key, 'bright'):.2f}", f"{median(result, key, 'ssim'):.4f}"]
        cost = (("strength", "g"), ("seconds", ".0f"), ("kimg", "g"), ("restoring", ".1f"))
        values += [format(row[k], form) if k in row else "" for k, form in cost]
        lines.append([label, *values])
    return markdown(lines)


def finding(result: Row) -> str:
    """How far flowdiff is above non-local means, the best method, and what was not run."""
    found, parts = result["results"], []
    ours = [key for key in OURS if key in found]
    if ours and any(key in found for key in MEANS):
        best = max(ours, key=lambda key: median(result, key))
        other = max((k for k in MEANS if k in found), key=lambda key: median(result, key))
        difference = median(result, best) - median(result, other)
        met = "met" if difference >= TARGET else f"missed by {TARGET - difference:.2f} dB"
        parts.append(
            f"The best of flowdiff ({LABELS[best]}) is {difference:+.2f} dB from the best of "
            f"non-local means ({LABELS[other]}); the aim of {TARGET:g} dB is {met}."
        )
        first = max(found, key=lambda key: median(result, key))
        parts.append(f"Best of all: {LABELS[first]}, {median(result, first):.2f} dB.")
    missing = [f"{LABELS[key]} (needs {NEEDS[key]})" for key in NEEDS if key not in found]
    if missing:
        parts.append(f"Not run: {', '.join(missing)}.")
    return " ".join(parts)


def view(result: Row) -> Row:
    """What the page shows: the table and the finding."""
    return {"table": table(result), "finding": finding(result)}


# -- the picture ----------------------------------------------------------------------------------


def draw_picture(path: Path, images: dict[str, Tensor], scored: dict[str, float]) -> None:
    """Draw a part of every field (N, 1, H, W), one column for each method, brightened alike."""
    from matplotlib.figure import Figure

    truth = images[TRUTH]
    side = min(128, *truth.shape[-2:])
    corners = [busiest(x[0], side) for x in truth]
    whites = [float(x.quantile(0.998)) for x in truth]
    tiles = [
        [
            (stack[i, :, upper : upper + side, left : left + side] / white).clamp(0, 1).sqrt()
            for stack in images.values()
        ]
        for i, ((upper, left), white) in enumerate(zip(corners, whites, strict=True))
    ]
    titles = []
    for title in images:
        name = title.replace("`", "").replace(": ", ":\n").replace(", ", ",\n", 1)
        titles.append(name + (f"\n{scored[title]:.2f} dB" if title in scored else ""))
    size = (1.7 * len(images), 1.75 * len(truth) + 0.9)
    figure = Figure(size, dpi=110, layout="constrained")
    axes = figure.subplots()
    common.draw_sheet(axes, tiles, titles, fontsize=7)
    axes.xaxis.tick_top()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def busiest(x: Tensor, side: int) -> tuple[int, int]:
    """Upper and left edge of the square of the plane (H, W) that varies most, on a grid."""
    tiles = x.unfold(0, side, side // 2).unfold(1, side, side // 2).flatten(2).var(2)
    upper, left = divmod(int(tiles.argmax()), tiles.shape[1])
    return upper * side // 2, left * side // 2


SUITE = Suite(
    *("real", view, "real_captures"),
    arguments="--data FILE --out OUT",
    profiles=("small", "full"),
)

if __name__ == "__main__":
    sys.exit(SUITE.main(Options, measure))
