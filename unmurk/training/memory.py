r"""Memory of a run, computed before any of it is taken.

Beyond what the process holds already, a run takes

=========  =======================================================================================
step       :math:`B h w \sum_k n_k s_k` for B images of h x w pixels, with :math:`n_k` graphs of
           network k in one training step and :math:`s_k` bytes that autograd keeps for each pixel
weights    gradients, moments of the optimizer, and the best EMA weights
buffer     the replay buffer, in float16 (`replay.LIMIT`)
draws      activations of networks without gradients while images are drawn (`Prior.together`)
moments    the images of a round of fitting the Gaussian prior
state      the checkpoint, which is in memory twice while it is written
=========  =======================================================================================

:math:`s_k` is counted by running the networks on images of 32 x 32 pixels. They are convolutional,
so it does not depend on the size. As measured, the peak of a step is 1.00 to 1.06 times this sum,
and a U-Net without gradients takes 0.14 to 0.24 times it. On a GPU, step, weights and draws are
there.
"""

import math
import os
import resource
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, remark, size_text
from ..gaussian import images_per_round
from .learner import Learner
from .trainer import Settings

__all__ = ["Need", "announce", "available", "check", "described", "need"]

PROBE = 32  # pixels to a side
TEMPORARY = 1.06  # peak of a training step, relative to what autograd keeps
REUSED = 0.5  # part of the memory of draws that is not reused from a step
COPIES = 8  # of the images of a round of `gaussian.fit`
GIB = 2**30


@dataclass(frozen=True)
class Need:
    """Bytes that a run takes, by purpose; see the module.

    Attributes:
        held: What the process holds already: the libraries, and the images if they are in memory.

    >>> need = Need(held=1, step=10, weights=2, buffer=3, draws=4, moments=5, state=6)
    >>> need.more, need.total  # 2 + 3 + max(5, 6, 10 + 4)
    (19, 20)
    """

    held: int
    step: int
    weights: int
    buffer: int
    draws: int
    moments: int
    state: int

    @property
    def more(self) -> int:
        """Bytes still to be taken. The Gaussian fit and checkpoints come between steps."""
        return self.weights + self.buffer + max(self.moments, self.state, self.step + self.draws)

    @property
    def total(self) -> int:
        """Bytes at the peak of the process."""
        return self.held + self.more


def need(learner: Learner, settings: Settings, shape: Sequence[int], count: int) -> Need:
    """Compute the memory of a run.

    Args:
        learner: The built learner.
        settings: Batch and precision.
        shape: Shape (C, H, W) of the images.
        count: Number of measurements.

    >>> from unmurk.problem import Problem
    >>> from unmurk.training import Clean
    >>> shape = (1, 8, 8)
    >>> learner = Clean().build(torch.zeros(4, *shape), Problem("identity", 0.1), shape)
    >>> small, large = (need(learner, Settings(batch=b), shape, 4) for b in (8, 16))
    >>> round(large.step / small.step, 2), large.weights == small.weights
    (2.0, True)
    """
    each, ranks = _bytes_kept(learner, settings.precision), _ranks()
    most = max(sum(n * each[name] for name, n in phase.items()) for phase in learner.graphs)
    batch = math.ceil(settings.batch / ranks)
    weights = sum(_size(m.parameters()) for m in learner.modules.values())
    buffer = _size(learner.buffers.values())
    pixels = math.prod(shape[1:])
    return Need(
        held=_held(),
        step=int(TEMPORARY * most * batch * pixels),
        weights=4 * weights,
        buffer=buffer,
        draws=int(REUSED * _draws(learner, each["prior"], pixels)),
        moments=COPIES * 4 * images_per_round(count, shape) * math.prod(shape),
        state=2 * (4 * weights + buffer),
    )


def check(
    learner: Learner,
    settings: Settings,
    shape: Sequence[int],
    count: int,
    device: torch.device,
    quiet: bool = False,
    what: str = "",
) -> Need:
    """Compute the memory of a run; refuse one for which this machine or its GPU has no room.

    Args:
        learner: The built learner.
        settings: Batch and precision.
        shape: Shape (C, H, W) of the images.
        count: Number of measurements.
        device: Device of the networks.
        quiet: Whether to print nothing; otherwise the memory of a run that is refused is printed.
        what: The images in words; empty: their number and size.

    Returns:
        The memory of the run.

    Raises:
        InputError: There is too little memory. The message names what the run needs, what there
            is, and the largest batch that would fit.

    >>> from unmurk.problem import Problem
    >>> from unmurk.training import Clean
    >>> learner = Clean().build(torch.zeros(4, 1, 8, 8), Problem("identity", 0.1), (1, 8, 8))
    >>> shape, cpu = (1, 2**20, 2**20), torch.device("cpu")
    >>> check(learner, Settings(), shape, 4, cpu, quiet=True)
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: learning would take ... GiB more memory and ... GiB are free ...
    """
    found = need(learner, settings, shape, count)
    size = size_text(shape[1:3])
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that share this machine
    places = [("memory", here * found.more, here * found.step, available())]
    if device.type == "cuda":
        card, left = found.step + found.draws + found.weights, torch.cuda.mem_get_info(device)[0]
        places = [("memory", here * (found.buffer + found.state), 0, available())]
        places.append(("GPU memory", card, found.step, left))
    for place, wanted, step, free in places:
        if wanted <= free:
            continue
        if not quiet:
            announce(found, what or described(shape, count))
        raise InputError(
            f"learning would take {wanted / GIB:.1f} GiB more {place} and {free / GIB:.1f} GiB "
            f"are free (batch {settings.batch}, network {settings.network}, images of {size}): "
            + _hint(settings.batch, free - wanted + step, step)
        )
    return found


