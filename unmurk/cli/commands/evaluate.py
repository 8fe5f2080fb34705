"""`unmurk evaluate`: scores of restored images."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from ...bounds import Real
from ...errors import InputError
from ..data import images_of, place, selection_of
from ..options import FILES, Axes, Channel, Command, Json, MaybePath, MaybeRange

if TYPE_CHECKING:
    import torch

    from ...io.axes import Selection

__all__ = ["Evaluate"]


@dataclass
class Evaluate(Command):
    """Compare restored images with the clean ones."""

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
    range: MaybeRange = None
    axes: Axes = None
    channel: Channel = ()
    json: Json = False

    def run(self) -> dict[str, Any]:
        """See `Command`."""
        select = selection_of(self)
        restored, truth = _in_one_scale(self.restored, self.reference, self.range, select)
        if restored.shape != truth.shape:
            raise InputError(
                f"{self.restored} has images {_shape(restored)}, {self.reference} "
                f"{_shape(truth)} (number, channels, height, width): they must agree"
            )
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


def _in_one_scale(
    restored: Path, reference: Path, span: tuple[float, float] | None, select: "Selection"
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Return restored and clean images in the scale of the latter.

    Numbers of the same type get the same range. Restored files of another type have their own;
    floats are used as they are. The axes concern the clean images; the channels also restored ones
    that have more of them.
    """
    from ...io.scale import Span

    truth = images_of(reference, span=span, select=select)
    scale = truth.scale
    full = scale.dtype[0] in "iu"
    known = Span(scale.offset, scale.offset + scale.gain, scale.dtype) if full else None
    own = replace(select, axes="", lenient=True, more=True)
    found = images_of(restored, span=span or known, select=own)
    return found.images, truth.images


def _shape(images: "torch.Tensor") -> str:
    return "x".join(map(str, images.shape))


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
            f"{path}: expected samples of shape Sx{'x'.join(map(str, shape))}, got "
            f"{_shape(samples)}"
        )
    return samples
