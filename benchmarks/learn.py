"""What each way to learn from noisy digits is worth, with the same networks and the same budget.

MNIST, zero-padded to 32 x 32; y = x + 0.3 n, one y for each digit. The budget is time (small:
about two minutes a row on two cores) or images seen (full: the same for all):

    noisy     y taken as if it were clean: the floor
    elbo      FlowDiff's objective alone (arXiv 2407.11162)
    mean      mean start alone: to the end, the prior is trained on m(y) below the noise level and
              on y above it; the flow never starts
    flowdiff  our default: mean start, then polish
    clean     trained on x: the ceiling; the only row that sees a clean image

The test digits are shuffled, the same for every seed (their first half is easier than the second),
and split: the `held` ones are restored from their y; the clean `reference` is what samples are
compared with and serves nothing else; for the y of the `others` posterior samples are drawn. So
neither FD nor SWD compares a digit with a restoration of itself.

    python benchmarks/learn.py --mnist DIR --out OUT                    # two cores
    python benchmarks/learn.py --mnist DIR --out OUT --profile full     # a GPU
    python benchmarks/learn.py --table

DIR holds the original files (`train-images-idx3-ubyte.gz`, ...). Every row runs in a process of
its own; the same command goes on where the last one ended. OUT/learn.json has all figures,
OUT/learn.png a picture. From copies kept as benchmarks/results/learn-PROFILE.json (and .png)
`--table` writes docs/benchmark_learn.md.
"""

import json
import multiprocessing
import os
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
import tyro
from provenance import ROOT, machine, write_json
from torch import Tensor
from torch.nn import functional as F

from unmurk.errors import InputError
from unmurk.images import read_idx
from unmurk.learn import Recipe, Settings, learn
from unmurk.learn.loop import write_atomically
from unmurk.metrics import coverage, frechet, psnr, sliced_wasserstein, spread, varying_pixels
from unmurk.posterior import Posterior
from unmurk.prior import Prior
from unmurk.problem import Problem
from unmurk.seeds import generator

__all__: list[str] = []


@dataclass(frozen=True)
class Profile:
    """How large the comparison is.

    Attributes:
        settings: How every row is trained.
        kimg: Images seen by single rows, where a row's differ from the settings'.
        digits: Training digits, the first of the set.
        samples: Samples behind each FD and SWD.
        held: Test digits restored.
        reference: Clean test digits that samples are compared with.
        levels: Noise levels of the prior's sampler.
        recipe: Schedule of `flowdiff`; without polish and anchor, of `mean`.
    """

    settings: Settings
    digits: int
    samples: int
    held: int = 256
    reference: int = 4_744
    levels: int = 24
    recipe: Recipe = Recipe()
    kimg: dict[str, float] = field(default_factory=dict)


PROFILES = {
    # about four minutes of learning for each row on two cores, 25 for everything; an image costs
    # the joint objective four times what it costs the default, so images are not the same
    "small": Profile(
        Settings("tiny", kimg=102.0, precision="bf16"),
        digits=20_000,
        samples=1_000,
        levels=18,
        kimg={"noisy": 30.0, "elbo": 30.0, "mean": 120.0, "clean": 36.0},
    ),
    # every row within 10 minutes on one GPU
    "full": Profile(
        Settings("small", kimg=3000.0, batch=128, precision="bf16"), digits=60_000, samples=5_000
    ),
    # seconds: shows that the benchmark runs, and nothing else
    "toy": Profile(
        Settings("tiny", kimg=0.064, batch=16, precision="fp32"),
        *(32, 16, 16, 32, 3),
        recipe=Recipe(buffer=16, steps=2),
    ),
}
NOISE = 0.3
PROBLEM = Problem("identity", NOISE)
RESTORATIONS = 64  # draws behind a posterior mean
DRAWS = 39  # behind spread and coverage: the 90 % interval lies between whole ranks, 2 and 38
SHOWN = 10
TEST = 60_000  # number of the first test image; noise depends on (seed, number)
SPLIT = 1  # path of the stream that shuffles the test digits

