"""Where a command's results go: a checked place on disk, JSON, lines for a person."""

import io
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    import torch

    from .images import ImageSet

__all__ = [
    "finished",
    "lines",
    "output",
    "part_of",
    "plain",
    "save_like",
    "save_new",
    "write",
]

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


def save_new(images: "torch.Tensor", out: Path, like: "ImageSet | None" = None) -> None:
    """Images that come from no file: all values in an array file, else a folder of pictures."""
    from .images import save_images

    if out.suffix.lower() in {".npy", ".npz"}:
        save_images(images, out)
    elif like is None:
        save_images(images, out, format="png")
    else:
        save_images(images, out, like.names, like.scale, format="png")


def save_like(
    out: Path, data: "ImageSet", images: "torch.Tensor", **arrays: "torch.Tensor | None"
) -> dict[str, Any]:
    """Images as what `data` came in; arrays as .npy files in the folder, or beside the file."""
    import numpy as np

    from .images import save_images

    result: dict[str, Any] = {"images": len(images), "skipped": dict(data.skipped)}
    files = save_images(images, out, data.names, data.scale)
    result["out"] = files[0] if len(files) == 1 else out
    for name, array in arrays.items():
        if array is not None:
            path = out / f"{name}.npy" if out.is_dir() else out.with_name(f"{out.stem}-{name}.npy")
            stream = io.BytesIO()
            np.save(stream, array.cpu().numpy())
            write(path, stream.getvalue())
            result[name] = path
    return result


def plain(value: Any) -> Any:
    """The value in what JSON knows; a number that is not finite becomes None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def lines(result: dict[str, Any], indent: str = "") -> Iterator[str]:
    """One line for every entry of a result that says something."""
    for key, value in result.items():
        if isinstance(value, dict):
            if value:
                yield f"{indent}{key}"
                yield from lines(value, indent + "  ")
        elif value is not None:
            text = f"{value:.4g}" if isinstance(value, float) else value
            yield f"{indent}{key:<10} {text}"
