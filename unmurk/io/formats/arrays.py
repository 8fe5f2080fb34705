"""Array files: .npy and .npz of NumPy, and idx, the format of MNIST. Nothing is ever unpickled.

Every header is read before memory is taken. It is compared with the length of the file or, for
compressed numbers, with the limit of `limits`.
"""

import gzip
import math
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from ...errors import InputError
from ..limits import check_file, check_free_memory, check_numbers, reading
from .registry import split_member

__all__ = ["is_idx", "map_array", "read_array", "read_idx", "split_key"]

IDX = re.compile(r"(^|[-.])idx\d?(-ubyte)?(\.gz)?$", re.IGNORECASE)


def split_key(path: str) -> tuple[Path, str | None]:
    """Split "set.npz:train" or "scan.h5:data" into the file and the name of the array in it.

    >>> split_key("set.npz:train")[1]
    'train'
    """
    head, colon, key = path.rpartition(":")
    if colon and head.lower().endswith(".npz"):
        return Path(head), key
    file, member = split_member(path)
    return file, member or None


def is_idx(name: str) -> bool:
    """Whether a file's name ends as those of idx files do: -idx3-ubyte, .idx, gzipped or not.

    >>> is_idx("train-images-idx3-ubyte.gz"), is_idx("train.npy")
    (True, False)
    """
    return IDX.search(name) is not None


def read_array(file: Path, key: str | None = None) -> tuple[np.ndarray, str, str | None]:
    """Read the array of a file.

    Args:
        file: The file.
        key: Name of the array in an npz file; None: "images", or the only one.

    Returns:
        The array, the format ("npy", "npz" or "idx"), and the array's name.

    Raises:
        InputError: The file is unreadable, too large or of another type, or has several arrays to
            choose from.

    >>> np.savez("set.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.arange(3))
    >>> array, form, name = read_array(Path("set.npz"))
    >>> array.shape, form, name
    ((3, 8, 8), 'npz', 'images')
    """
    check_file(file)
    with reading(file):
        return _read(file, key)


def _read(file: Path, key: str | None) -> tuple[np.ndarray, str, str | None]:
    suffix = file.suffix.lower()
    if suffix == ".npy":
        with file.open("rb") as stream:
            size = _declared(file, stream, file.stat().st_size)
            check_free_memory(file, size)
        return np.load(file, allow_pickle=False), "npy", None
    if suffix == ".npz":
        array, key = _read_npz(file, key)
        return array, "npz", key
    if suffix == ".gz" or is_idx(file.name):
        return read_idx(file), "idx", None
    raise InputError(
        f"{file}: the type of file is unknown: give a folder, png, jpg, tif, bmp, npy, npz or idx"
    )


def map_array(file: Path) -> np.ndarray:
    """Map the array of a .npy file. Raises InputError if it is unreadable or cut short.

    >>> np.save("set.npy", np.arange(6.0).reshape(2, 3))
    >>> float(map_array(Path("set.npy"))[1, 2])
    5.0
    """
    check_file(file)
    with reading(file), file.open("rb") as stream:
        _declared(file, stream, file.stat().st_size)
        array: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
        return array


def _declared(file: Path, stream: BinaryIO | Any, length: int) -> int:
    """Read a .npy header and return the bytes of numbers that it declares."""
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise InputError(f"cannot read {file}: its .npy version is {version}, 3.0 is known")
    # (3, 0) differs from (2, 0) in the text's encoding only, which matters to field names
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(stream)
    if dtype.hasobject or dtype.kind not in "buifc":
        raise InputError(f"cannot read {file}: it holds {dtype}, not numbers")
    if any(not isinstance(n, int) or n < 0 for n in shape):
        raise InputError(f"cannot read {file}: it declares the shape {shape}")
    size = math.prod(shape) * dtype.itemsize
    if size > length - stream.tell():
        raise InputError(
            f"cannot read {file}: it declares {size} bytes of numbers and is cut short"
        )
    return size


def _read_npz(file: Path, key: str | None) -> tuple[np.ndarray, str]:
    with zipfile.ZipFile(file) as archive:
        members = {i.filename.removesuffix(".npy"): i for i in archive.infolist()}
        key = key or ("images" if "images" in members else None)
        if key is None and len(members) == 1:
            key = next(iter(members))
        if key is None or key not in members:
            raise InputError(
                f"{file} holds the arrays {', '.join(members) or 'none'}: choose one as "
                f"{file.name}:name"
            )
        found = members[key]
        check_numbers(file, found.file_size, 1)
        check_free_memory(file, found.file_size)
        with archive.open(found) as stream:
            _declared(file, stream, found.file_size)
        with archive.open(found) as stream:
            return npy.read_array(stream, allow_pickle=False), key


def read_idx(path: str | Path) -> np.ndarray:
    """Read the uint8 array of an idx file (the format of MNIST; images or labels), gzipped or not.

    Raises:
        InputError: The file has another format, is cut short, or is larger than the limit.

    >>> _ = Path("a.idx").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
    >>> read_idx("a.idx")
    array([7, 9], dtype=uint8)
    """
    path = Path(path)
    check_file(path)
    with reading(path), path.open("rb") as plain:
        packed = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        if not packed:
            return _idx(path, plain, path.stat().st_size)
        with gzip.open(plain) as stream:
            return _idx(path, stream, None)


def _idx(path: Path, stream: Any, length: int | None) -> np.ndarray:
    """Read the array of an idx stream of a known length; None for a compressed one."""
    head = stream.read(4)
    if len(head) < 4 or head[:3] != b"\0\0\x08" or not 1 <= head[3] <= 4:
        raise InputError(f"{path} is not an idx file of bytes")
    sides = stream.read(4 * head[3])
    shape = [int.from_bytes(sides[start : start + 4], "big") for start in range(0, len(sides), 4)]
    size = math.prod(shape)
    full = len(shape) == head[3]
    if full and length is None:
        check_numbers(path, size, 1)
    if not full or (length is not None and length != 4 + len(sides) + size):
        raise InputError(f"{path} is cut short or damaged")
    check_free_memory(path, size)
    data = stream.read(size)
    if len(data) != size or stream.read(1):
        raise InputError(f"{path} is cut short or damaged")
    return np.frombuffer(data, np.uint8).reshape(shape)