def described(shape: Sequence[int], count: int) -> str:
    """Describe images in words.

    >>> described((1, 8, 8), 12)
    '12 images of 8x8'
    """
    images = "1 image" if count == 1 else f"{count} images"
    return f"{images} of {size_text(shape[1:3])}"


def announce(found: Need, what: str, seconds: float | None = None) -> None:
    """Print the images of a run, its memory, and how long it takes where that is known.

    >>> import sys
    >>> from contextlib import redirect_stderr
    >>> with redirect_stderr(sys.stdout):
    ...     announce(Need(GIB, GIB, 0, 0, 0, 0, 0), "12 images of 8x8", seconds=200.0)
    learning from 12 images of 8x8: about 3 min and 2.0 GiB here
    """
    duration = "" if seconds is None else f"{_duration(seconds)} and "
    text = f"learning from {what}: about {duration}{found.total / GIB:.1f} GiB"
    remark(text if seconds is None else f"{text} here")


def _duration(seconds: float) -> str:
    """Format a time, to two digits at most.

    >>> _duration(11.8), _duration(200), _duration(7500)
    ('12 s', '3 min', '2.1 h')
    """
    if seconds < 100:
        return f"{max(1, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def _hint(batch: int, room: float, step: int) -> str:
    """Suggest a change if there are `room` bytes for a step that takes `step` bytes."""
    fits = int(batch * room / step) // _ranks() * _ranks() if step else 0
    if fits >= 2:
        return f"take a batch of {fits} or less (--batch), or crop the images"
    return "crop the images, or take a machine with more memory"


def available() -> float:
    """Return the bytes that this process can still take.

    The machine, its container and the limits of the process bound them. The result is infinite
    where the system states no bound.

    >>> available() > 0
    True
    """
    return max(0.0, min([_machine(), *_groups(), _limit()]))


def _machine() -> float:
    """Return the bytes that the machine has left."""
    return _entries(Path("/proc/meminfo"), 1024).get("MemAvailable", math.inf)


def _groups() -> list[float]:
    """Return the bytes that the control groups of a container leave, for both their versions."""
    root = Path("/sys/fs/cgroup")
    found: list[float] = []
    for folder, most, now in (
        (root, "memory.max", "memory.current"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit, used = (_number(folder / name) for name in (most, now))
        if limit < math.inf and used < math.inf:
            cache = _entries(folder / "memory.stat").get("inactive_file", 0)  # released on demand
            found.append(limit - used + cache)
    return found


def _limit() -> float:
    """Return the bytes that `ulimit -v` leaves."""
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most == resource.RLIM_INFINITY:
        return math.inf
    return most - _entries(Path("/proc/self/status"), 1024).get("VmSize", -math.inf)


def _held() -> int:
    """Return the bytes that this process holds."""
    return _entries(Path("/proc/self/status"), 1024).get("VmRSS", 0)


def _entries(file: Path, unit: int = 1) -> dict[str, int]:
    """Read a file of lines "name: number" or "name number"; empty if it cannot be read."""
    found = {}
    try:
        for line in file.read_text().splitlines():
            name, *rest = line.replace(":", " ").split()
            if rest and rest[0].isdigit():
                found[name] = unit * int(rest[0])
    except (OSError, ValueError):
        return {}
    return found


def _number(file: Path) -> float:
    """Read the number in a file; infinity for "max" or a file that cannot be read."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return math.inf


def _ranks() -> int:
    """Return the number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _size(tensors: Any) -> int:
    """Return the bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def _draws(learner: Learner, each: float, pixels: int) -> float:
    """Return the bytes of the images that are drawn together, without gradients."""
    return 0.25 * each * pixels * min(256, learner.teacher.together(pixels))


@torch.random.fork_rng(devices=[])
def _bytes_kept(learner: Learner, precision: str) -> dict[str, float]:
    """Count the bytes that autograd keeps for each pixel, of "prior", "posterior" and "mean"."""
    prior, posterior = learner.prior, learner.posterior
    c, device = posterior.shape[0], next(posterior.parameters()).device
    x = torch.rand(2, c, PROBE, PROBE, device=device)
    inputs = torch.rand(2, c + 2, PROBE, PROBE, device=device)
    time = torch.zeros(2, device=device)
    runs: dict[str, Callable[[], Any]] = {
        "prior": lambda: prior.output(x, time),
        "posterior": lambda: posterior.log_density(x, posterior.read(x, inputs)),
        "mean": lambda: posterior.mean_net(inputs)[0],
    }
    lower = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
    with lower, torch.enable_grad():
        return {name: _kept(run, learner) / (2 * PROBE**2) for name, run in runs.items()}


def _kept(run: Callable[[], Any], learner: Learner) -> int:
    """Count the bytes of the tensors, parameters aside, that autograd keeps in a function."""
    weights = [p for m in learner.modules.values() for p in m.parameters()]
    own = {p.untyped_storage().data_ptr() for p in weights}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())
