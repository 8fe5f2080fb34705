"""The files that operators read: masks and blur kernels.

A mask says which pixels are seen, so it holds two values: 0, and 1 or white. A kernel is a small
array of numbers with an odd number of rows and columns, whose centre is a pixel. What is not
plainly one of these is refused: a guess would change the forward model without a word.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..bounds import TABLES, check_tables, shown
from ..errors import InputError
from ..io.formats.arrays import read_array
from ..io.formats.pictures import ENDINGS, open_pages

__all__ = ["pick_rows", "read_kernels", "read_masks"]

WHITE = {"uint8": 255, "uint16": 65535}
CANCELLED = 1e-3  # of the sum of magnitudes, below which a kernel's sum is one of rounding errors


def read_masks(form: str, path: str) -> Tensor:
    """Masks (H, W) or (N, H, W), float32, 1 where a pixel is seen and 0 where it is hidden.

    Raises:
        InputError: no such file, another shape, values other than 0 and 1 or white, a mask that
            hides everything, or masks that all hide nothing.
    """
    array = _read(form, path)
    if array.dtype.kind == "c" or array.dtype.kind not in "buif":
        raise _wrong(form, path, f"it holds {array.dtype}")
    white = WHITE.get(array.dtype.name, 1)
    values = np.unique(array)
    if not (set(values.tolist()) <= {0, 1} or set(values.tolist()) <= {0, white}):
        odd = next(v for v in values.tolist() if v not in (0, white))
        raise _wrong(
            form,
            path,
            f"it holds {shown(odd)} beside 0"
            + (f" and {white}" if white in values else "")
            + "; draw it in black (hidden) and white (seen) only and save it as PNG or .npy",
        )
    observed = array != 0
    hidden = ~observed.reshape(-1, *observed.shape[-2:]).any((1, 2))
    if hidden.any():
        number = f" number {int(np.flatnonzero(hidden)[0])}" if array.ndim == 3 else ""
        raise _wrong(form, path, f"the mask{number} hides every pixel: nothing would be measured")
    if observed.all():
        raise _wrong(form, path, "it hides no pixel: paint what is missing black, or use identity")
    return torch.from_numpy(observed).float()


def read_kernels(form: str, path: str) -> Tensor:
    """Kernels (kh, kw) or (N, kh, kw), float32, each divided by its sum; both sides are odd.

    Raises:
        InputError: no such file, another shape, an even side, numbers that are not finite, or
            whose sum is not positive.
    """
    array = _read(form, path)
    if array.dtype.kind not in "buif":
        raise _wrong(form, path, f"it holds {array.dtype}")
    height, width = array.shape[-2:]
    if array.ndim == 3 and len(array) == height and width == 3 < height:
        raise _wrong(
            form,
            path,
            f"its shape {array.shape} is that of a colour picture: give one channel, (H, W)",
        )
    if height % 2 == 0 or width % 2 == 0:
        raise _wrong(
            form,
            path,
            f"the kernel is {height}x{width}, and a side that is even has no pixel in the middle: "
            "add a row or column of zeros on the side that puts the centre there",
        )
    if not np.isfinite(array).all():
        raise _wrong(form, path, "it has values that are not finite")
    kernels = torch.from_numpy(array.astype(np.float64))
    largest = kernels.abs().amax((-2, -1), keepdim=True)
    kernels = kernels / torch.where(largest > 0, largest, 1.0)  # so that no sum overflows
    total = kernels.sum((-2, -1), keepdim=True)
    if not bool((total > CANCELLED * kernels.abs().sum((-2, -1), keepdim=True)).all()):
        raise _wrong(form, path, "a kernel must have a positive sum, which it is divided by")
    return (kernels / total).float()


def pick_rows(form: str, path: str, values: Tensor, index: list[int]) -> Tensor:
    """The rows of a file's tensor (N, H, W) for these image numbers; (H, W) is shared by all."""
    if values.ndim == 2:
        return values[None]
    if index and max(index) >= len(values):
        raise InputError(
            f"{form}: {path} holds {len(values)} arrays, there is none for image {max(index)}"
        )
    return values[index]


def _wrong(form: str, path: str, why: str) -> InputError:
    what = "mask" if form.startswith("inpaint") else "kernel"
    return InputError(f"{form}: {path} cannot serve as a {what}: {why}")


def _read(form: str, path: str) -> np.ndarray:
    """The numbers of a file, (H, W) or (N, H, W); axes of one entry are left out."""
    try:
        there = Path(path).is_file()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    if not there:
        raise InputError(f"{form}: there is no file {path}")
    try:
        array = _pages(path) if path.lower().endswith(ENDINGS) else read_array(Path(path))[0]
    except InputError as error:
        raise InputError(f"{form}: {error}") from error
    shape = array.shape
    check_tables(form, path, 8.0 * array.size, f"files of up to {TABLES // 8} numbers are read")
    if array.ndim > 2 and shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    while array.ndim > 2 and len(array) == 1:
        array = array[0]
    if array.ndim not in (2, 3) or array.size == 0:
        raise _wrong(form, path, f"shape {shape} is not (H, W) or (N, H, W)")
    return array


def _pages(path: str) -> np.ndarray:
    """The grey pages of a picture file, (H, W) or (N, H, W)."""
    with open_pages(Path(path)) as opened:
        pages = [opened.read(number) for number in range(len(opened))]
    grey = []
    for page in pages:
        flat = page[..., :1]
        if not np.array_equal(page, np.broadcast_to(flat, page.shape)):
            raise InputError(f"{path} is a colour picture: save it in grey")
        grey.append(flat[..., 0])
    if len({page.shape for page in grey}) > 1:
        raise InputError(f"the pages of {path} differ in size")
    return grey[0] if len(grey) == 1 else np.stack(grey)
