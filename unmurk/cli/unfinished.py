"""The page of a run that is still training, which reloads itself, and its pictures on the way.

At every tenth of a run its examples are restored and kept in `progress.safetensors`, so that the
page shows the same images at 10 %, 20 % and so on. The pictures are those of a few draws, at most
`SIDE` pixels to a side. The page of the finished run shows how it came about, too.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from ..errors import InputError, reason
from ..io.atomic import write as write_atomically
from ..io.weights import opened
from .report import Column, Comparison, Images, Section

__all__ = ["IMAGES", "RELOAD", "course", "keep", "pictures_of"]

IMAGES = "progress.safetensors"
RELOAD = 60  # seconds after which the page of an unfinished run reloads itself
TENTHS = 10
SIDE = 128  # most pixels to a side of the pictures that are kept
MOST = 2**26  # bytes of the pictures


def keep(run: Path, share: float, items: Sequence[Comparison]) -> None:
    """Keep the restored examples of a run at a share of it, once a tenth.

    Args:
        run: The run folder.
        share: Share of the run, 0 to 1.
        items: The examples.

    Raises:
        InputError: The file cannot be read or written.
    """
    tenth, held = int(TENTHS * share), pictures_of(run)
    if tenth < 1 or not items or tenth in held:
        return
    kept = {k: x for k, x in held.items() if k < tenth}  # a run that goes on from an older state
    kept[tenth] = torch.stack([item.after[..., :SIDE, :SIDE] for item in items])
    named = {str(k): x.half().contiguous() for k, x in kept.items()}
    write_atomically(run / IMAGES, save(named))


def pictures_of(run: Path) -> dict[int, Tensor]:
    """Return the restored examples (N, C, H, W) of a run by tenth; empty without any.

    Raises:
        InputError: The file is damaged.
    """
    path = run / IMAGES
    if not path.exists():
        return {}
    try:
        if path.stat().st_size > MOST:
            raise ValueError("it is far too large")
        with opened(path) as tensors:
            names = sorted(tensors.keys(), key=int)
            found = {int(name): tensors.get_tensor(name).float() for name in names}
        shapes = {x.shape for x in found.values()}
        if len(shapes) > 1 or any(len(s) != 4 for s in shapes) or not set(found) <= {*range(11)}:
            raise ValueError("its pictures are others")
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({reason(error)}): remove it") from error
    return found


def course(run: Path, items: Sequence[Comparison]) -> list[Section]:
    """Return the examples of a run at 10 %, 20 % and so on, each on its scale of brightness.

    Args:
        run: The run folder.
        items: The examples as they are now, for labels and scales.
    """
    held = {k: x for k, x in pictures_of(run).items() if len(x) == len(items)}
    if not held:
        return []
    grid = []
    for i, item in enumerate(items):
        low, high = item.range
        grid.append([(x[i] - low) / max(high - low, 1e-6) for x in held.values()])
    columns = [Column(f"{10 * tenth} %") for tenth in held]
    caption = "The examples, restored at these shares of the training."
    labels = [item.label for item in items]
    return [Images("While it learned", grid, columns, labels, caption, tile=110)]
