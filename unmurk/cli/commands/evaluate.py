"""`unmurk evaluate`: scores of restored images."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from ...bounds import Real
from ...errors import InputError, size_text
from ...io.formats.readers import is_folder
from ...progress import each
from ..data import images_of, place, selection_of
from ..options import FILES, Axes, Channel, Command, Json, MaybePath, Ranges

if TYPE_CHECKING:
    import torch

    from ...io.axes import Selection
    from ...io.scale import Spans

__all__ = ["Evaluate"]


@dataclass
class Evaluate(Command):
    """Compare restored images with the clean ones.

    Images of two folders may differ in size; the standard deviations in a folder of results are
    left out.
    """

    restored: Annotated[
        Positional[Path], arg(metavar="RESTORED", help=f"Restored images: {FILES}")
    ]
    reference: Annotated[
        Positional[Path], arg(metavar="REFERENCE", help="The clean images, in the same order.")
    ]
    samples: MaybePath = None
    """Posterior samples (S, N, C, H, W) in a .npy file, for coverage and spread."""
    level: Annotated[float, Real(0.001, 0.999)] = 0.9
    """Level of the intervals whose coverage is measured, a number from 0.001 to 0.999."""
    range: Ranges = ()
    axes: Axes = None
    channel: Channel = ()
    json: Json = False

    def run(self) -> dict[str, Any]:
        """See `Command`."""
        select = selection_of(self)
        if is_folder(self.restored) and is_folder(self.reference):
            files = _pairs(self.restored, self.reference, select)
            if files:
                return self._by_file(files, select)
        restored, truth = _in_one_scale(self.restored, self.reference, self.range, select)
        if restored.shape != truth.shape:
            raise _differ(self.restored, restored, self.reference, truth)
        from ...evaluation import metrics

        restored, truth = place(restored, truth)
        scores: dict[str, Any] = {"images": len(truth), **metrics.fidelity(restored, truth)}
        if tuple(truth.shape[1:]) in {(1, 28, 28), (1, 32, 32)} and len(truth) > 1:
            scores["frechet"] = metrics.frechet(truth, restored)
        if self.samples is not None:
            samples = place(_samples(self.samples, tuple(truth.shape)))[0]
            scores["coverage"] = metrics.coverage(samples, truth, level=self.level)
            scores["spread"] = metrics.spread(samples)
        return scores

    def _by_file(self, files: list[tuple[Path, Path]], select: "Selection") -> dict[str, Any]:
        """Return the scores of images of several sizes, averaged over the images."""
        from ...evaluation import metrics
        from .restoring import spans_of

        if self.samples is not None:
            raise InputError(
                f"--samples needs images of one size, and those in {self.reference} differ"
            )
        truths = [truth for _, truth in files]
        spans = spans_of(self.reference, truths, self.range, math.inf, select)
        parts = []
        for pair in each(files):
            restored, truth = _in_one_scale(*pair, spans, select)
            if restored.shape != truth.shape:
                raise _differ(pair[0], restored, pair[1], truth)
            restored, truth = place(restored, truth)
            parts.append({"images": len(truth), **metrics.fidelity(restored, truth)})
        return _average(parts)


def _pairs(restored: Path, reference: Path, select: "Selection") -> list[tuple[Path, Path]]:
    """Pair the files of two folders if the clean images differ in size; else return none."""
    from ...io.formats.pictures import open_pages
    from ...io.images import pictures_in

    shapes, truths = set(), pictures_in(reference)
    for file in truths:
        with open_pages(file, select) as pages:
            shapes.add(tuple(pages.shape))
    if len(shapes) == 1:
        return []
    found = pictures_in(restored)
    if len(found) != len(truths):
        raise InputError(
            f"{restored} holds {len(found)} pictures, {reference} {len(truths)}: they must agree"
        )
    return list(zip(found, truths, strict=True))


def _average(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the scores of all images from the scores of each file (see `metrics.fidelity`)."""
    total = {name: sum(part[name] for part in parts) for name in ("images", "exact", "beyond")}
    finite = [part["images"] - part["exact"] - part["beyond"] for part in parts]
    known = [(n, part["psnr"]) for n, part in zip(finite, parts, strict=True) if n]
    psnr = sum(n * value for n, value in known) / sum(finite) if known else math.inf
    ssim = None
    if all(part["ssim"] is not None for part in parts):
        ssim = sum(part["images"] * part["ssim"] for part in parts) / total["images"]
    images = total.pop("images")
    return {"images": images, "psnr": psnr, **total, "ssim": ssim}


def _in_one_scale(
    restored: Path, reference: Path, span: "Spans", select: "Selection"
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Return restored and clean images in the scale of the latter.

    Numbers of the same type get the same range. Restored files of another type have their own;
    floats are used as they are. The axes concern the clean images; the channels also restored ones
    that have more of them.
    """
    truth = images_of(reference, span=span, select=select)
    scale = truth.scale
    full = scale.dtype[0] in "iu"
    known = scale.ends if full else None
    own = replace(select, axes="", lenient=True, more=True, results=True)
    found = images_of(restored, span=span or known, select=own)
    return found.images, truth.images


def _differ(
    restored: Path, x: "torch.Tensor", reference: Path, truth: "torch.Tensor"
) -> InputError:
    """Return the error for images of two files whose shapes differ."""
    return InputError(
        f"{restored} has images {size_text(x.shape)}, {reference} {size_text(truth.shape)} "
        "(number, channels, height, width): they must agree"
    )


def _samples(path: Path, shape: tuple[int, ...]) -> "torch.Tensor":
    """Read posterior samples (S, N, C, H, W) of images with a shape (N, C, H, W)."""
    import numpy as np
    import torch

    from ...io.formats.arrays import read_array
    from ...io.formats.pictures import check_finite

    array = check_finite(read_array(path)[0], str(path))
    if array.dtype.kind not in "buif":
        raise InputError(f"{path} holds {array.dtype}: give real numbers")
    samples = torch.from_numpy(np.ascontiguousarray(array, np.float32))
    if samples.ndim == 4 and shape[1] == 1:
        samples = samples.unsqueeze(2)
    if samples.ndim != 5 or tuple(samples.shape[1:]) != shape:
        raise InputError(
            f"{path}: expected samples of shape Sx{size_text(shape)}, got "
            f"{size_text(samples.shape)}"
        )
    return samples
