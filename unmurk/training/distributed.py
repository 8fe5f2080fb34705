r"""One run on several processes (`accelerate launch -m unmurk learn ...`).

Process :math:`r` of :math:`R` holds the images :math:`r, r + R, \dots` of every batch. Losses are
means over images, so with equally many images on each process

.. math::

    \mathcal L = \frac 1 R \sum_r \mathcal L_r, \qquad
    \nabla \mathcal L = \frac 1 R \sum_r \nabla \mathcal L_r .

Every random draw is made for the whole batch (`unmurk.rng.ShardedGenerator`). So :math:`R`
processes take the steps that one would take, up to rounding. All of them hold the same weights,
EMA weights and replay buffers; only the first reads and writes the run folder.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..devices import default_device, out_of_memory
from ..errors import InputError

__all__ = [
    "average_over",
    "broadcast",
    "check_batch_divisible",
    "first_process",
    "lost",
    "processes",
]


def check_batch_divisible(batch: int, ranks: int) -> None:
    """Check that every process gets equally many images of a batch.

    Raises:
        InputError: The batch is not divisible by the number of processes.

    >>> check_batch_divisible(32, ranks=4)
    >>> check_batch_divisible(32, ranks=3)
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: a batch of 32 does not divide among 3 processes: give a multiple of 3
    """
    if batch % ranks:
        raise InputError(
            f"a batch of {batch} does not divide among {ranks} processes: "
            f"give a multiple of {ranks}"
        )


def processes() -> Any:
    """Return the `accelerate.Accelerator` of this process: its rank and its device.

    >>> processes().num_processes, processes().process_index
    (1, 0)
    """
    from accelerate import Accelerator

    # By itself accelerate would take Apple's MPS, and would take each of several processes without
    # a GPU for the only one.
    return Accelerator(cpu=default_device().type == "cpu")


def first_process() -> bool:
    """Whether this is the process that writes: the first, or the only one.

    >>> first_process()
    True
    """
    return bool(processes().is_main_process)


@contextmanager
def lost() -> Iterator[None]:
    """Turn the failure of a message between processes into one clear line.

    Raises:
        InputError: A message could not be sent or received.

    >>> with lost():
    ...     raise RuntimeError("Connection closed by peer")
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: another process of this run has ended: run the same command ...
    """
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise InputError(
            "another process of this run has ended: run the same command to go on from the last "
            "state (any number of processes)"
        ) from error


def average_over(tensors: Sequence[Tensor], ranks: int) -> None:
    """Replace float32 tensors by their means over all processes, in one message.

    Args:
        tensors: Tensors of the same shapes on all processes; changed in place.
        ranks: Number of processes.

    Raises:
        InputError: Another process has ended.

    >>> gradient = torch.tensor([1.0, 2.0])
    >>> average_over([gradient], ranks=1)  # the mean over one process
    >>> gradient
    tensor([1., 2.])
    """
    if ranks == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with lost():
        torch.distributed.all_reduce(flat)
    parts = flat.div_(ranks).split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def broadcast(data: bytes | None, ranks: int, device: torch.device) -> bytes | None:
    """Broadcast bytes (or None) from rank 0.

    The tensors go by accelerate. The length goes first, since the other processes do not know it;
    accelerate's own broadcast of objects would unpickle them.

    Args:
        data: The bytes of rank 0; other ranks give anything.
        ranks: Number of processes.
        device: Device of the messages.

    Raises:
        InputError: Another process has ended.

    >>> broadcast(b"state", 1, torch.device("cpu"))
    b'state'
    """
    if ranks == 1:
        return data
    from accelerate.utils import broadcast as send

    with lost():
        size = int(send(torch.tensor(-1 if data is None else len(data), device=device)))
        if size < 0:
            return None
        room = torch.empty(size, dtype=torch.uint8, device=device)
        if data is not None:
            room.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return send(room).cpu().numpy().tobytes()
