"""DICOM images, read and written with pydicom (extra `medical`).

Format: NEMA PS3 / ISO 12052, "Digital Imaging and Communications in Medicine (DICOM)".

Frames number the images. Names of DICOM files often have no suffix, so files are known by their
content too. The numbers are those of the modality, ``RescaleSlope * stored + RescaleIntercept``
(Hounsfield units of a CT); black and white are the ends of what BitsStored holds. Without
rescaling the numbers are the stored integers, with BitsStored significant bits. Stored numbers
whose lowest is white (MONOCHROME1) are inverted, except where they are rescaled.

Only the frame that is asked for is decoded, after its declared size has been checked. Data sets
that are deflated as a magnitude are refused.
"""

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ... import __version__
from ...errors import InputError
from ..atomic import Partial, unwritable
from ..limits import check_free_memory, check_numbers, check_pixels, reading
from .optional import library
from .registry import DICOM, Pages, real_path, register
from .scaled import physical, stored

__all__ = ["Dicom", "DicomWriter"]

DEFLATED = "1.2.840.10008.1.2.1.99"
GRAY = ("MONOCHROME1", "MONOCHROME2")
COLOR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
MILLIMETER = 1000.0  # in micrometers
MOST = 2**32 - 2  # bytes of pixels that a data set holds
TEXT = 1024  # characters of a description
STALE = (
    *("SmallestImagePixelValue", "LargestImagePixelValue", "PixelPaddingRangeLimit"),
    *("NumberOfFrames", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
)
NUMBERS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")


class Dicom(Pages):
    """The frames of a DICOM file.

    Args:
        file: The file.

    Raises:
        InputError: The file is damaged or too large, holds no image or one with a palette, or
            pydicom is missing.

    >>> from pydicom.data import get_testdata_file
    >>> scan = Dicom(Path(get_testdata_file("CT_small.dcm")))  # stored numbers minus 1024
    >>> scan.shape, scan.dtype, scan.span, float(scan.read(0).min())
    ((128, 128, 1), 'float32', (-1024.0, 31743.0), -896.0)
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        with reading(file):
            pydicom = library(file, "pydicom", "medical")
            meta = pydicom.filereader.read_file_meta_info(file)
            self.syntax = str(meta.get("TransferSyntaxUID", ""))
            if self.syntax == DEFLATED:
                raise InputError(f"{file} is deflated: save it with another transfer syntax")
            self.data: Any = pydicom.dcmread(file, stop_before_pixels=True)
            self._look()

    def _look(self) -> None:
        data = self.data
        missing = [n for n in ("Rows", "Columns", "BitsAllocated") if data.get(n) is None]
        if missing:
            raise InputError(
                f"cannot read {self.file}: it holds no image ({missing[0]} is missing)"
            )
        self.kind = str(data.get("PhotometricInterpretation", ""))
        samples = int(data.get("SamplesPerPixel", 1))
        if (samples, self.kind in GRAY, self.kind in COLOR) not in (
            (1, True, False),
            (3, False, True),
        ):
            raise InputError(
                f"{self.file} has {samples} samples of {self.kind or 'no kind'}: save it as gray "
                "or RGB"
            )
        self.shape = (int(data.Rows), int(data.Columns), samples)
        check_pixels(self.file, *self.shape)
        self.frames = int(data.get("NumberOfFrames") or 1)
        allocated = int(data.BitsAllocated)
        if allocated not in (8, 16, 32) or self.frames < 1:
            raise InputError(
                f"cannot read {self.file}: it declares {self.frames} frames of {allocated} bits"
            )
        size = math.prod(self.shape) * allocated // 8
        check_numbers(self.file, size, 1)
        native = not self.syntax or not _compressed(self.syntax)
        sampled = size * 2 // 3 if self.kind == "YBR_FULL_422" else size
        if native and sampled * self.frames > self.file.stat().st_size:
            raise InputError(
                f"cannot read {self.file}: it declares {sampled * self.frames} bytes of pixels and"
                " is cut short"
            )
        self._numbers(allocated)

    def _numbers(self, allocated: int) -> None:
        data = self.data
        self.signed = bool(int(data.get("PixelRepresentation", 0)))
        self.stored = f"{'' if self.signed else 'u'}int{allocated}"
        bits = int(data.get("BitsStored", allocated))
        bits = bits if 1 < bits <= allocated else allocated
        magnitude = bits - 1 if self.signed else bits
        self.low, self.high = (-(2**magnitude) if self.signed else 0), 2**magnitude - 1
        self.depth = bits
        slope, inter = (
            float(data.get(n) if data.get(n) is not None else default)
            for n, default in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))
        )
        if not (math.isfinite(slope) and math.isfinite(inter)) or slope == 0:
            raise InputError(f"cannot read {self.file}: its RescaleSlope is {slope:g}")
        self.slope, self.inter = slope, inter
        self.scaled = (slope, inter) != (1.0, 0.0) and self.shape[2] == 1
        self.inverted = self.kind == "MONOCHROME1" and not self.scaled
        self.dtype, self.axes = self.stored, "ZYX" if self.shape[2] == 1 else "ZYXC"
        if self.scaled:
            self.dtype = "float64" if allocated > 16 else "float32"
            ends = slope * (0 if self.signed else self.low) + inter, slope * self.high + inter
            self.span = (min(ends), max(ends))
        elif bits < allocated:
            self.bits = magnitude

    @cached_property
    def metadata(self) -> dict[str, Any]:  # type: ignore[override]
        """The size of a pixel in micrometers, and the header as text without the pixels."""
        found: dict[str, Any] = {"source": str(self.data)}
        spacing = self.data.get("PixelSpacing") or self.data.get("ImagerPixelSpacing")
        if spacing is not None and len(spacing) == 2:
            found["pixel_size"] = tuple(float(side) * MILLIMETER for side in spacing)
        if self.data.get("SliceThickness") is not None:
            found["z_step"] = float(self.data.SliceThickness) * MILLIMETER
        units = self.data.get("RescaleType") or self.data.get("Units")
        return found | ({"units": str(units)} if units else {})

    def __len__(self) -> int:
        return self.frames

    def read(self, page: int) -> np.ndarray:
        """Return the numbers of a frame, (H, W, C)."""
        from pydicom.pixels import pixel_array

        found = np.asarray(pixel_array(self.file, index=page))
        found = found.reshape(self.shape).astype(self.stored, copy=False)
        if self.scaled:
            return physical(found, self.slope, self.inter, self.dtype)
        return self.flipped(found) if self.inverted else found

    def flipped(self, stored: np.ndarray) -> np.ndarray:
        """Exchange black and white; the map is its own inverse."""
        return (self.low + self.high - stored.astype(np.int64)).astype(self.stored)

    def back(self, numbers: np.ndarray) -> np.ndarray:
        """Return the stored numbers of those that `read` returns, rounded and clipped."""
        if self.scaled:
            ends = self.low, self.high
            return stored(numbers, self.slope, self.inter, np.dtype(self.stored), ends)
        found = numbers.clip(self.low, self.high).astype(self.stored)
        return self.flipped(found) if self.inverted else found


def _compressed(syntax: str) -> bool:
    from pydicom.uid import UID

    uid = UID(syntax)
    return not uid.is_transfer_syntax or uid.is_compressed


class DicomWriter:
    """Write frames into a DICOM file with the data set of the file that they came from.

    The result is a derived image (PS3.3, C.7.6.1): it has its own SOP instance and series UID,
    both functions of the source and of `history`; DERIVED as the image type; a description of the
    derivation; and a reference to the source. Its pixels are not compressed. If the frames have
    another size, the spacing of the pixels is scaled. A scene of several frames has the functional
    groups of the first of them, and their time together.

    Args:
        out: The file.
        source: The file that the images came from.
        history: A line that says how they were made.
        floats: False: DICOM images of this kind hold integers.
        repeats: Number of captures of each scene; see `registry.Writer`.

    >>> import pydicom
    >>> source = Path(pydicom.data.get_testdata_file("CT_small.dcm"))
    >>> writer = DicomWriter(Path("result.dcm"), source, history="denoised")
    >>> writer.write(np.full((128, 128, 1), 7, np.float32))  # Hounsfield units
    >>> writer.close()
    >>> result = pydicom.dcmread("result.dcm")
    >>> result.DerivationDescription, int(result.pixel_array.min()), result.ImageType[0]
    ('denoised', 1031, 'DERIVED')
    """

    def __init__(
        self,
        out: Path,
        source: Path,
        history: str = "",
        floats: bool = False,
        repeats: int = 1,
    ) -> None:
        if floats:
            raise InputError(f"{out}: these DICOM images hold integers: use .tif")
        self.out, self.history = out, history or f"written by unmurk {__version__}"
        self.repeats = repeats
        self._like = Dicom(real_path(source))
        check_free_memory(out, 3 * len(self._like) * math.prod(self._like.shape) * 2)
        self._frames: list[np.ndarray] = []
        self._part = Partial(out)

    def write(self, pixels: np.ndarray) -> None:
        """Take the next image, (H, W, C)."""
        if pixels.shape[-1] != self._like.shape[-1]:
            raise InputError(
                f"{self.out}: a DICOM image like {self._like.file} has {self._like.shape[-1]} "
                f"channels, not {pixels.shape[-1]}: use .npy or .tif"
            )
        self._frames.append(self._like.back(pixels))

    def _data(self) -> Any:
        """Return the data set of the result."""
        import pydicom
        from pydicom.uid import ExplicitVRLittleEndian, generate_uid

        like, data = self._like, pydicom.dcmread(self._like.file, stop_before_pixels=True)
        for name in (*STALE, *NUMBERS):
            if name in data:
                del data[name]
        frames = np.stack(self._frames)
        frames = frames.astype(frames.dtype.newbyteorder("<"), copy=False)
        if frames.nbytes > MOST:
            raise InputError(
                f"{self.out} would hold {frames.nbytes} bytes, more than DICOM allows"
            )
        old = str(data.get("SOPInstanceUID", ""))
        data.SOPInstanceUID = generate_uid(entropy_srcs=[old, str(like.file.name), self.history])
        series = str(data.get("SeriesInstanceUID", ""))
        data.SeriesInstanceUID = generate_uid(entropy_srcs=[series, self.history])
        kinds = data.get("ImageType") or ["DERIVED", "PRIMARY"]
        kinds = [kinds] if isinstance(kinds, str) else list(kinds)
        data.ImageType = ["DERIVED", *(kinds[1:] or ["PRIMARY"])]
        data.DerivationDescription = self.history[:TEXT]
        if old:
            reference = pydicom.Dataset()
            reference.ReferencedSOPClassUID = data.get("SOPClassUID", "")
            reference.ReferencedSOPInstanceUID = old
            data.SourceImageSequence = [reference]
        _rescale(data, frames.shape[2] / like.shape[1], frames.shape[1] / like.shape[0])
        _combine(data, self.repeats)
        data.Rows, data.Columns = frames.shape[1:3]
        if len(frames) > 1:
            data.NumberOfFrames = len(frames)
        data.SamplesPerPixel = like.shape[2]
        if like.shape[2] == 3:
            data.PhotometricInterpretation, data.PlanarConfiguration = "RGB", 0
        data.BitsStored, data.HighBit = like.depth, like.depth - 1
        meta = data.file_meta
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
        pixels = frames.tobytes()
        data.PixelData = pixels + b"\0" * (len(pixels) % 2)
        data["PixelData"].VR = "OW" if frames.dtype.itemsize > 1 else "OB"
        return data

    def close(self) -> None:
        """Write the file and give it its name."""
        import pydicom

        with reading(self._like.file):
            data = self._data()
        try:
            with reading(self._like.file):
                pydicom.dcmwrite(
                    self._part.file,
                    data,
                    enforce_file_format=True,
                    implicit_vr=False,
                    little_endian=True,
                )
        except InputError as error:
            if isinstance(error.__cause__, OSError):
                raise unwritable(self.out, error.__cause__) from error
            raise
        self._part.finish()

    def abandon(self) -> None:
        """Remove the partial file; nothing happens after `close`."""
        self._part.abandon()


def _rescale(data: Any, across: float, down: float) -> None:
    """Scale the spacing of pixels that are smaller by these factors, and move the center of the
    first pixel accordingly (PS3.3, C.7.6.2)."""
    if across == down == 1:
        return
    spacing, place = data.get("PixelSpacing"), data.get("ImagePositionPatient")
    cosines = data.get("ImageOrientationPatient")
    if place and spacing and cosines and (len(place), len(spacing), len(cosines)) == (3, 2, 6):
        right = float(spacing[1]) * (0.5 / across - 0.5)
        below = float(spacing[0]) * (0.5 / down - 0.5)
        moved = [float(place[n]) + right * cosines[n] + below * cosines[n + 3] for n in range(3)]
        data.ImagePositionPatient = [f"{value:.10g}" for value in moved]
    for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        spacing = data.get(name)
        if spacing is not None and len(spacing) == 2:
            value = [float(spacing[0]) / down, float(spacing[1]) / across]
            setattr(data, name, [f"{side:.10g}" for side in value])


def _combine(data: Any, repeats: int) -> None:
    """Adapt what a data set says of its frames to scenes of several frames in a row."""
    if repeats == 1:
        return
    groups = data.get("PerFrameFunctionalGroupsSequence")
    if groups is not None:
        data.PerFrameFunctionalGroupsSequence = list(groups)[::repeats]
    if data.get("FrameTime") is not None:
        data.FrameTime = f"{float(data.FrameTime) * repeats:.10g}"
    steps = data.get("FrameTimeVector")  # from each frame to the next, the first of them 0
    if steps is not None:
        starts = np.cumsum([float(step) for step in steps])[::repeats]
        data.FrameTimeVector = [f"{step:.10g}" for step in np.diff(starts, prepend=starts[:1])]


register("DICOM", DICOM, writer=DicomWriter, scenes=True)(Dicom)
