"""Restore images with the generic model, which has seen synthetic images only, or start from it.

Profile `denoising`: PSNR of images of five kinds with Gaussian noise, and of real captures, beside
non-local means and BM3D, which are given the noise. Profile `starts`: PSNR of held-out captures
after a short run on crops of other captures, from random weights and from the generic ones.

    python benchmarks/generic/run.py --data DIR --out OUT --profile denoising
    python benchmarks/generic/run.py --data DIR --out OUT --profile starts
    python benchmarks/generic/run.py --table

DIR has natural/bsds500_450.parquet, mri/brain_mri_128_300.npz and microscopy/
fmd_confocal_bpae_b.npz. The same command continues an interrupted run. Figures of BM3D need the
package bm3d (for non-commercial use only). A picture for each kind of images is in OUT, too.
"""

import io
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import common
from benchmarks.captures import methods as filters
from benchmarks.captures.run import random_crops
from benchmarks.captures.sets import fmd, load, with_brightness_of
from benchmarks.common import DataOptions, Row, Suite, markdown
from unmurk.diffusion.prior import Prior
from unmurk.evaluation.metrics import psnr
from unmurk.flows.posterior import Posterior
from unmurk.io.images import load_images
from unmurk.io.packaged import GENERIC
from unmurk.io.saving import save_images
from unmurk.io.weights import digest
from unmurk.noise import PoissonGaussian
from unmurk.noise_estimation import estimate_noise
from unmurk.operators import as_operator
from unmurk.problem import Problem
from unmurk.tiling import posterior_for, prior_for
from unmurk.training import Recipe, learn

__all__: list[str] = []

LEVELS = (0.05, 0.1, 0.2)
SETS = ("nuclei", "FMD", "BSDS gray", "BSDS color", "MRI")
CAPTURES = "FMD captures"
KIMG = (2.0, 6.0)
DRAWS = 16
FOLD = 3  # the held-out fields of the starts: every fourth
# for a run of minutes: R2R pre-training is cheap, the flow is costly
SHORT = Recipe(r2r=0.7, e_step=0.85, flow=0.92)
REFERENCES = ("non-local means", "BM3D")


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions):
    """Restore images with the generic model, or start from it."""

    profile: Literal["denoising", "starts"] = "denoising"
    """What is measured."""
    model: str = "generic"
    """The model, by name or by its run folder."""
    images: int = 16
    """Images of each kind."""
    side: int = 128
    """Images are cropped to squares of this many pixels, in their middle."""


# -- data -----------------------------------------------------------------------------------------


def images_of(name: str, options: Options) -> Tensor:
    """Clean images of a kind (N, C, H, W), spread evenly over the set."""
    if name == "nuclei":
        found = load_images("nuclei:val").images
    elif name == "FMD":
        found = torch.stack(fmd(options.data_folder)[1])[:, None]
    elif name == "MRI":
        found = load_images(options.data_folder / "mri" / "brain_mri_128_300.npz:images").images
    else:
        return photographs(options, color=name == "BSDS color")
    found = found[np.linspace(0, len(found) - 1, min(options.images, len(found))).astype(int)]
    return middle(found, options.side)


def photographs(options: Options, color: bool) -> Tensor:
    """Photographs of CBSD68, in gray or in color."""
    from PIL import Image
    from pyarrow import parquet

    table = parquet.read_table(options.data_folder / "natural" / "bsds500_450.parquet")
    rows = [i for i, chosen in enumerate(table["in_cbsd68"].to_pylist()) if chosen]
    found = []
    for row in np.linspace(0, len(rows) - 1, options.images).astype(int):
        picture = Image.open(io.BytesIO(table["image"][rows[row]].as_py()))
        pixels = torch.from_numpy(np.array(picture.convert("RGB" if color else "L")))
        pixels = pixels.permute(2, 0, 1) if color else pixels[None]
        found.append(middle(pixels[None], options.side))
    return torch.cat(found).float() / 255


