r"""Calibration frames of a camera: dark frame, flat field and hot pixels.

A pixel i with the dark signal :math:`d_i` and the relative sensitivity :math:`g_i` records

.. math:: r_i = d_i + g_i\, c_i + n_i ,\qquad
    y_i = \frac{r_i - d_i}{g_i} = c_i + \frac{n_i}{g_i} .

The dark frame gives d. The flat field f, a picture of even light, gives
:math:`g = (f - d)/\overline{(f - d)}` with the mean 1 in every channel. Both frames are means of
all images in their files, and their own noise is neglected: average as many captures as you
restore images, at least.

The division changes the noise: its standard deviation is :math:`\sigma/g_i`. All commands account
for this exactly. They take the noise of r, fit g A(x) to r - d (`operators.weighted`,
`noise_maps.flat_maps`), and estimate noise from r - d.

A hot or dead pixel differs from the median of its eight neighbors in the same direction in at
least 90 % of the images, and in the median over the images by more than 8 robust standard
deviations of all pixels. It counts as hidden, as do pixels of the flat field below `LEAST`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, size_text
from .axes import ALL, Selection
from .images import ImageSet, read_images
from .limits import file_digest
from .scale import Scale, Spans
from .source import Source

__all__ = ["Corrected", "Frames", "corrected_set", "hot_pixels", "read_frames"]

LEAST = 0.05  # sensitivity below which a pixel is hidden
FEWEST, AGREE, AWAY, MOST = 3, 0.9, 8.0, 0.01
SAMPLE = 64  # images that are searched for hot pixels
VARIES = 0.1  # relative spread of a flat field that is worth a remark


@dataclass(frozen=True)
class Frames:
    """Calibration frames, in units of [0, 1] images.

    Attributes:
        dark: Dark signal d, (C, H, W), or None.
        sensitivity: Sensitivity g, (C, H, W) with the mean 1, or None; 1 where it is hidden.
        hidden: Pixels that are hidden, (H, W) bool, or None.
        digests: SHA-256 of the files "dark" and "flat", for the run folder.

    >>> bool(Frames()), bool(Frames(dark=torch.zeros(1, 8, 8)))
    (False, True)
    """

    dark: Tensor | None = None
    sensitivity: Tensor | None = None
    hidden: Tensor | None = None
    digests: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(part is not None for part in (self.dark, self.sensitivity, self.hidden))

    def undivided(self) -> "Frames":
        """Return the frames without the sensitivity.

        >>> bool(Frames(sensitivity=torch.ones(1, 1, 1)).undivided())
        False
        """
        return replace(self, sensitivity=None)

    def correct(self, raw: Tensor, divide: bool = True) -> Tensor:
        """Correct images (B, C, H, W); hidden pixels become NaN.

        Args:
            raw: The images as recorded.
            divide: Whether to divide by the sensitivity.

        Raises:
            InputError: The frames have another size.

        >>> frames = Frames(torch.full((1, 1, 2), 0.1), torch.tensor([[[0.5, 1.5]]]))
        >>> frames.correct(torch.full((1, 1, 1, 2), 0.4))
        tensor([[[[0.6000, 0.2000]]]])
        """
        y = raw
        for part in (self.dark, self.sensitivity, self.hidden):
            if part is not None and part.shape[-2:] != raw.shape[-2:]:
                shown = size_text(part.shape[-2:])
                here = size_text(raw.shape[-2:])
                raise InputError(
                    f"the calibration frames have {shown} pixels, but an image has {here}: give "
                    "frames of the same camera and region"
                )
        if self.dark is not None:
            y = y - self.dark.to(y)
        if self.sensitivity is not None and divide:
            y = y / self.sensitivity.to(y)
        if self.hidden is not None:
            y = torch.where(self.hidden.to(y.device), torch.nan, y)
        return y

    def part(self, row: int, column: int, height: int, width: int) -> "Frames":
        """Return the frames of a rectangle of the images."""
        rows, columns = slice(row, row + height), slice(column, column + width)
        dark, sensitivity, hidden = (
            None if x is None else x[..., rows, columns]
            for x in (self.dark, self.sensitivity, self.hidden)
        )
        return Frames(dark, sensitivity, hidden, self.digests)

    def record(self) -> dict[str, Any]:
        """Return what a run folder keeps: digests, and the positions of hot pixels."""
        found: dict[str, Any] = dict(self.digests)
        if self.hidden is not None:
            found["hidden"] = self.hidden.nonzero().tolist()
        return found


class Corrected(Source):
    """Measurements with calibration frames applied when they are read; hidden pixels are NaN.

    Args:
        given: The measurements as recorded.
        frames: The frames.

    >>> import numpy as np
    >>> from unmurk.io.source import of_array
    >>> given = of_array("raw", np.full((1, 1, 2), 0.5, np.float32), None)
    >>> y = Corrected(given, Frames(torch.tensor([[[0.1, 0.3]]])))
    >>> y[:].flatten()
    tensor([0.4000, 0.2000])
    """

    def __init__(self, given: Source, frames: Frames) -> None:
        self.given, self.frames, self.shape = given, frames, given.shape
        self.skipped, self.scale, self.note = given.skipped, given.scale, given.note
        self.floats = given.floats or frames.hidden is not None

    def __getitem__(self, indices: Tensor | slice) -> Tensor:
        """Return corrected measurements (B, C, H, W) by their indices."""
        every = range(len(self))
        numbers = list(every[indices] if isinstance(indices, slice) else indices.tolist())
        return self.read(numbers).to(self.device)

    def read(self, indices: list[int]) -> Tensor:
        """See `Source`."""
        return self.frames.correct(self.given.read(indices))

    def fingerprint(self) -> dict[str, Any]:
        """Return that of the measurements as recorded; the run folder keeps the frames."""
        return self.given.fingerprint()


def _frame_span(scale: Scale) -> Spans:
    """Return the numbers of black and white that the frames of a set are read with."""
    if scale.channels:
        return 0, 1
    return None if (scale.offset, scale.gain) == (0, 1) else scale.ends._replace(dtype=None)


def read_frames(
    dark: Path | None,
    flat: Path | None,
    scale: Scale,
    shape: Sequence[int],
    *,
    hot: Tensor | None = None,
    select: Selection = ALL,
) -> Frames:
    """Read calibration frames in the scale of a set.

    Args:
        dark, flat: Files of one or more captures each; None: no such frame.
        scale: The scale of the set. The same number means the same light in all files.
        shape: Shape (C, H, W) of the images; frames of one channel serve all.
        hot: Hot pixels, (H, W) bool, or None.
        select: The channels of the set, which frames of as many channels have too.

    Raises:
        InputError: A file cannot be read, its size differs, or the flat field is not brighter than
            the dark frame.

    >>> import numpy as np
    >>> np.save("dark.npy", np.full((4, 1, 2), 0.1, np.float32))  # 4 captures
    >>> np.save("flat.npy", np.tile(np.float32([0.3, 0.7]), (4, 1, 1)))
    >>> read_frames(Path("dark.npy"), Path("flat.npy"), Scale(), (1, 1, 2)).sensitivity
    tensor([[[0.5000, 1.5000]]])
    """
    digests: dict[str, str] = {}
    found: dict[str, Tensor] = {}
    channels = replace(select.beside(), axes="")
    for name, path in (("dark", dark), ("flat", flat)):
        if path is None:
            continue
        images = read_images(path, span=_frame_span(scale), select=channels).images
        if tuple(images.shape[2:]) != tuple(shape[1:]) or images.shape[1] not in (1, shape[0]):
            given = size_text(images.shape[1:])
            raise InputError(
                f"--{name} {path} has images of {given} (channels, height, width), but the data "
                f"have {size_text(shape)}: give a frame of the same camera and region"
            )
        if scale.channels:  # numbers of the file so far
            images = scale.from_file(images.expand(-1, shape[0], -1, -1).double().numpy())
        found[name] = images.double().mean(0).expand(shape[0], -1, -1)
        if path.is_dir():
            raise InputError(f"{path} is a folder: give one file, such as a .tif stack or .npy")
        digests[name] = file_digest(path)
    hidden = None if hot is None or not bool(hot.any()) else hot
    sensitivity = None
    if "flat" in found:
        light = found["flat"] - found.get("dark", torch.zeros(1, dtype=torch.float64))
        mean = light.mean((1, 2), keepdim=True)
        if not bool((mean > 0).all()):
            raise InputError(
                f"--flat {flat} is not brighter than the dark frame: give a picture of even light"
            )
        sensitivity = light / mean
        blind = (sensitivity < LEAST).any(0)
        sensitivity = torch.where(blind, 1.0, sensitivity)
        if bool(blind.any()):
            hidden = blind if hidden is None else blind | hidden
        sensitivity = sensitivity.float()
    shade = found["dark"].float() if "dark" in found else None
    return Frames(shade, sensitivity, hidden, digests)


def corrected_set(data: ImageSet | Source, frames: Frames) -> ImageSet | Source:
    """Apply frames to a set of images in memory, or to a source when it is read.

    >>> data = ImageSet(torch.full((1, 1, 1, 1), 0.5), ["a.png"], Scale())
    >>> corrected_set(data, Frames(torch.full((1, 1, 1), 0.25))).images.item()
    0.25
    """
    if not frames:
        return data
    if isinstance(data, Source):
        return Corrected(data, frames)
    return replace(data, images=frames.correct(data.images))


def hot_pixels(y: Tensor) -> Tensor:
    """Find pixels that are too bright or too dark in all images of a set.

    Args:
        y: Images of different scenes, (N, C, H, W), N >= 3.

    Returns:
        (H, W) bool.

    Raises:
        InputError: There are fewer than 3 images, or more than 1 % of the pixels stand out.

    >>> y = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> y[:, :, 3, 5] = 9.0
    >>> hot_pixels(y).nonzero().tolist()
    [[3, 5]]
    """
    if len(y) < FEWEST:
        raise InputError(
            f"hot pixels are found over a set of {FEWEST} or more images, and there are {len(y)}: "
            "give more images, or the run of a larger set"
        )
    y = y[torch.linspace(0, len(y) - 1, min(len(y), SAMPLE)).long()].float()
    n, c, h, w = y.shape
    padded = F.pad(y.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="reflect")
    windows = F.unfold(padded, 3).view(n * c, 9, h, w)
    around = windows[:, [0, 1, 2, 3, 5, 6, 7, 8]].median(1).values
    away = (y.flatten(0, 1) - around).view(n, c, h, w)
    middle = away.median(0).values
    spread = 1.4826 * (middle - middle.flatten(1).median(1).values[:, None, None]).abs()
    level = spread.flatten(1).median(1).values.clamp_min(1e-6)[:, None, None]
    same = torch.maximum((away > 0).float().mean(0), (away < 0).float().mean(0))
    found = ((middle.abs() > AWAY * level) & (same >= AGREE)).any(0)
    if float(found.float().mean()) > MOST:
        raise InputError(
            f"{float(found.float().mean()):.1%} of the pixels stand out from their neighbors in "
            "all images, too many for hot pixels: the images show one scene, or have stripes"
        )
    return found
