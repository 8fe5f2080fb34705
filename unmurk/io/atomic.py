"""Where a command's results go: a checked place on disk, and files that are whole or not there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError

__all__ = ["LOG", "finished", "output", "part_of", "write"]

LOG = "unmurk.jsonl"  # what a folder of results says of how they were made


@contextmanager
def output(path: Path, folder: bool = True) -> Iterator[None]:
    """Check that `path` can be written; when the command fails, remove what it made there.

    A run with a state or finished files to continue from stays. What was there before is never
    removed.

    Raises:
        InputError: when nothing can be written there, or a folder is wanted and a file is there.
    """
    path = path.absolute()
    missing = [p for p in (path, *path.parents) if not p.exists()]
    found = missing[-1].parent if missing else path
    if not found.is_dir() and (missing or folder):
        raise InputError(f"cannot write {path}: {found} is a file; give another place")
    try:
        tempfile.TemporaryDirectory(dir=found if found.is_dir() else found.parent).cleanup()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror} in {found}") from error
    try:
        yield
    except BaseException:
        alone = os.environ.get("WORLD_SIZE", "1") == "1"  # others may have written there
        kept = any(path.rglob("state/*")) or (path / LOG).exists()
        if missing and alone and not kept:
            _remove(missing)
        raise


def _remove(paths: list[Path]) -> None:
    """Remove the first path, and the others, its parents, as far as they are empty."""
    path, *parents = paths
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    for parent in parents:
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()


def part_of(out: Path) -> Path:
    """Where `out` is put together: beside it, so that one rename finishes it."""
    return out.with_name(f".{out.name}.{os.getpid()}.part")


def finished(part: Path, out: Path) -> None:
    """Give a file that was put together at `part` its name, once it is on the disk."""
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, out)


def write(out: Path, data: bytes) -> None:
    """Write a file beside its place, flush it to disk, and give it its name."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(out)
    try:
        part.write_bytes(data)
        finished(part, out)
    finally:
        part.unlink(missing_ok=True)
