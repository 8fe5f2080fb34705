"""The image sets of the suite: captures to learn from, captures to restore, and their truth.

`fmd`: confocal captures of BPAE cells, blue channel (Y. Zhang et al., "A Poisson-Gaussian
denoising dataset with real fluorescence microscopy images", CVPR 2019, arXiv 1812.10366): sixteen
fields of 512 x 512 pixels, five single captures of each, and the mean of fifty. The brightness of
a field drifted while the fifty were taken: the first capture is up to 17 % darker than their mean,
or up to 7 % brighter, which no restoration of one capture can know. So the truth of a field is the
mean of fifty with the brightness of the first capture (`with_brightness_of`).
DATA/microscopy/fmd_confocal_bpae_b.npz holds `raw` (F, 5, H, W) and `gt` (F, H, W), 8 bits.

`nuclei`: whole fluorescence images of many sizes (Data Science Bowl 2018, BBBC038, CC0) with
simulated camera noise. DATA/microscopy/dsb2018_fluo_images.parquet holds them as PNG files. Each
is scaled by its own percentiles, its black and white to 0.15 and 0.85, as a camera with an offset
records it: noise is not clipped. Five captures of it are simulated.

`toy`: synthetic images of three sizes with simulated noise; figures without meaning.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unmurk.errors import InputError
from unmurk.problem import Problem
from unmurk.rng import generator

__all__ = [
    "BLACK",
    "CAPTURES",
    "FOLDS",
    "LEVELS",
    "WHITE",
    "SetName",
    "Split",
    "fmd",
    "load",
    "with_brightness_of",
]

SetName = Literal["fmd", "nuclei", "toy"]
FOLDS = 4  # the fields with number i are held out in fold i modulo FOLDS
CAPTURES = 5  # single captures of one field
AVERAGED, LEVELS = 50, 255  # captures in a mean of FMD, and the gray levels above 0 of its file
IMAGES = 64  # whole images of nuclei that are used
BLACK, WHITE = 0.15, 0.85  # of the nuclei; at black the noise has a deviation of 0.044
CAMERA = "poisson-gaussian,gain=0.01,sigma=0.02"  # the simulated noise of the nuclei
SIDES = (72, 96, 104)  # of the toy images
SMOOTH = 81  # path of the stream of the toy images


@dataclass(frozen=True)
class Split:
    """A fold of a set.

    Attributes:
        observed: Captures of each field to learn from, (K, H, W) in [0, 1]; sizes may differ.
        means: Their truth (H, W). Only the strengths of the filters are chosen by it.
        held: Captures of the held-out fields, (K, H, W).
        truth: Their truth (H, W), for scoring only.
        published: Their truth (H, W) as it was published; other than `truth` for real captures.
        averaged: Captures whose mean the truth is; None if it is exact.
    """

    observed: list[Tensor]
    means: list[Tensor]
    held: list[Tensor]
    truth: list[Tensor]
    published: list[Tensor]
    averaged: int | None = None


def load(name: SetName, data: Path | None, fold: int, seed: int = 0) -> Split:
    """Return a fold of a set.

    Args:
        name: The set.
        data: The folder of the images; the set "toy" needs none.
        fold: The held-out fold, 0 to FOLDS - 1.
        seed: Seed of simulated noise.

    Raises:
        InputError: The images are absent or not as expected.
    """
    if name == "fmd":
        captures, published = fmd(_folder(data))
        pairs = zip(published, captures, strict=True)
        truth = [with_brightness_of(y[0], x) for x, y in pairs]
    else:
        clean = _smooth() if name == "toy" else _nuclei(_folder(data))
        truth, published, noise = clean, clean, Problem("identity", CAMERA)
        captures = [
            noise.simulate(x.expand(CAPTURES, 1, *x.shape), seed, range(5 * i, 5 * i + 5))[:, 0]
            for i, x in enumerate(clean)
        ]
    held = [i for i in range(len(truth)) if i % FOLDS == fold]
    rest = [i for i in range(len(truth)) if i % FOLDS != fold]
    return Split(
        [captures[i] for i in rest],
        [truth[i] for i in rest],
        [captures[i] for i in held],
        [truth[i] for i in held],
        [published[i] for i in held],
        AVERAGED if name == "fmd" else None,
    )


def with_brightness_of(capture: Tensor, truth: Tensor) -> Tensor:
    """The truth (H, W), with the gain and the offset at which it is nearest to a capture of it.

    They are those of the least squares fit of the capture by the truth, on which the noise of the
    capture has no influence on average.
    """
    away = (truth - truth.mean()).double()
    gain = (away * capture).sum() / away.square().sum()
    return (capture.double().mean() + gain * away).to(truth)


def _folder(data: Path | None) -> Path:
    if data is None:
        raise InputError("no images: give --data DIR, or take the set toy")
    return data


def fmd(data: Path) -> tuple[list[Tensor], list[Tensor]]:
    """The captures of each field (5, H, W), and the mean of fifty (H, W), in [0, 1].

    Raises:
        InputError: The images are absent or not as expected.
    """
    file, arrays = data / "microscopy" / "fmd_confocal_bpae_b.npz", []
    for key, axes in (("raw", 4), ("gt", 3)):
        try:
            with np.load(file, allow_pickle=False) as opened:
                found = opened[key]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"cannot read '{key}' of {file}: {error}") from error
        if found.dtype != np.uint8 or found.ndim != axes or len(found) < FOLDS:
            raise InputError(
                f"expected '{key}' of {file} to have 8 bits, {axes} axes and at least {FOLDS} "
                f"fields, got {found.dtype} {found.shape}"
            )
        arrays.append(list(torch.from_numpy(found).float() / 255))
    return arrays[0], arrays[1]


def _nuclei(data: Path) -> list[Tensor]:
    """Whole images of nuclei in [BLACK, WHITE], evenly spread over the file."""
    import PIL.Image
    import pyarrow.parquet

    file = data / "microscopy" / "dsb2018_fluo_images.parquet"
    try:
        table = pyarrow.parquet.read_table(file)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error}") from error
    found = []
    for i in np.linspace(0, len(table) - 1, IMAGES).astype(int):
        with PIL.Image.open(io.BytesIO(table["image"][int(i)].as_py())) as image:
            pixels = torch.from_numpy(np.array(image.convert("L"))).float()
        low, high = (float(table[key][int(i)].as_py()) for key in ("p0_5", "p99_9"))
        found.append(recorded(pixels, low, high))
    return found


def recorded(pixels: Tensor, low: float, high: float) -> Tensor:
    """Gray levels as the simulated camera records them: low at BLACK, high at WHITE."""
    return BLACK + (WHITE - BLACK) * ((pixels - low) / (high - low)).clamp(0, 1)


def _smooth() -> list[Tensor]:
    """Eight smooth images of three sizes."""
    draw = generator(0, SMOOTH)
    coarse = torch.rand(8, 1, 8, 8, generator=draw)
    sizes = [(SIDES[i % 3], SIDES[(i + 1) % 3]) for i in range(len(coarse))]
    return [
        F.interpolate(x[None], size, mode="bicubic")[0, 0].clamp(0, 1)
        for x, size in zip(coarse, sizes, strict=True)
    ]