def middle(images: Tensor, side: int) -> Tensor:
    """The square in the middle of images (N, C, H, W)."""
    top, left = (max(0, (n - side) // 2) for n in images.shape[-2:])
    return images[..., top : top + side, left : left + side].contiguous()


# -- methods --------------------------------------------------------------------------------------


def for_channels(model: str, channels: int) -> str:
    """The model for images of a number of channels: of the packaged ones, that of color images."""
    return GENERIC[1] if model == GENERIC[0] and channels == 3 else model


def restore(y: Tensor, problem: Problem, model: str) -> Tensor:
    """The posterior mean, as `unmurk restore` returns it."""
    posterior = Posterior.load(for_channels(model, y.shape[1]))
    return posterior_for(posterior, y.shape[1:]).mean_std(y, problem, DRAWS)[0]


@torch.no_grad()
def denoise(y: Tensor, problem: Problem, model: str) -> Tensor:
    """The prior's denoiser D(y, sigma)."""
    prior = Prior.load(for_channels(model, y.shape[1]))
    return prior_for(prior, y.shape[1:]).denoise(y, problem.sigma)


def estimated(y: Tensor, kind: Literal["gaussian", "poisson-gaussian"]) -> Problem:
    """The problem of noisy images whose noise is estimated from them."""
    return Problem("identity", estimate_noise(y, as_operator("identity"), kind))


def methods(options: Options, model: bool) -> dict[str, Callable[[Tensor, Problem], Tensor]]:
    """Methods for images with Gaussian noise: those of the model, or the others."""
    if not model:
        return {
            "noisy": lambda y, problem: y,
            "non-local means": lambda y, problem: filters.non_local_means(y, problem.sigma),
            "BM3D": lambda y, problem: filters.bm3d(y, problem.sigma),
        }
    return {
        "restore": lambda y, problem: restore(y, problem, options.model),
        "restore, noise estimated": lambda y, _: restore(
            y, estimated(y, "gaussian"), options.model
        ),
        "denoiser of the prior": lambda y, problem: denoise(y, problem, options.model),
    }


def counting(options: Options, model: bool) -> dict[str, Callable[[Tensor, Problem], Tensor]]:
    """Methods for captures with Poisson-Gaussian noise; filters work after a transform."""
    if model:
        name = "restore, noise estimated"
        return {name: lambda y, problem: restore(y, problem, options.model)}

    def transformed(run: Callable[[Tensor, float], Tensor]) -> Callable[..., Tensor]:
        def method(y: Tensor, problem: Problem) -> Tensor:
            assert isinstance(problem.noise, PoissonGaussian)
            return filters.Anscombe(problem.noise).around(run, y)

        return method

    return {
        "noisy": lambda y, problem: y,
        "non-local means": transformed(filters.non_local_means),
        "BM3D": transformed(filters.bm3d),
    }


# -- denoising ------------------------------------------------------------------------------------


def measured(name: str, sigma: float, options: Options) -> tuple[Tensor, Tensor, Problem]:
    """Clean images of a kind, noisy ones, and how these were made."""
    if name != CAPTURES:
        clean, problem = images_of(name, options), Problem("identity", sigma)
        return clean, problem.simulate(clean, options.seed), problem
    captures, published = fmd(options.data_folder)
    truth = [with_brightness_of(y[0], x) for y, x in zip(captures, published, strict=True)]
    raw, clean = torch.stack(captures)[:, :1], torch.stack(truth)[:, None]
    chosen = np.linspace(0, len(raw) - 1, min(options.images, len(raw))).astype(int)
    x, y = (middle(images[chosen], options.side) for images in (clean, raw))
    return x, y, estimated(raw, "poisson-gaussian")


def denoising_row(name: str, sigma: float, options: Options, model: bool) -> Row:
    """PSNR of every image of a kind by the methods of the model or by the others."""
    clean, y, problem = measured(name, sigma, options)
    found = {}
    for method, run in (counting if name == CAPTURES else methods)(options, model).items():
        if method != "BM3D" or filters.available("bm3d"):
            found[method] = run(y, problem)
    part = "model" if model else "references"
    draw(options, f"{name} {sigma:g} {part}", [clean, y, *found.values()])
    scores = {method: psnr(x, clean).tolist() for method, x in found.items()}
    return {"set": name, "sigma": sigma, "psnr": scores}


def draw(options: Options, name: str, columns: list[Tensor]) -> None:
    """Write a picture of three images, by one column for each method."""
    rows = [torch.cat([x[i].clamp(0, 1) for x in columns], 2) for i in range(3)]
    path = options.folder / "pictures" / name.replace(" ", "_")
    save_images(torch.cat(rows, 1)[None], path, format="png")


def denoising(options: Options) -> list[Row]:
    """All rows, the methods of the model beside the others."""
    tasks = [(name, sigma) for name in SETS for sigma in LEVELS] + [(CAPTURES, 0.0)]
    parts = [rows_of(options, tasks, partial(denoising_row, model=m), m) for m in (False, True)]
    return [a | {"psnr": a["psnr"] | b["psnr"]} for a, b in zip(*parts, strict=True)]


def rows_of(
    options: Options, tasks: list[tuple[str, float]], run: Callable[..., Row], model: bool
) -> list[Row]:
    """Run the rows that are not finished, and return all."""
    chosen = settings(options, model)
    folder = options.folder / (options.profile if model else "references")
    return [
        common.stored_row(
            folder / f"{name} {value:g}.json".replace(" ", "_"),
            partial(run, name, value, options),
            chosen,
        )
        for name, value in tasks
    ]


def settings(options: Options, model: bool = True) -> Row:
    """All settings that decide a figure, with the weights if the figure is one of the model."""
    chosen: Row = {"images": options.images, "side": options.side, "seed": options.seed}
    if options.profile == "denoising":
        chosen |= {"truth of captures": "with the brightness of the capture"}
    for name in sorted(
        {for_channels(options.model, channels) for channels in (1, 3)} if model else ()
    ):
        chosen |= {f"{Path(name).name} prior": digest(Prior.load(name))}
        chosen |= {f"{Path(name).name} posterior": digest(Posterior.load(name))}
    return chosen


# -- starts ---------------------------------------------------------------------------------------


def start_row(name: str, kimg: float, options: Options) -> Row:
    """PSNR of the first capture of every held-out field after a run of `kimg`."""
    split = load("fmd", options.data, FOLD)
    observed, truth = torch.cat(split.observed)[:, None], torch.stack(split.published)[:, None]
    noise = estimate_noise(observed, as_operator("identity"), "poisson-gaussian")
    problem = Problem("identity", noise)
    run = options.folder / "runs" / f"{name}-{kimg:g}"
    how = {"kimg": kimg, "batch": 16, "seed": options.seed}
    start = {"start": options.model if name == "generic" else "none"}
    _, posterior = learn(
        random_crops(split.observed, 4096, options.seed),
        problem,
        "flowdiff",
        out=run,
        recipe=SHORT,
        **how,
        **start,
    )
    y = torch.stack([captures[:1] for captures in split.held])
    tiled = posterior_for(posterior, y.shape[1:])
    x = torch.cat([tiled.mean_std(one[None], problem, DRAWS)[0] for one in y])
    last = common.metrics(run)[-1]
    scores = psnr(x, truth).tolist()
    return {"start": name, "kimg": kimg, "seconds": last["seconds"], "psnr": scores}


def measure(options: Options) -> Row:
    """All rows; writes OUT/generic-PROFILE.json."""
    torch.set_num_threads(1)
    if options.profile == "starts":
        rows = [
            row
            for model, name in ((False, "none"), (True, "generic"))
            for row in rows_of(options, [(name, kimg) for kimg in KIMG], start_row, model)
        ]
    else:
        rows = denoising(options)
    shown = {key: value for key, value in settings(options).items() if key != "seed"}
    return SUITE.store(options, shown, rows=rows)


# -- the page -------------------------------------------------------------------------------------


def view(result: Row) -> Row:
    """What the page shows: the table, and the differences to the references."""
    rows = result["rows"]
    if result["settings"]["profile"] == "starts":
        lines = [["start", "kimg", "seconds", "PSNR"]]
        lines += [
            [r["start"], f"{r['kimg']:g}", f"{r['seconds']:.0f}", f"{mean(r['psnr']):.2f}"]
            for r in rows
        ]
        return {"table": markdown(lines), "differences": ""}
    names = list(dict.fromkeys(name for row in rows for name in row["psnr"]))
    lines = [["images", "noise", *names]]
    for row in rows:
        cells = [f"{mean(row['psnr'][n]):.2f}" if n in row["psnr"] else "" for n in names]
        lines.append([row["set"], f"{row['sigma']:g}" if row["sigma"] else "its own", *cells])
    return {"table": markdown(lines), "differences": markdown(differences(rows, names))}


def differences(rows: list[Row], names: list[str]) -> list[list[str]]:
    """Lines of the table of the mean and the least difference to each reference, in dB."""
    lines = [["", *(f"{kind} to {r}" for r in REFERENCES for kind in ("mean", "least"))]]
    for name in names:
        cells = []
        for reference in REFERENCES:
            gains = [
                mean(row["psnr"][name]) - mean(row["psnr"][reference])
                for row in rows
                if name in row["psnr"] and reference in row["psnr"]
            ]
            cells += [f"{mean(gains):+.2f}", f"{min(gains):+.2f}"] if gains else ["", ""]
        lines.append([name, *cells])
    return lines


mean = statistics.fmean


SUITE = Suite(
    *("generic", view, "generic"),
    arguments="--data DIR --out OUT",
    profiles=("denoising", "starts"),
)

if __name__ == "__main__":
    sys.exit(SUITE.main(Options, measure))