ProfileName = Literal["small", "full", "toy"]
RowName = Literal["noisy", "elbo", "mean", "flowdiff", "clean"]
ROWS: dict[RowName, str] = {
    "noisy": "noisy",
    "elbo": "flowdiff --objective elbo",
    "mean": "mean start alone",
    "flowdiff": "flowdiff",
    "clean": "clean",
}
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmark_learn.md"


@dataclass(frozen=True)
class Options:
    """Compare the ways to learn from noisy digits."""

    mnist: Path | None = None
    """Folder of the MNIST files, gzipped idx."""
    out: Path | None = None
    """Folder for runs, figures and picture."""
    profile: ProfileName = "small"
    """small: two cores, 25 minutes; full: a GPU; toy: seconds, figures without meaning."""
    rows: tuple[RowName, ...] = get_args(RowName)
    """Rows to run now; rows that are finished are shown with them."""
    seed: int = 0
    """Seed of noise, weights, batches and samples."""
    table: bool = False
    """Write docs/benchmark_learn.md from benchmarks/results/ and run nothing."""


@dataclass(frozen=True)
class Digits:
    """Clean digits (N, 1, 32, 32) in [0, 1]; the last three are parts of the test set."""

    train: Tensor
    held: Tensor
    reference: Tensor
    others: Tensor


def padded(images: Tensor) -> Tensor:
    """Bytes (N, 28, 28) as images (N, 1, 32, 32)."""
    return F.pad(images[:, None].float() / 255, (2, 2, 2, 2))


def load(mnist: Path, profile: Profile) -> Digits:
    """The digits of a profile; raises InputError where there are too few."""
    names = ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz")
    train, test = (torch.from_numpy(read_idx(mnist / name).copy()) for name in names)
    sizes = (profile.held, profile.reference, profile.samples)
    if len(train) < profile.digits or len(test) < sum(sizes):
        raise InputError(
            f"{mnist} holds {len(train)} training and {len(test)} test digits: "
            f"{profile.digits} and {sum(sizes)} are needed"
        )
    test = test[torch.randperm(len(test), generator=generator(0, SPLIT))][: sum(sizes)]
    return Digits(padded(train[: profile.digits]), *map(padded, test.split(sizes)))


def measure(x: Tensor, seed: int, first: int) -> Tensor:
    """y = x + 0.3 n of images with the numbers first, first + 1, ..."""
    parts, number = [], first
    for part in x.split(1000):  # a generator of 5 kB for every image
        parts.append(PROBLEM.simulate(part, seed, range(number, number + len(part))))
        number += len(part)
    return torch.cat(parts)


def run_row(name: RowName, options: Options) -> None:
    """Learns and scores a row; OUT/rows/NAME.json is written last and says that it is finished."""
    assert options.mnist and options.out
    profile, run = PROFILES[options.profile], options.out / "runs" / name
    digits = load(options.mnist, profile)
    prior, posterior = train(name, digits.train, profile, options.seed, run)
    figures = cost(run)
    bf16 = figures["precision"] == "bf16"
    scores, pictures = evaluate(prior, posterior, digits, profile, options.seed, bf16)
    rows = options.out / "rows"
    write_atomically(rows / f"{name}.safetensors", safetensors.torch.save(pictures))
    how: dict[str, Any] = {"settings": settings(options), "machine": machine()}
    how["sampling"] = "bf16 autocast" if bf16 else "fp32"
    write_json(rows / f"{name}.json", how | scores | figures)


def train(
    name: RowName, x: Tensor, profile: Profile, seed: int, run: Path
) -> tuple[Prior, Posterior]:
    """Prior and posterior of a row, from images x of which all rows but one see only y."""
    budget = profile.kimg.get(name, profile.settings.kimg)
    how = replace(profile.settings, seed=seed, kimg=budget)
    if name == "clean":
        return learn(x, PROBLEM, "clean", out=run, settings=how)
    y = measure(x, seed, 0)
    if name == "noisy":
        return learn(y, PROBLEM, "noisy", out=run, settings=how)
    if name == "elbo":
        return learn(y, PROBLEM, "flowdiff", out=run, settings=how, objective="elbo")
    recipe = profile.recipe
    if name == "mean":
        recipe = replace(recipe, polish=1.0, flow=1.0, anchor="none")
    return learn(y, PROBLEM, "flowdiff", out=run, settings=how, recipe=recipe)


