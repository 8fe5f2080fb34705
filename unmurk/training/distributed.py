"""One run on several processes (`accelerate launch -m unmurk learn ...`).

Process r of R holds the rows r, r + R, ... of every batch. Losses are means over rows, so with as
many rows each

    loss = mean_r loss_r,    gradient = mean_r gradient_r,

and every draw is made for the whole batch (`unmurk.rng.ShardedGenerator`): R processes take the
steps that one would take, up to rounding. All of them hold the same weights, averages and replay
buffers; the first alone reads and writes the run folder.
"""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from ..devices import default_device, out_of_memory
from ..errors import InputError

__all__ = [
    "average_over",
    "check_batch_divisible",
    "first_process",
    "interruptible",
    "lost",
    "processes",
    "broadcast",
]


def check_batch_divisible(batch: int, ranks: int) -> None:
    """Raises InputError unless every process gets as many rows of a batch."""
    if batch % ranks:
        raise InputError(f"a batch of {batch} does not divide among {ranks} processes")


def processes() -> Any:
    """The `accelerate.Accelerator` of this process: its place among the others, its device."""
    from accelerate import Accelerator

    # left alone, accelerate would take Apple's MPS, and each of several processes without GPUs
    # for the only one
    return Accelerator(cpu=default_device().type == "cpu")


def first_process() -> bool:
    """Whether this process is the one that writes: the first, or the only one."""
    return bool(processes().is_main_process)


@contextmanager
def lost() -> Iterator[None]:
    """Says in one line that another process is gone.

    Raises:
        InputError: A message could not be sent or received.
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
    """Replaces float32 tensors by their means over all processes, in one message."""
    if ranks == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with lost():
        torch.distributed.all_reduce(flat)
    parts = flat.div_(ranks).split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def broadcast(data: bytes | None, ranks: int, device: torch.device) -> bytes | None:
    """What the first process has, or None: the same on all of them."""
    if ranks == 1:
        return data
    size = torch.tensor(-1 if data is None else len(data), device=device)
    with lost():
        torch.distributed.broadcast(size, 0)
        if int(size) < 0:
            return None
        room = torch.empty(int(size), dtype=torch.uint8, device=device)
        if data is not None:
            room.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        torch.distributed.broadcast(room, 0)
    return room.cpu().numpy().tobytes()


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Lets a step finish: Ctrl-C and SIGTERM, which schedulers and launchers send, wait for it.

    The function given raises KeyboardInterrupt if one has come; a second Ctrl-C does so at once.
    """
    came = False

    def note(number: int, _frame: FrameType | None) -> None:
        nonlocal came
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came = True

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
