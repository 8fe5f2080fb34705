"""Reading of option values and of the files that hold masks and blur kernels."""

from pathlib import Path

import numpy as np
from torch import Tensor

from ..errors import InputError

__all__ = ["pick_rows", "read_array", "size"]


def size(text: str) -> tuple[int, int]:
    """ "12" -> (12, 12) and "12x8" -> (12, 8). Raises ValueError."""
    numbers = [int(part) for part in text.lower().split("x")]
    if len(numbers) not in (1, 2):
        raise ValueError(text)
    return numbers[0], numbers[-1]


def read_array(form: str, path: str) -> np.ndarray:
    """A numeric array (H, W) or (N, H, W) from a .npy file or a grey image. Raises InputError."""
    if not Path(path).is_file():
        raise InputError(f"{form}: there is no file {path}")
    try:
        array = _load(path)
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise InputError(f"{form}: cannot read {path}: {str(error).splitlines()[0]}") from error
    if array.ndim not in (2, 3) or array.size == 0 or array.dtype.kind not in "buif":
        raise InputError(
            f"{form}: {path} must hold numbers of shape (H, W) or (N, H, W), it holds "
            f"{array.dtype} of shape {array.shape}"
        )
    if not np.isfinite(array).all():
        raise InputError(f"{form}: {path} holds values that are not finite")
    return array


def _load(path: str) -> np.ndarray:
    if path.lower().endswith(".npy"):
        return np.asarray(np.load(path, allow_pickle=False))
    from PIL import Image

    with Image.open(path) as image:
        grey = image if image.mode in ("1", "L", "I;16", "I", "F") else image.convert("L")
        return np.asarray(grey)


def pick_rows(form: str, path: str, values: Tensor, index: list[int]) -> Tensor:
    """The rows of a file's tensor (N, H, W) for these image numbers; (H, W) is shared by all."""
    if values.ndim == 2:
        return values[None]
    if index and max(index) >= len(values):
        raise InputError(
            f"{form}: {path} holds {len(values)} arrays, there is none for image {max(index)}"
        )
    return values[index]
