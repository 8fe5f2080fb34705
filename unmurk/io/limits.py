"""Limits that a reader checks before it takes memory, and the guard around foreign decoders.

A file of a few bytes can declare terabytes, and a few megabytes can inflate to gigabytes.
Therefore every declared size is read first and compared with two limits: the pixels of one image,
and the bytes of an array that is stored compressed. The environment variable `UNMURK_MAX_PIXELS`
raises both. The declared size of an uncompressed file is compared with the length of the file.
"""

import hashlib
import logging
import math
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError, reason, size_text

__all__ = [
    "MAX_PIXELS",
    "check_file",
    "check_free_memory",
    "check_numbers",
    "check_pixels",
    "file_digest",
    "quiet",
    "reading",
]

MAX_PIXELS = 2**27  # of one image; a square of 11585
BYTES = 16  # bytes that an inflated array may have for each of these pixels: 2 GiB in all
VARIABLE = "UNMURK_MAX_PIXELS"


def check_file(file: Path) -> None:
    """Check that a path is a regular file, so that opening it cannot block forever.

    Raises:
        InputError: There is nothing at the path; or it is a dangling link, a folder, a FIFO, a
            socket or a device.

    >>> Path("here.npy").touch()
    >>> check_file(Path("here.npy"))
    >>> check_file(Path("nowhere.npy"))
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: cannot read nowhere.npy: No such file or directory
    """
    try:
        mode = file.stat().st_mode
    except OSError as error:
        if file.is_symlink():
            raise InputError(f"cannot read {file}: it is a link to nothing") from error
        raise InputError(f"cannot read {file}: {reason(error)}") from error
    except ValueError as error:  # a null byte in the name
        raise InputError(f"cannot read {str(file)!r}: {error}") from error
    if stat.S_ISDIR(mode):
        raise InputError(f"cannot read {file}: it is a folder")
    if not stat.S_ISREG(mode):
        raise InputError(f"cannot read {file}: it is a FIFO, a socket or a device, not a file")


def file_digest(file: Path) -> str:
    """Compute the SHA-256 hash of a file, in hexadecimal digits.

    Raises:
        InputError: It is no regular file, or cannot be read.

    >>> _ = Path("abc.txt").write_text("abc")
    >>> file_digest(Path("abc.txt"))[:16]
    'ba7816bf8f01cfea'
    """
    check_file(file)
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {file}: {reason(error)}") from error


def max_pixels() -> int:
    """Return the limit of pixels of one image. Raises InputError for an invalid variable."""
    text = os.environ.get(VARIABLE, "")
    if not text:
        return MAX_PIXELS
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{VARIABLE}={text}: give a whole number of pixels above 0")
    return int(text)


def check_pixels(file: Path, height: int, width: int, channels: int = 1) -> None:
    """Check the declared size of an image, before it is decoded.

    Raises:
        InputError: The image has no pixels, more than 256 channels, or more pixels than the limit.

    >>> check_pixels(Path("a.tif"), 4096, 4096)
    """
    if min(height, width, channels) < 1 or channels > 256:
        raise InputError(
            f"cannot read {file}: it declares {size_text((height, width))} pixels of {channels}"
            " channels"
        )
    if height * width > max_pixels():
        raise InputError(
            f"{file} declares {size_text((height, width))} pixels, the limit is {max_pixels()}:"
            " if that is "
            f"right, set the environment variable {VARIABLE}={height * width}"
        )


def check_numbers(file: Path, count: int, itemsize: int) -> None:
    """Check the declared size of a compressed array of `count` numbers, before it is inflated.

    Raises:
        InputError: The array has more bytes than the limit.

    >>> check_numbers(Path("a.npz"), count=10**6, itemsize=4)
    """
    if count * itemsize > BYTES * max_pixels():
        raise InputError(
            f"{file} declares {_gib(count * itemsize)} of compressed numbers, the limit is "
            f"{_gib(BYTES * max_pixels())}: save it as .npy, or set the environment variable "
            f"{VARIABLE}={math.ceil(count * itemsize / BYTES)}"
        )


def check_free_memory(what: Path, size: int) -> None:
    """Check that `size` bytes of memory are free, before they are taken.

    Raises:
        InputError: They are not.

    >>> check_free_memory(Path("a.npy"), 2**20)
    """
    free = _available()
    if free is not None and size > free:
        raise InputError(
            f"{what} takes {_gib(size)} of memory and {_gib(free)} are free: give fewer or "
            "smaller images (`learn` reads folders and .npy files from the disk)"
        )


def _available() -> int | None:
    """Return the bytes of free memory; None if the system does not report them."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(s.split()[1]) for s in lines if s.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"


# -- the guard ------------------------------------------------------------------------------------


class _Ear(logging.Filter):
    """Collect what libraries log in a thread that reads a file; let all else pass."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is passed on."""
        said: list[logging.LogRecord] | None = getattr(self.heard, "said", None)
        if said is None:
            return True
        if record.levelno >= logging.ERROR:
            said.append(record)
        return False


_EAR = _Ear()
for _name in ("tifffile", "PIL", "imagecodecs", "pydicom", "nibabel", "nibabel.global"):
    logging.getLogger(_name).addFilter(_EAR)
for _name in ("PngImagePlugin", "TiffImagePlugin", "JpegImagePlugin", "Image", "ImageFile"):
    logging.getLogger(f"PIL.{_name}").addFilter(_EAR)


class _Quiet:
    """Suppress warnings of all threads while one is inside.

    `warnings.catch_warnings` alone would confuse the filters of threads that enter and leave in
    turn.
    """

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.before = warnings.catch_warnings()
                self.before.__enter__()
                warnings.simplefilter("ignore")
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.before.__exit__(None, None, None)


quiet = _Quiet()
"""Inside this context, libraries print no warnings of what a file holds."""


@contextmanager
def reading(file: Path, strict: bool = False) -> Iterator[None]:
    """Guard a decoder: every error in it becomes one line that names the file.

    Args:
        file: The file that is read.
        strict: Whether an error that the decoder only logs counts too.

    Raises:
        InputError: For every `Exception`, including those of memory and recursion.

    >>> with reading(Path("a.tif")):
    ...     raise ValueError("bad header")
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: cannot read a.tif: bad header...
    """
    before = getattr(_EAR.heard, "said", None)
    said: list[logging.LogRecord] = []
    _EAR.heard.said = said
    try:
        with quiet:
            yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"cannot read {file}: {_reason(error)}") from error
    finally:
        _EAR.heard.said = before
    if said and strict:
        raise InputError(f"cannot read {file}: {said[0].getMessage().splitlines()[0]}")


def _reason(error: Exception) -> str:
    """Return the message of an error as one line."""
    if isinstance(error, MemoryError):
        return "it declares more than memory holds"
    return reason(error) if str(error).strip() else f"it is damaged ({type(error).__name__})"
