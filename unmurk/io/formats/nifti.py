"""NIfTI-1 and NIfTI-2 volumes, read and written with nibabel (extra `medical`).

Format: R. W. Cox and others, "A (sort of) new image data format standard: NIfTI-1", 2004.

A slice along the third axis is an image: its rows are the second axis of the volume, its columns
the first. Slices, times and further axes number the images, the slices fastest. The numbers are
the physical ones, ``scl_slope * stored + scl_inter``; without such a scaling integers stay
integers. A result is written with the same scaling.

nibabel reads and writes the header with its extensions; the pixels are read slice by slice, after
all declared sizes have been compared with the limits.
"""

import io
import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from ... import __version__
from ...errors import InputError
from ..atomic import unwritable
from ..limits import check_numbers, check_pixels, reading
from .optional import library
from .registry import NIFTI, Pages, real_path, register
from .scaled import HeaderWriter, open_stream, physical, stored

__all__ = ["Nifti", "NiftiWriter"]

LEAST = 352  # bytes before the pixels: a NIfTI-1 header and its flags
HEAD = 2**26  # bytes of a header with its extensions, at most
LENGTHS = {1: 348, 2: 540}  # bytes of a header by its version
MILLIMETER = 1000.0  # in micrometers
UNITS = {"meter": 1e6, "mm": MILLIMETER, "micron": 1.0}
COMMENT = 6  # code of an extension that holds a comment


