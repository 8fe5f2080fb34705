"""What a reader checks before it takes memory, and the guard around decoders of other libraries.

A file of a few bytes can declare terabytes, and a few megabytes can inflate to gigabytes. So every
declared size is read first and held against two limits: pixels of one image, and bytes of an array
that is stored compressed. The environment variable `UNMURK_MAX_PIXELS` raises both. What an
uncompressed file declares is held against the length of the file.
"""

import logging
import math
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError

__all__ = ["MAX_PIXELS", "check_file", "check_memory", "check_numbers", "check_pixels", "reading"]

MAX_PIXELS = 2**27  # of one image; a square of 11585
BYTES = 16  # for each of these pixels an inflated array may have so many: 2 GiB in all
VARIABLE = "UNMURK_MAX_PIXELS"


def check_file(file: Path) -> None:
    """Check that a path is a regular file, so that opening it cannot wait for ever.

    Raises:
        InputError: nothing there, a dangling link, a folder, a FIFO, a socket or a device.
    """
    try:
        mode = file.stat().st_mode
    except OSError as error:
        if file.is_symlink():
            raise InputError(f"cannot read {file}: it is a link to nothing") from error
        raise InputError(f"cannot read {file}: {error.strerror or error}") from error
    except ValueError as error:  # a null byte in the name
        raise InputError(f"cannot read {str(file)!r}: {error}") from error
    if stat.S_ISDIR(mode):
        raise InputError(f"cannot read {file}: it is a folder")
    if not stat.S_ISREG(mode):
        raise InputError(f"cannot read {file}: it is a FIFO, a socket or a device, not a file")


def max_pixels() -> int:
    """The limit of pixels of one image. Raises InputError for a variable that is no number."""
    text = os.environ.get(VARIABLE, "")
    if not text:
        return MAX_PIXELS
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{VARIABLE}={text}: give a whole number of pixels above 0")
    return int(text)


def check_pixels(file: Path, height: int, width: int, channels: int = 1) -> None:
    """Check the declared size of an image, before it is decoded.

    Raises:
        InputError: no pixels, more than 256 channels, or more pixels than the limit.
    """
    if min(height, width, channels) < 1 or channels > 256:
        raise InputError(
            f"cannot read {file}: it declares {height}x{width} pixels of {channels} channels"
        )
    if height * width > max_pixels():
        raise InputError(
            f"{file} declares {height}x{width} pixels, the limit is {max_pixels()}: if that is "
            f"right, set the environment variable {VARIABLE}={height * width}"
        )


def check_numbers(file: Path, count: int, itemsize: int) -> None:
    """Check the declared size of a compressed array of `count` numbers, before it is inflated.

    Raises:
        InputError: more bytes than the limit.
    """
    if count * itemsize > BYTES * max_pixels():
        raise InputError(
            f"{file} declares {_gib(count * itemsize)} of compressed numbers, the limit is "
            f"{_gib(BYTES * max_pixels())}: save it as .npy, or set the environment variable "
            f"{VARIABLE}={math.ceil(count * itemsize / BYTES)}"
        )


def check_memory(what: Path, size: int) -> None:
    """Check that memory for a set of `size` bytes is there, before it is taken.

    Raises:
        InputError: it is not.
    """
    free = _available()
    if free is not None and size > free:
        raise InputError(
            f"{what} takes {_gib(size)} of memory and {_gib(free)} are free: give fewer or "
            "smaller images (`learn` reads folders and .npy files from the disk)"
        )


def _available() -> int | None:
    """Bytes of memory that this process can still take; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(s.split()[1]) for s in lines if s.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"


# -- the guard ------------------------------------------------------------------------------------


class _Ear(logging.Filter):
    """Takes what a library logs in a thread that listens, and lets all else pass."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is passed on."""
        said: list[logging.LogRecord] | None = getattr(self.heard, "said", None)
        if said is None:
            return True
        if record.levelno >= logging.ERROR:
            said.append(record)
        return False


_EAR = _Ear()
for _name in ("tifffile", "PIL", "imagecodecs"):
    logging.getLogger(_name).addFilter(_EAR)
for _name in ("PngImagePlugin", "TiffImagePlugin", "JpegImagePlugin", "Image", "ImageFile"):
    logging.getLogger(f"PIL.{_name}").addFilter(_EAR)


class _Quiet:
    """No warnings of any thread while one is in here: `warnings.catch_warnings` alone would mix up
    the filters of threads that enter and leave in turn."""

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


_QUIET = _Quiet()


@contextmanager
def reading(file: Path, strict: bool = False) -> Iterator[None]:
    """The guard around a decoder: whatever goes wrong in it becomes one line that names the file.

    Args:
        file: What is read.
        strict: Whether an error that the decoder only logs counts too.

    Raises:
        InputError: for every `Exception`, those of memory and recursion included.
    """
    before = getattr(_EAR.heard, "said", None)
    said: list[logging.LogRecord] = []
    _EAR.heard.said = said
    try:
        with _QUIET:
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
    """One line of what an error says."""
    if isinstance(error, MemoryError):
        return "it declares more than memory holds"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())[:200]
    return text or f"it is damaged ({type(error).__name__})"
