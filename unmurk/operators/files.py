"""Masks, blur kernels and k-space from files.

A mask marks the measured pixels, so it holds two values: 0, and 1 or white. A kernel is a small
array of numbers with an odd number of rows and columns, so that its center is a pixel. Files that
are not clearly one of these are refused: a guess would silently change the forward model.
"""

from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bounds import TABLES, check_tables, shown
from ..errors import InputError, size_text
from ..io.formats.arrays import read_array
from ..io.formats.hdf5 import complex_of, has_dataset, open_dataset
from ..io.formats.pictures import has_reader, open_pages, split_member

__all__ = ["KspaceFile", "read_kernels", "read_masks", "select_images"]

WHITE = {"uint8": 255, "uint16": 65535}
CANCELLED = 1e-3  # of the sum of magnitudes; a smaller sum of a kernel is only rounding errors


def read_masks(form: str, path: str) -> Tensor:
    """Read masks from a picture or an array file.

    Args:
        form: The operator's text form, for messages.
        path: The file.

    Returns:
        Masks (H, W) or (N, H, W), float32, 1 where a pixel is measured and 0 where it is hidden.

    Raises:
        InputError: There is no such file; it has another shape; it holds values other than 0 and
            1 or white; a mask hides every pixel; or no mask hides any.

    >>> import numpy as np
    >>> np.save("mask.npy", np.array([[255, 0]], np.uint8))
    >>> read_masks("inpaint:file", "mask.npy")
    tensor([[1., 0.]])
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
            + ": use only black (hidden) and white (measured), and save it as PNG or .npy",
        )
    observed = array != 0
    hidden = ~observed.reshape(-1, *observed.shape[-2:]).any((1, 2))
    if hidden.any():
        number = f" number {int(np.flatnonzero(hidden)[0])}" if array.ndim == 3 else ""
        raise _wrong(
            form, path, f"the mask{number} hides every pixel, so nothing would be measured"
        )
    if observed.all():
        raise _wrong(
            form, path, "it hides no pixel: paint the missing pixels black, or use identity"
        )
    return torch.from_numpy(observed).float()


def read_kernels(form: str, path: str) -> Tensor:
    """Read blur kernels from a picture or an array file.

    Args:
        form: The operator's text form, for messages.
        path: The file.

    Returns:
        Kernels (kh, kw) or (N, kh, kw), float32, each divided by its sum. Both sides are odd.

    Raises:
        InputError: There is no such file; it has another shape or an even side; or it holds
            numbers that are not finite, or whose sum is not positive.

    >>> import numpy as np
    >>> np.save("kernel.npy", np.array([[1.0, 2.0, 1.0]]))
    >>> read_kernels("blur:file", "kernel.npy")
    tensor([[0.2500, 0.5000, 0.2500]])
    """
    array = _read(form, path)
    if array.dtype.kind not in "buif":
        raise _wrong(form, path, f"it holds {array.dtype}")
    height, width = array.shape[-2:]
    if array.ndim == 3 and len(array) == height and width == 3 < height:
        raise _wrong(
            form,
            path,
            f"its shape {array.shape} is that of a color picture: give one channel, (H, W)",
        )
    if height % 2 == 0 or width % 2 == 0:
        raise _wrong(
            form,
            path,
            f"the kernel is {size_text((height, width))}, and an even side has no pixel in the"
            " middle: add a"
            " row or a column of zeros, so that the center of the kernel is its middle pixel",
        )
    if not np.isfinite(array).all():
        raise _wrong(form, path, "it holds numbers that are not finite")
    kernels = torch.from_numpy(array.astype(np.float64))
    largest = kernels.abs().amax((-2, -1), keepdim=True)
    kernels = kernels / torch.where(largest > 0, largest, 1.0)  # so that no sum overflows
    total = kernels.sum((-2, -1), keepdim=True)
    if not bool((total > CANCELLED * kernels.abs().sum((-2, -1), keepdim=True)).all()):
        raise _wrong(
            form, path, "it must have a positive sum, because kernels are divided by their sum"
        )
    return (kernels / total).float()


def select_images(form: str, path: str, values: Tensor, index: list[int]) -> Tensor:
    """Select the masks or kernels of some images from those of a file.

    Args:
        form: The operator's text form, for messages.
        path: The file, for messages.
        values: One array for all images (H, W), or one for each image number (N, H, W).
        index: Numbers of the images.

    Returns:
        (1, H, W) or (B, H, W).

    Raises:
        InputError: The file holds no array for one of the numbers.

    >>> masks = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    >>> select_images("inpaint:file", "mask.npy", masks, [1])
    tensor([[[0., 1.]]])
    """
    if values.ndim == 2:
        return values[None]
    if index and max(index) >= len(values):
        raise InputError(
            f"{form}: {path} holds {len(values)} arrays, so there is none for image {max(index)}"
        )
    return values[index]


def _wrong(form: str, path: str, why: str) -> InputError:
    what = "mask" if form.startswith("inpaint") else "kernel"
    return InputError(f"{form}: {path} is not a usable {what}: {why}")


def _read(form: str, path: str) -> np.ndarray:
    """Read the numbers of a file, (H, W) or (N, H, W), without axes of one entry."""
    try:
        file = split_member(path)[0]
        exists = file.is_file() or (file.is_dir() and has_reader(file))
    except (OSError, ValueError):  # a name that no file can have
        exists = False
    if not exists:
        raise InputError(f"{form}: there is no file {path}")
    try:
        array = _pages(path) if has_reader(Path(path)) else read_array(Path(path))[0]
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
    """Read the gray pages of a picture file, (H, W) or (N, H, W)."""
    with open_pages(Path(path)) as opened:
        pages = [opened.read(number) for number in range(len(opened))]
    gray = []
    for page in pages:
        flat = page[..., :1]
        if not np.array_equal(page, np.broadcast_to(flat, page.shape)):
            raise InputError(f"{path} is a color picture: save it in gray")
        gray.append(flat[..., 0])
    if len({page.shape for page in gray}) > 1:
        raise InputError(f"the pages of {path} differ in size: save pages of one size")
    return gray[0] if len(gray) == 1 else np.stack(gray)


# -- k-space --------------------------------------------------------------------------------------

SENSITIVITIES = ("maps", "sensitivities", "sens_maps")
"""Names of data sets of coil sensitivities that are looked for."""


class KspaceFile:
    """Sampling mask and coil sensitivities of an HDF5 file with measured k-space.

    Args:
        form: The operator's text form, for messages.
        path: The file.
        kspace: Name of the data set of k-space.
        sampling, sensitivities: Names of the other data sets; None: see `mri.FileMri`.

    Attributes:
        shape: Slices, coils, height and width of k-space.
        sampling, sensitivities: Names of the data sets that are used; None: there is none.

    Raises:
        InputError: The file is not readable, or its data sets do not fit together.

    >>> import h5py
    >>> with h5py.File("scan.h5", "w") as file:
    ...     file["kspace"] = np.array([[[1 + 1j, 0j]]])  # one slice of 1 x 2 samples
    >>> scan = KspaceFile("mri:file", "scan.h5", "kspace", None, None)
    >>> scan.shape, scan.masks([0]).tolist()
    ((1, 1, 1, 2), [[[[1.0, 0.0]]]])
    """

    def __init__(
        self, form: str, path: str, kspace: str, sampling: str | None, sensitivities: str | None
    ) -> None:
        self.form, self.path, self.kspace = form, path, kspace
        with self._open(kspace) as dataset:
            shape = tuple(int(n) for n in dataset.shape)
            if len(shape) not in (3, 4) or complex_of(dataset.dtype) is None:
                raise self._wrong(
                    kspace,
                    f"holds {dataset.dtype} of shape {shape}, which is not complex "
                    "(slices, coils, H, W) or (slices, H, W)",
                )
        slices, coils, height, width = shape if len(shape) == 4 else (shape[0], 1, *shape[1:])
        self.shape, self.single = (slices, coils, height, width), len(shape) == 3
        self.sampling = self._named(sampling, ("mask",))
        self.sensitivities = self._named(sensitivities, SENSITIVITIES)
        if coils > 1 and self.sensitivities is None:
            raise InputError(
                f"{form}: {path} holds no sensitivities of its {coils} coils: name their data set "
                "with sensitivities=NAME"
            )

    @classmethod
    def of(cls, form: str, path: str, *names: str | None) -> "KspaceFile":
        """Return what `KspaceFile(form, path, ...)` returns, read once for each file."""
        try:
            about = split_member(path)[0].stat()
        except (OSError, ValueError) as error:
            raise InputError(f"{form}: there is no file {path}") from error
        return _kspace_file(form, path, names, about.st_size, about.st_mtime_ns)

    def _open(self, name: str) -> AbstractContextManager[Any]:
        return open_dataset(self.path, name, "measurement")

    def _named(self, given: str | None, known: tuple[str, ...]) -> str | None:
        if given is not None:
            return given
        return next((name for name in known if has_dataset(self.path, name)), None)

    def _wrong(self, name: str, why: str) -> InputError:
        return InputError(f"{self.form}: the data set '{name}' of {self.path} {why}")

    def masks(self, numbers: list[int]) -> np.ndarray:
        """Read m of some slices, float32 (1 or B, 1, 1 or H, W)."""
        if self.sampling is None:
            return self._sampled(numbers)
        slices, _, height, width = self.shape
        with self._open(self.sampling) as dataset:
            shape = tuple(int(n) for n in dataset.shape)
            if dataset.dtype.kind not in "buif":
                raise self._wrong(
                    self.sampling, f"holds {dataset.dtype}: a mask is zeros and ones"
                )
            if shape in ((width,), (height, width)):
                found = np.asarray(dataset[()]).reshape(1, 1, -1, width)
            elif shape in ((slices, width), (slices, height, width)):
                found = np.stack([dataset[n] for n in numbers]).reshape(len(numbers), 1, -1, width)
            else:
                raise self._wrong(
                    self.sampling,
                    f"has the shape {shape}, which is not (W), (H, W), (slices, W) or (slices, H, "
                    f"W) with {slices} slices of {size_text((height, width))}",
                )
        if not ((found == 0) | (found == 1)).all():
            raise self._wrong(self.sampling, "holds other numbers than zeros and ones")
        return found.astype(np.float32)

    def _sampled(self, numbers: list[int]) -> np.ndarray:
        """Find the samples of slices that are not zero in all coils."""
        found = np.empty((len(numbers), 1, *self.shape[2:]), np.float32)
        with self._open(self.kspace) as dataset:
            for entry, number in zip(found, numbers, strict=True):
                values = _complex(np.asarray(dataset[number]))
                entry[0] = (values if self.single else values.any(0)) != 0
        return found

    def maps(self, numbers: list[int]) -> np.ndarray:
        """Read the sensitivities of some slices, complex64 (1 or B, coils, H, W)."""
        slices, coils, height, width = self.shape
        if self.sensitivities is None:
            return np.ones((1, 1, height, width), np.complex64)
        with self._open(self.sensitivities) as dataset:
            shape = tuple(int(n) for n in dataset.shape)
            if complex_of(dataset.dtype) is None and dataset.dtype.kind != "f":
                raise self._wrong(
                    self.sensitivities, f"holds {dataset.dtype}, not complex numbers"
                )
            one = (coils, height, width)
            if shape == (slices, *one):
                found = np.stack([_complex(np.asarray(dataset[n])) for n in numbers])
            elif shape in (one, (1, *one)) or (coils == 1 and shape == one[1:]):
                found = _complex(np.asarray(dataset[()])).reshape(1, *one)
            else:
                raise self._wrong(
                    self.sensitivities,
                    f"has the shape {shape}, which is neither {one} nor {(slices, *one)}",
                )
        if not np.isfinite(found).all():
            raise self._wrong(self.sensitivities, "holds numbers that are not finite")
        return found.astype(np.complex64)


@lru_cache(maxsize=4)
def _kspace_file(
    form: str, path: str, names: tuple[Any, ...], size: int, changed: int
) -> KspaceFile:
    return KspaceFile(form, path, *names)


def _complex(values: np.ndarray) -> np.ndarray:
    """Return numbers as complex ones, also those of a type of two fields."""
    real, imag = complex_of(values.dtype) or ("", "")
    return values[real] + 1j * values[imag] if real else values