class Nifti(Pages):
    """The slices of a NIfTI file (.nii, gzipped or not).

    Args:
        file: The file.

    Raises:
        InputError: The file is damaged or too large, or nibabel is missing.

    >>> import nibabel
    >>> volume = np.arange(24, dtype=np.int16).reshape(4, 3, 2)
    >>> nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), "brain.nii")
    >>> scan = Nifti(Path("brain.nii"))
    >>> len(scan), scan.shape, np.array_equal(scan.read(1)[..., 0], volume[..., 1].T)
    (2, (3, 4, 1), True)
    >>> scan.close()
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._open = ExitStack()
        try:
            with reading(file):
                self._start(file)
        except BaseException:
            self.close()
            raise

    def _start(self, file: Path) -> None:
        nibabel = library(file, "nibabel", "medical")
        self._stream, length = open_stream(file, self._open)
        self.header = _header(file, self._stream, length, nibabel)
        self._look(length)

    def _look(self, length: int | None) -> None:
        header = self.header
        sides = tuple(int(n) for n in header.get_data_shape())
        sides = sides if len(sides) > 1 else (*sides, *[1] * (2 - len(sides)))
        if not sides or min(sides) < 1:
            raise InputError(f"cannot read {self.file}: it declares the shape {sides}")
        self.sides = sides
        stored = np.dtype(header.get_data_dtype())
        self.color = stored.names is not None and stored.names[:3] == ("R", "G", "B")
        if stored.names is not None and len(stored.names) != 3:
            raise InputError(
                f"{self.file} holds pixels of {', '.join(stored.names)}: save RGB without alpha"
            )
        self.stored = np.dtype(np.uint8) if self.color else stored
        if self.stored.kind not in "iuf" or self.stored.itemsize > 8:
            raise InputError(
                f"{self.file} holds {self.stored}: save real numbers of 64 bits or less"
            )
        self.shape = (sides[1], sides[0], 3 if self.color else 1)
        check_pixels(self.file, *self.shape)
        self.start = int(header.get_data_offset())
        size = self.start + math.prod(sides) * stored.itemsize
        if length is None:
            check_numbers(self.file, size, 1)
        elif size > length:
            raise InputError(
                f"cannot read {self.file}: it declares {size} bytes of numbers and is cut short"
            )
        slope, inter = header.get_slope_inter()
        self.slope, self.inter = slope or 1.0, inter or 0.0
        self.scaled = (self.slope, self.inter) != (1.0, 0.0) and not self.color
        self.dtype = self.stored.newbyteorder("=").name
        if self.scaled:
            wide = self.stored.itemsize > 2 and self.stored.name != "float32"
            self.dtype = "float64" if wide else "float32"
        self.axes = "".join("ZTQR"[min(n, 3)] for n in range(len(sides) - 3, -1, -1)) + "YX"
        self.lead = sides[:1:-1]

    @cached_property
    def metadata(self) -> dict[str, Any]:  # type: ignore[override]
        """The size of a voxel in micrometers, and the affine map from voxels to millimeters."""
        with reading(self.file):
            unit = UNITS.get(self.header.get_xyzt_units()[0], MILLIMETER)
            zooms = [float(side) * unit for side in self.header.get_zooms()]
            found: dict[str, Any] = {"affine": np.asarray(self.header.get_best_affine()).tolist()}
            if len(zooms) > 1 and min(zooms[:2]) > 0:
                found["pixel_size"] = (zooms[1], zooms[0])
            if len(zooms) > 2:
                found["z_step"] = zooms[2]
            return found | {"source": str(self.header)}

    def __len__(self) -> int:
        return math.prod(self.sides[2:])

    def stored_plane(self, page: int) -> np.ndarray:
        """Return the stored numbers of a slice, (H, W, C)."""
        height, width, channels = self.shape
        size = height * width * channels * self.stored.itemsize
        self._stream.seek(self.start + page * size)
        data = self._stream.read(size)
        if len(data) != size:
            raise InputError(f"cannot read {self.file}: it is cut short")
        return np.frombuffer(data, self.stored).reshape(self.shape)

    def read(self, page: int) -> np.ndarray:
        """Return the physical numbers of a slice, (H, W, C)."""
        found = self.stored_plane(page)
        if self.scaled:
            return physical(found, self.slope, self.inter, self.dtype)
        return found.astype(self.dtype)

    def back(self, values: np.ndarray) -> np.ndarray:
        """Return the stored numbers of physical ones, rounded and clipped for integers."""
        if not self.scaled:
            return values.astype(self.stored)
        return stored(values, self.slope, self.inter, self.stored)

    def close(self) -> None:
        """Close the file."""
        self._open.close()


def _header(file: Path, stream: IO[bytes], length: int | None, nibabel: Any) -> Any:
    """Read the header with its extensions, after a look at how long they are declared to be."""
    first = stream.read(LENGTHS[2])
    for kind, version in ((nibabel.Nifti1Header, 1), (nibabel.Nifti2Header, 2)):
        if not kind.may_contain_header(first):
            continue
        block = first[: LENGTHS[version]]
        bare = kind(block, check=False)
        magic = bytes(bare["magic"].tobytes())[:2]
        start = int(bare["vox_offset"]) if math.isfinite(bare["vox_offset"]) else -1
        if magic != b"n+":
            raise InputError(f"{file} has its pixels in another file: save it as one .nii file")
        if not LENGTHS[version] + 4 <= start <= (HEAD if length is None else length):
            raise InputError(f"cannot read {file}: its pixels begin at byte {start}")
        stream.seek(0)
        return kind.from_fileobj(io.BytesIO(stream.read(start)))
    raise InputError(f"cannot read {file}: it is no NIfTI file, or damaged")


class NiftiWriter(HeaderWriter):
    """Write slices into a NIfTI file with the header of the file that they came from.

    Affine maps, units, intent and extensions are kept, and a comment that says how the images were
    made is added as an extension. If the slices have another size, or stand for several slices or
    times of the source, the size of a voxel, the affine maps and the times are scaled. The place
    and the time of a scene are the centers of those of its captures.

    Args:
        out: The file; the suffix .gz compresses it.
        source: The file that the images came from.
        history: A line that says how they were made.
        floats: Whether the numbers are written as float32.
        repeats: Number of captures of each scene; see `registry.Writer`.

    >>> import nibabel
    >>> affine = np.diag([2.0, 2.0, 3.0, 1.0])
    >>> nibabel.save(nibabel.Nifti1Image(np.zeros((4, 3, 1), np.int16), affine), "raw.nii")
    >>> writer = NiftiWriter(Path("result.nii"), Path("raw.nii"))
    >>> writer.write(np.full((3, 4, 1), 7, np.int16))
    >>> writer.close()
    >>> result = nibabel.load("result.nii")
    >>> np.array_equal(result.affine, affine), int(np.asarray(result.dataobj).min())
    (True, 7)
    """

    def __init__(
        self,
        out: Path,
        source: Path,
        history: str = "",
        floats: bool = False,
        repeats: int = 1,
    ) -> None:
        self._like = Nifti(real_path(source))
        super().__init__(out, self._like, history, floats, repeats)

    def write(self, pixels: np.ndarray) -> None:
        """Write the next image, (H, W, C)."""
        like = self._like
        channels = pixels.shape[-1]
        if channels != like.shape[-1] or (self.floats and channels != 1):
            raise InputError(
                f"{self.out}: a NIfTI slice like those of {like.file} has {like.shape[-1]} "
                f"channels, not {channels}: use .npy or .tif"
            )
        numbers = pixels.astype(self._kind()) if self.floats else like.back(pixels)
        try:
            if self._file is None:
                self._file = self._begin()
                with reading(like.file):
                    header = self._header(*pixels.shape[:2])
                self._file.write(header)
            self._file.write(np.ascontiguousarray(numbers).tobytes())
        except OSError as error:
            raise unwritable(self.out, error) from error

    def _kind(self) -> np.dtype:
        return np.dtype(np.float32).newbyteorder(self._like.header.endianness)

    def _header(self, height: int, width: int) -> bytes:
        import nibabel

        like = self._like
        header = like.header.copy()
        header.extensions = type(header.extensions)(header.extensions)
        text = self.history or f"written by unmurk {__version__}"
        header.extensions.append(nibabel.nifti1.Nifti1Extension(COMMENT, text.encode()))
        sides = (width, height, *reversed(self.lead))
        header.set_data_shape(sides)
        if self.floats:
            header.set_data_dtype(self._kind())
            header.set_slope_inter(1.0, 0.0)
        elif like.scaled:
            header.set_slope_inter(like.slope, like.inter)
        _rescale(header, [new / old for new, old in zip(sides, like.sides, strict=True)])
        header.set_data_offset(0)
        buffer = io.BytesIO()
        header.write_to(buffer)
        start = -(-max(buffer.tell(), LEAST) // 16) * 16
        header.set_data_offset(start)
        buffer = io.BytesIO()
        header.write_to(buffer)
        return buffer.getvalue().ljust(start, b"\0")


def _rescale(header: Any, factors: Sequence[float]) -> None:
    """Scale voxel sizes, affine maps and times to voxels that are smaller by these factors.

    Args:
        header: The header, with its new shape.
        factors: The factor of each axis: the new number of voxels over the old.
    """
    if all(factor == 1 for factor in factors):
        return
    across, down, deep = (*factors, 1.0)[:3]
    finer = np.diag([1 / across, 1 / down, 1 / deep, 1.0])
    finer[:3, 3] = 0.5 / across - 0.5, 0.5 / down - 0.5, 0.5 / deep - 0.5
    for read, write in (
        (header.get_sform, header.set_sform),
        (header.get_qform, header.set_qform),
    ):
        affine, code = read(coded=True)
        if affine is not None and code:
            write(affine @ finer, int(code))
    known = 3 if int(header["qform_code"]) else 0  # set_qform has scaled these already
    if len(factors) > 3:
        header["toffset"] += header["pixdim"][4] * (0.5 / factors[3] - 0.5)
    for axis, factor in enumerate(factors, 1):
        if axis > known:
            header["pixdim"][axis] = abs(header["pixdim"][axis]) / factor
    if deep != 1:  # when each slice was measured, which no longer holds
        for name in ("slice_start", "slice_end", "slice_code", "slice_duration"):
            header[name] = 0


register("NIfTI", NIFTI, writer=NiftiWriter, floats=True, scenes=True)(Nifti)
