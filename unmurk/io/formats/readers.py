"""The reader of a file, among those of this package and those that are registered.

The modules of the formats import the registry and register their readers in it. This module is
above them: it imports them when the first file is looked at, so it is light itself.
"""

from functools import cache
from pathlib import Path

from .registry import Reader, has_reader, real_path, registered, suffix_of

__all__ = ["holds_images", "is_folder", "reader_of"]


def reader_of(file: Path) -> Reader:
    """Return the reader of a file, chosen by the longest suffix that its name ends in.

    Registered readers come before entry points. A file without a known suffix may be DICOM.

    Raises:
        InputError: No reader has such a suffix, or the package of the reader cannot be imported.

    >>> reader_of(Path("a.nii.gz")).name
    'NIfTI'
    """
    _own_readers()
    return registered(file)


def is_folder(path: Path) -> bool:
    """Whether a path is a folder of files, and not one that is an image itself (OME-Zarr).

    >>> Path("pictures").mkdir()
    >>> is_folder(Path("pictures")), is_folder(Path("a.png"))
    (True, False)
    """
    real = real_path(path)
    return real.is_dir() and not (suffix_of(real) and reader_of(real).folder)


def holds_images(path: Path) -> bool:
    """Whether a path names one file of images, or a folder that is one (OME-Zarr).

    Files that do not exist count by their name.

    >>> holds_images(Path("a.png")), holds_images(Path("a.npy"))
    (True, False)
    """
    file = real_path(path)
    return has_reader(file) and (not file.is_dir() or reader_of(file).folder)


@cache
def _own_readers() -> None:
    """Register the readers of this package, whose libraries take a while to import."""
    from . import dicom, fits, hdf5_writer, microscopy, nifti, raster, tiff  # noqa: F401