def cost(run: Path) -> dict[str, Any]:
    """What the learning took; to be called right after it, before the scoring uses memory.

    Kept in the run folder: a process that finds the learning done has no memory of it.
    """
    file = run / "cost.json"
    if file.exists():
        return json.loads(file.read_text())
    # in kB on Linux; never below what the parent held at the fork, so the parent holds little
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    state = torch.load(run / "state" / "latest.pt", map_location="cpu", weights_only=True)
    figures = {
        "seconds": last["seconds"],
        "kimg": last["kimg"],
        "images_per_second": 1000 * last["kimg"] / last["seconds"],
        "peak_memory_mib": memory / (2**20 if sys.platform == "darwin" else 2**10),
        "peak_gpu_memory_mib": gpu,
        "precision": state["precision"],
        "steps_skipped": last["skipped"],
    }
    write_json(file, figures)
    return figures


@torch.no_grad()
def evaluate(
    prior: Prior, posterior: Posterior, digits: Digits, profile: Profile, seed: int, bf16: bool
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The scores of a row, and the images of its picture.

    Args:
        bf16: Whether the prior draws its samples under autocast; all else is in fp32.
    """
    draw = seed + 1  # never the streams of the learning
    device = next(posterior.parameters()).device
    truth, index = digits.held, range(TEST, TEST + profile.held)
    others = range(index.stop, index.stop + profile.samples)
    y = measure(truth, seed, index.start).to(device)
    y_others = measure(digits.others, seed, others.start).to(device)
    mean, std = (v.cpu() for v in posterior.mean_std(y, PROBLEM, RESTORATIONS, draw, index))
    draws = posterior.sample(y, PROBLEM, DRAWS, draw, index).cpu()
    restored = posterior.sample(y_others, PROBLEM, 1, draw, others)[0].cpu()
    denoised = prior.denoise(y, NOISE).cpu()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        new = prior.sample(profile.samples, profile.levels, draw).cpu()

    where = varying_pixels(truth).expand_as(truth)
    scores = {
        "posterior_psnr": float(psnr(mean, truth).mean()),
        "denoiser_psnr": float(psnr(denoised, truth).mean()),
        "prior_frechet": frechet(digits.reference, new),
        "posterior_frechet": frechet(digits.reference, restored),
        "prior_swd": sliced_wasserstein(digits.reference, new),
        "posterior_swd": sliced_wasserstein(digits.reference, restored),
        "spread": spread(draws, where),
        "error": float((mean - truth)[where].square().mean().sqrt()),
        "coverage": coverage(draws, truth, 0.9, where),
    }
    pictures = {"prior": new, "mean": mean, "sample": draws[0], "spread": std}
    return scores, {k: v[:SHOWN].contiguous() for k, v in pictures.items()}


def scale(digits: Digits, seed: int) -> dict[str, dict[str, float]]:
    """What FD and SWD are worth, from images of no network; rows like those of `evaluate`.

    "noisy": the y of the others themselves; "clean": the others, the best that samples can hope
    for; "halves": FD between two halves of the test digits in use, clean and noisy.
    """
    parts = (digits.held, digits.others, digits.reference)
    clean = torch.cat(parts)
    noisy = measure(clean, seed, TEST)
    held, others, _ = noisy.split([len(part) for part in parts])
    rows: dict[str, dict[str, float]] = {}
    for name, x in (("noisy", others), ("clean", digits.others)):
        rows[name] = {"prior_frechet": frechet(digits.reference, x)}
        rows[name]["prior_swd"] = sliced_wasserstein(digits.reference, x)
    rows["noisy"]["posterior_psnr"] = float(psnr(held, digits.held).mean())
    halves = {"clean": clean, "noisy": noisy}
    return rows | {"halves": {key: frechet(x[::2], x[1::2]) for key, x in halves.items()}}


def settings(options: Options) -> dict[str, Any]:
    """All that decides a figure; rows of other settings are never put side by side."""
    profile = PROFILES[options.profile]
    seeded = replace(profile, settings=replace(profile.settings, seed=options.seed))
    fixed = {"noise": NOISE, "restorations": RESTORATIONS, "draws": DRAWS}
    return {"profile": options.profile, "seed": options.seed, **fixed, **asdict(seeded)}


def finished(options: Options) -> dict[RowName, dict[str, Any]]:
    """The rows that are done, in their order; raises InputError for rows of other settings."""
    assert options.out
    rows, wanted = {}, json.loads(json.dumps(settings(options)))
    files = {name: options.out / "rows" / f"{name}.json" for name in ROWS}
    for name, file in ((name, file) for name, file in files.items() if file.exists()):
        rows[name] = json.loads(file.read_text())
        if rows[name]["settings"] != wanted:
            raise InputError(f"{file} was made with other settings: give another --out")
    return rows


def draw_picture(
    path: Path, truth: Tensor, noisy: Tensor, rows: dict[str, dict[str, Tensor]]
) -> None:
    """One line for each digit (N, 1, H, W): truth and y, then four columns for each row."""
    from matplotlib.figure import Figure

    limit = max(float(images["spread"].max()) for images in rows.values())
    panels = {"": {"truth": truth, "noisy": noisy}}
    for name, images in rows.items():
        shown = {key: images[key] for key in ("mean", "sample", "spread", "prior")}
        panels[name] = shown | {"spread": images["spread"] / limit}
    widths = [len(columns) for columns in panels.values()]
    size = (0.62 * sum(widths), 0.62 * len(truth) + 0.6)
    figure = Figure(size, dpi=120, layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for axes, (title, columns) in zip(grid, panels.items(), strict=True):
        tiles = [F.pad(x[:, 0].clamp(0, 1), (1,) * 4, value=1.0) for x in columns.values()]
        sheet = torch.cat([tile.flatten(0, 1) for tile in tiles], 1)
        axes.imshow(sheet.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        centres = [tiles[0].shape[2] * (i + 0.5) for i in range(len(tiles))]
        axes.set_xticks(centres, [*columns], fontsize=8)
        axes.set_yticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(title, fontsize=10)
    figure.supxlabel(f"spread: black is 0, white {limit:.2f}", fontsize=8)
    figure.savefig(path)


COLUMNS = {
    "posterior_psnr": ("posterior mean, dB", "{:.2f}"),
    "denoiser_psnr": ("prior's denoiser, dB", "{:.2f}"),
    "prior_frechet": ("FD, prior", "{:.2f}"),
    "posterior_frechet": ("FD, posterior", "{:.2f}"),
    "prior_swd": ("SWD, prior", "{:.4f}"),
    "posterior_swd": ("SWD, posterior", "{:.4f}"),
    "error": ("error", "{:.3f}"),
    "spread": ("spread", "{:.3f}"),
    "coverage": ("90 % coverage", "{:.3f}"),
    "kimg": ("kimg seen", "{:.0f}"),
    "seconds": ("seconds", "{:.0f}"),
    "images_per_second": ("images/s", "{:.0f}"),
    "peak_memory_mib": ("memory, MiB", "{:.0f}"),
    "peak_gpu_memory_mib": ("GPU memory, MiB", "{:.0f}"),
}
READING = f"""\
Each y is a digit with noise of standard deviation {NOISE}. All rows have the same networks and the
same budget: about as many seconds (small) or as many images seen (full). All but `clean` learn
from y alone, none from a test digit.

- **posterior mean**: PSNR of the mean of {RESTORATIONS} posterior samples. **prior's denoiser**:
  PSNR of D(y, {NOISE}). Both on held-out digits, images clipped to [0, 1].
- **FD**: Frechet distance on the digit classifier's 128 features. **SWD**: sliced Wasserstein
  distance of 7 x 7 patches. Both from clean test digits that serve nothing else; of samples of the
  prior, and of one posterior sample for each y of other test digits.
- **error**: root mean square error of the posterior mean. **spread**: root mean variance of the
  posterior's samples; equal for an exact posterior. **90 % coverage**: share of true values in the
  posterior's central 90 % interval, from {DRAWS} samples. All three on the pixels that vary over
  the held-out digits.
- **seconds** and **memory** (peak of a process of its own) are those of the learning.
- In `mean start alone` the prior is trained on m(y) at all levels and the flow never: its
  posterior samples are m(y) + 0.05 n.
"""


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown; columns without figures are left out."""
    rows = {ROWS[name]: row for name, row in result["rows"].items()}
    shown = [c for c in COLUMNS if any(row[c] is not None for row in rows.values())]
    rows |= {f"*{name} digits themselves*": result["scale"][name] for name in ("noisy", "clean")}
    lines = [["", *(COLUMNS[c][0] for c in shown)], ["---", *("---:" for _ in shown)]]
    for label, row in rows.items():
        values = ("" if row.get(c) is None else COLUMNS[c][1].format(row[c]) for c in shown)
        lines.append([label, *values])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def conditions(result: dict[str, Any]) -> str:
    """Under what conditions the figures were made, in words."""
    how, rows = result["settings"], result["rows"].values()

    def of(key: str) -> str:
        values = (row[key] if key in row else row["machine"][key] for row in rows)
        return ", ".join(dict.fromkeys(str(value) for value in values))

    return (
        f"{how['digits']:,} noisy digits; network `{how['settings']['network']}`, "
        f"batches of {how['settings']['batch']}, in "
        f"{of('precision')}; seed {how['seed']}. {how['held']} digits restored. FD and SWD: "
        f"{how['samples']:,} samples, those of the prior drawn in {of('sampling')} with "
        f"{how['levels']} levels, against {how['reference']:,} digits. *Clean digits* are as many "
        "as the samples; two halves of the test digits in use are at FD "
        f"{result['scale']['halves']['clean']:.2f}. {of('cpu')}, {of('threads')} threads, "
        f"{of('gpu').replace('None', 'no GPU')}, torch {of('torch')}, commit {of('commit')}."
    )


def page(folder: Path = RESULTS) -> str:
    """The page, from the figures kept in a folder; raises InputError if there are none."""
    parts = [
        "# Benchmark: learning from noisy digits",
        "Written by `python benchmarks/learn.py --table` from `benchmarks/results/`; made by "
        "`python benchmarks/learn.py --mnist DIR --out OUT --profile PROFILE`.",
        READING.rstrip(),
    ]
    kept = (folder / "learn-small.json", folder / "learn-full.json")
    if not any(file.exists() for file in kept):
        raise InputError(f"no figures in {folder}: put OUT/learn.json there as learn-small.json")
    for file in filter(Path.exists, kept):
        result = json.loads(file.read_text())
        parts += [f"## {result['settings']['profile']}", conditions(result), table(result)]
        if file.with_suffix(".png").exists():
            link = os.path.relpath(file.with_suffix(".png"), PAGE.parent)
            parts.append(f"![digits, restorations and prior samples of every row]({link})")
    return "\n\n".join(parts) + "\n"


def compare(options: Options) -> dict[str, Any]:
    """Runs the rows that are not finished and writes OUT/learn.json and OUT/learn.png."""
    if options.mnist is None or options.out is None:
        raise InputError("give --mnist (folder of the MNIST files) and --out, or --table")
    done = finished(options)
    for name in (name for name in ROWS if name in options.rows and name not in done):
        print(f"{ROWS[name]} ...", file=sys.stderr, flush=True)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            process.submit(run_row, name, options).result()
    rows = finished(options)
    if not rows:
        raise InputError("no row is finished: name one in --rows")
    digits = load(options.mnist, PROFILES[options.profile])  # not sooner: see `cost`
    result = {
        "settings": settings(options),
        "machine": machine(),
        "scale": scale(digits, options.seed),
        "rows": {name: {k: row[k] for k in row if k != "settings"} for name, row in rows.items()},
    }
    write_json(options.out / "learn.json", result)
    truth = digits.held[:SHOWN]
    shown = {
        ROWS[name]: safetensors.torch.load_file(options.out / "rows" / f"{name}.safetensors")
        for name in rows
    }
    draw_picture(options.out / "learn.png", truth, measure(truth, options.seed, TEST), shown)
    return result


def main() -> int:
    options = tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        if options.table:
            write_atomically(PAGE, page().encode())
        else:
            print(table(compare(options)))
    except InputError as error:
        print(f"learn.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
