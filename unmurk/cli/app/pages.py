"""The page of a result: images before and after, error bars, residual, figures, the command.

It is a page of `cli.report`, as a learning run has one: a single file without scripts of others,
which the app shows in a frame and the user can keep.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import size_text
from ...io.axes import ALL
from ...io.formats.readers import holds_images, is_folder
from ...io.images import read_images
from ...io.jobs import STD, jobs_of
from ...training.examples import distinct
from ..report import DIVERGING, Column, Commands, Comparison, Comparisons, Section, Table, write
from ..report import Text as Paragraphs
from .pictures import busiest

if TYPE_CHECKING:
    from ...io.scale import Spans
    from ...problem import Problem

__all__ = ["Example", "examples_of", "figures_of", "write_page"]

COUNT = 4  # images on the page
CANDIDATES = 12  # files that they are chosen from
PAGES = 4  # pages of a file that they are chosen from
IMAGES = 32  # images of an array that they are chosen from
SIDE = 512  # pixels to a side of what is shown of an image
CAPTION = (
    "Drag the line between what was measured and what was restored. Black and white are the 0.1 "
    "and the 99.9 percentile of the restored image."
)
RESIDUAL = (
    "The residual, measured minus restored, should look like noise alone: structure in it was "
    "removed with the noise. It is red where the measured image is brighter, blue where it is "
    "darker."
)
STANDARD = (
    "The standard deviation says how sure each pixel is: the true value lies within one of it in "
    "about two of three pixels."
)


FIGURES = {
    "chi2": "Chi-square: the mean square of measured minus restored, in units of the noise. Near "
    "1 the result explains what was measured; above it does not; below it follows the noise.",
    "std": "Standard deviation, the mean over all pixels, where white is 1.",
}


@dataclass(frozen=True)
class Example:
    """One image of a result.

    Attributes:
        label: Its name.
        number: Its number in the set, which masks depend on.
        y: The measurement (C, h, w).
        x: The restored image (C, H, W).
        std: Its standard deviation, or None.
    """

    label: str
    number: int
    y: Tensor
    x: Tensor
    std: Tensor | None = None


def examples_of(data: Path, result: Mapping[str, Any], out: Path, span: "Spans") -> list[Example]:
    """Read some images of a result.

    Args:
        data: The measurements.
        result: What the command printed as JSON.
        out: The folder of the results.
        span: Numbers of black and white; None: those of the files.

    Raises:
        InputError: A file cannot be read.
    """
    if is_folder(data) or holds_images(data):
        found = _pictures(data, out, span)
    else:
        found = _arrays(data, result, span)
    return found


def differing(found: Sequence[Example]) -> list[Example]:
    """Return a few examples that differ from each other."""
    if len(found) <= COUNT:
        return list(found)
    height = min(one.y.shape[-2] for one in found)
    width = min(one.y.shape[-1] for one in found)
    parts = torch.stack([_window(one.y, height, width) for one in found])
    return [found[i] for i in distinct(parts.mean(1, keepdim=True), COUNT)]


def _pictures(data: Path, out: Path, span: "Spans") -> list[Example]:
    from ..commands.restoring import spans_of

    jobs = [job for job in jobs_of(data, out, True) if job.out.is_file()]
    known = spans_of(data, [job.file for job in jobs], span, None, ALL) or span
    found = []
    for job in jobs[:: max(1, len(jobs) // CANDIDATES)][:CANDIDATES]:
        few = min(job.pages, PAGES)
        y = read_images(job.source, limit=few, span=known, nan="mask", select=job.select)
        x = read_images(job.out, limit=few, span=known).images
        beside = job.beside(STD)
        stds: Sequence[Tensor | None] = [None] * few
        if beside.is_file():
            stds = list(read_images(beside, limit=few).images / y.scale.step.float())
        for page, (one, restored, std) in enumerate(zip(y.images, x, stds, strict=True)):
            label = job.file.name if job.pages == 1 else f"{job.file.name}, page {page}"
            found.append(Example(label, job.number + page, one, restored, std))
    return found


def _arrays(data: Path, result: Mapping[str, Any], span: "Spans") -> list[Example]:
    y = read_images(data, limit=IMAGES, span=span, nan="mask")
    x = read_images(str(result["out"]), limit=IMAGES, span=span).images
    stds: Sequence[Tensor | None] = [None] * len(x)
    if result.get(STD):
        stds = list(read_images(str(result[STD]), limit=IMAGES).images / y.scale.step.float())
    return [
        Example(f"image {number}", number, one, restored, std)
        for number, one, restored, std in zip(y.numbers, y.images, x, stds, strict=False)
    ]


def _window(image: Tensor, height: int, width: int) -> Tensor:
    row, column = ((a - b) // 2 for a, b in zip(image.shape[-2:], (height, width), strict=True))
    return image[:, row : row + height, column : column + width]


# -- the page -------------------------------------------------------------------------------------


def figures_of(examples: Sequence[Example], problem: "Problem") -> dict[str, float]:
    """Return figures of a result that need no truth.

    Args:
        examples: Images of the result.
        problem: How they were measured.
    """
    chi2 = [residual.square().mean() for residual in map(_residual_of(problem), examples)]
    found = {"chi2": float(torch.stack(chi2).mean())} if chi2 else {}
    stds = [one.std.mean() for one in examples if one.std is not None]
    if stds:
        found["std"] = float(torch.stack(stds).mean())
    return found


def _residual_of(problem: "Problem") -> Any:
    """Return a function that computes the residual of an example in units of the noise.

    Only measured values are returned: (K,) or, for `shape=True`, the whole of it (C, h, w).
    """

    def residual(one: Example, shape: bool = False) -> Tensor:
        bound = problem.bind([one.number], tuple(one.x.shape))
        y = one.y[None].nan_to_num(0.0)
        scaled = bound.residual(one.x[None], y) / bound.deviation(y)
        scaled = torch.where(one.y.isfinite()[None], scaled, 0.0)
        if shape:
            return scaled[0]
        observed = bound.operator.apply_mask(torch.ones_like(y)) > 0
        return scaled[observed & one.y.isfinite()[None]]

    return residual


def write_page(
    path: Path,
    title: str,
    examples: Sequence[Example],
    problem: "Problem",
    commands: Mapping[str, str],
    remarks: Sequence[str] = (),
    more: Sequence[Section] = (),
) -> Path:
    """Write the page of a result.

    Args:
        path: The HTML file.
        title: Its heading.
        examples: Images of the result, of which the page shows some.
        problem: How they were measured.
        commands: What each command does, and the command.
        remarks: What the command printed.
        more: Further sections, after the images, in place of the figures.

    Raises:
        InputError: The file cannot be written.
    """
    sections: list[Section] = []
    if examples:
        captions = [CAPTION]
        items = [_comparison(one, problem) for one in differing(examples)]
        if any(one.std is not None for one in examples):
            captions.append(STANDARD)
        if any(one.y.shape[-2:] == one.x.shape[-2:] for one in examples):
            captions.append(RESIDUAL)
        if any(max(one.x.shape[-2:]) > SIDE for one in examples):
            captions.append(
                f"Of larger images the page shows the part of {SIDE} pixels a side with most "
                "contrast; the files are whole."
            )
        sections.append(Comparisons("", items, ("measured", "restored"), " ".join(captions)))
    sections += more
    if examples and not more:
        rows = [[FIGURES[k], v] for k, v in figures_of(examples, problem).items()]
        sections.append(Table("Figures", ["figure", "value"], rows))
    if remarks:
        sections.append(Paragraphs("What the command said", list(remarks)))
    sections.append(Commands("The same on the command line", commands))
    return write(path, title, sections)


def _comparison(one: Example, problem: "Problem") -> Comparison:
    """Return an image before and after with its maps, cut to what the page shows."""
    height, width = one.x.shape[-2:]
    factor = height / one.y.shape[-2] if one.y.ndim == 3 else 1.0
    row, column = busiest(one.x, SIDE)

    def cut(image: Tensor) -> Tensor:
        if image.shape[-2:] != (height, width):
            image = F.interpolate(image[None], (height, width), mode="nearest")[0]
        return image[:, row : row + SIDE, column : column + SIDE]

    maps: dict[Column, Tensor] = {}
    if one.std is not None:
        maps[Column("standard deviation", "shared", "magma")] = cut(one.std)
    if one.y.shape[-2:] == one.x.shape[-2:]:
        residual = _residual_of(problem)(one, shape=True)
        maps[Column("residual in units of the noise", (-3.0, 3.0), DIVERGING)] = cut(residual)
    x = cut(one.x)
    sample = x.flatten()[:: max(1, x.numel() // 2**20)]
    low, high = (float(sample.quantile(q)) for q in (0.001, 0.999))
    ends = (min(low, 0.0) if low < 0.05 else low, max(high, low + 1e-3))
    label = f"{one.label}, {size_text((height, width))} pixels"
    if factor != 1:
        label += f" from {size_text(one.y.shape[-2:])}"
    y, x = (_shown(part) for part in (cut(one.y.nan_to_num(0.0)), x))
    return Comparison(label, y, x, maps, ends)


def _shown(image: Tensor) -> Tensor:
    return image if image.shape[0] in (1, 3) else torch.cat(list(image), -1)[None]
