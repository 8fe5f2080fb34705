"""Array files: .npy and .npz of numpy, and idx, the format of MNIST. Nothing is ever unpickled."""

import gzip
import math
import zlib
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from ...errors import InputError

__all__ = ["one_line", "read_array", "read_idx", "split_key"]


def split_key(path: str) -> tuple[Path, str | None]:
    """ "set.npz:train" -> the file and the name of the array in it."""
    head, colon, key = path.rpartition(":")
    if colon and head.lower().endswith(".npz"):
        return Path(head), key
    return Path(path), None


def read_array(file: Path, key: str | None = None) -> tuple[np.ndarray, str, str | None]:
    """The array of a file, the format ("npy", "npz" or "idx"), and the array's name.

    Args:
        file: The file.
        key: Name of the array in an npz file; None: "images", or the only one.

    Raises:
        InputError: unreadable, of another type, or with several arrays to choose from.
    """
    try:
        return _read(file, key)
    except InputError:
        raise
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        RuntimeError,
        zlib.error,
        BadZipFile,
    ) as error:
        raise InputError(f"cannot read {file}: {one_line(error)}") from error


def _read(file: Path, key: str | None) -> tuple[np.ndarray, str, str | None]:
    suffix = file.suffix.lower()
    if suffix == ".npy":
        return np.load(file, allow_pickle=False), "npy", None
    if suffix == ".npz":
        with np.load(file, allow_pickle=False) as arrays:
            key = key or ("images" if "images" in arrays.files else None)
            if key is None and len(arrays.files) == 1:
                key = arrays.files[0]
            if key not in arrays.files:
                raise InputError(
                    f"{file} holds the arrays {', '.join(arrays.files) or 'none'}; choose one as "
                    f"{file.name}:name"
                )
            return arrays[key], "npz", key
    if suffix == ".gz" or "idx" in file.name:
        return read_idx(file), "idx", None
    raise InputError(
        f"{file}: unknown type of file; known are a folder, png, jpg, tif, bmp, npy, npz and idx"
    )


def read_idx(path: str | Path) -> np.ndarray:
    """The uint8 array of an idx file (the format of MNIST; images or labels), gzipped or not.

    Raises:
        InputError: not such a file, or cut short.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {one_line(error)}") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08" or not 1 <= data[3] <= 4:
        raise InputError(f"{path} is not an idx file of bytes")
    start = 4 + 4 * data[3]
    shape = [int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4)]
    if len(data) - start != math.prod(shape):
        raise InputError(f"{path} is cut short or damaged")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def one_line(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).splitlines() or [type(error).__name__])[0]
