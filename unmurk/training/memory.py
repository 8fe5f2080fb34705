"""The memory of a run: computed before any of it is taken.

What a run takes beyond what the process holds already:

    step       B h w sum_k n_k s_k for B images of h x w pixels, with n_k graphs of network k in
               one step of training and s_k bytes that autograd keeps for each pixel
    weights    gradients, moments of the optimiser, the weights kept as the best
    buffer     images drawn from the posterior, as float16 (`replay.LIMIT`)
    draws      what networks take without gradients while images are drawn (`Prior.together`)
    moments    the images of a round of the Gaussian start
    state      the file of the state, in memory while it is written, twice

s_k is counted, by running the networks on images of PROBE x PROBE pixels: they are convolutions,
so it does not depend on the size. Measured, the peak of a step is 1.00 to 1.06 times this, and a
U-Net without gradients takes 0.14 to 0.24 times it. On a GPU, step, weights and draws are there.
"""

import math
import os
import resource
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diffusion.prior import Prior
from ..errors import InputError
from ..flows.posterior import Posterior
from . import moments
from .trainer import Method, Settings

__all__ = ["Need", "available", "check", "need"]

PROBE = 32  # pixels to a side
TEMPORARY = 1.06  # of what autograd keeps: the most that a step of training takes
REUSED = 0.5  # of the memory of draws: the rest was a step's
COPIES = 8  # of the images of a round of `moments.fit`
GIB = 2**30


@dataclass(frozen=True)
class Need:
    """Bytes that a run takes, by what for; see the module.

    Attributes:
        held: What the process holds already: the images if they are in memory, the libraries.
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
        """What is still to be taken; Gaussian start and states come between the steps."""
        return self.weights + self.buffer + max(self.moments, self.state, self.step + self.draws)

    @property
    def total(self) -> int:
        """The peak of the process."""
        return self.held + self.more


def need(learner: Method, settings: Settings, shape: Sequence[int], count: int) -> Need:
    """The memory of a run.

    Args:
        learner: The method with its networks.
        settings: Batch and precision.
        shape: Shape (C, H, W) of the images.
        count: How many measurements there are.
    """
    each, ranks = _bytes_kept(learner, settings.precision), _ranks()
    phases: Sequence[dict[str, float]] = getattr(learner, "graphs", [{"prior": 1, "posterior": 1}])
    most = max(sum(n * each[name] for name, n in phase.items()) for phase in phases)
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
        moments=COPIES * 4 * moments.images(count, shape) * math.prod(shape),
        state=2 * (4 * weights + buffer),
    )


def check(
    learner: Method,
    settings: Settings,
    shape: Sequence[int],
    count: int,
    device: torch.device,
    quiet: bool = False,
) -> None:
    """Prints what a run takes, and refuses one that this machine or its GPU has no room for.

    Raises:
        InputError: with what it needs, what there is, and the largest batch that would fit.
    """
    found = need(learner, settings, shape, count)
    size = f"{shape[1]}x{shape[2]}"
    if not quiet:
        images = "1 image" if count == 1 else f"{count} images"
        text = f"learning from {images} of {size}: about {found.total / GIB:.1f} GiB"
        print(text, file=sys.stderr)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that share this machine
    places = [("memory", here * found.more, here * found.step, available())]
    if device.type == "cuda":
        card, left = found.step + found.draws + found.weights, torch.cuda.mem_get_info(device)[0]
        places = [("memory", here * (found.buffer + found.state), 0, available())]
        places.append(("GPU memory", card, found.step, left))
    for place, wanted, step, free in places:
        if free is None or wanted <= free:
            continue
        raise InputError(
            f"learning would take {wanted / GIB:.1f} GiB more {place} and {free / GIB:.1f} GiB "
            f"are free (batch {settings.batch}, network {settings.network}, images of {size}): "
            + _hint(settings.batch, free - wanted + step, step)
        )


def _hint(batch: int, room: int, step: int) -> str:
    """What to change, where a step has so much room and takes so much."""
    fits = int(batch * room / step) // _ranks() * _ranks() if step else 0
    if fits >= 2:
        return f"take a batch of {fits} or less (--batch), or crop the images"
    return "crop the images, or take a machine with more memory"


def available() -> int | None:
    """Bytes that this process can still take, by the machine, its container and its limits.

    None where nothing says so (no Linux).
    """
    found = [_machine(), *_groups(), _limit()]
    told = [value for value in found if value is not None]
    return max(0, min(told)) if told else None


def _machine() -> int | None:
    return _entries(Path("/proc/meminfo"), 1024).get("MemAvailable")


def _groups() -> list[int | None]:
    """What the control groups of a container leave, of both versions of their interface."""
    root = Path("/sys/fs/cgroup")
    found: list[int | None] = []
    for folder, most, now in (
        (root, "memory.max", "memory.current"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit, used = (_number(folder / name) for name in (most, now))
        if limit is not None and used is not None:
            cache = _entries(folder / "memory.stat").get("inactive_file", 0)  # given up at need
            found.append(limit - used + cache)
    return found


def _limit() -> int | None:
    """What `ulimit -v` leaves."""
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most == resource.RLIM_INFINITY:
        return None
    size = _entries(Path("/proc/self/status"), 1024).get("VmSize")
    return None if size is None else most - size


def _held() -> int:
    return _entries(Path("/proc/self/status"), 1024).get("VmRSS", 0)


def _entries(file: Path, unit: int = 1) -> dict[str, int]:
    """The numbers of a file of lines "name: number" or "name number"."""
    found = {}
    try:
        for line in file.read_text().splitlines():
            name, *rest = line.replace(":", " ").split()
            if rest and rest[0].isdigit():
                found[name] = unit * int(rest[0])
    except (OSError, ValueError):
        return {}
    return found


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None  # "max": there is no limit


def _ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _draws(learner: Method, each: float, pixels: int) -> float:
    """What a draw takes: the images drawn together, without gradients."""
    prior = learner.ema["prior"]
    assert isinstance(prior, Prior)
    return 0.25 * each * pixels * min(256, prior.together(pixels))


@torch.random.fork_rng(devices=[])
def _bytes_kept(learner: Method, precision: str) -> dict[str, float]:
    """Bytes that autograd keeps for each pixel of an image: of "prior", "posterior", "mean"."""
    prior, posterior = learner.modules["prior"], learner.modules["posterior"]
    assert isinstance(prior, Prior) and isinstance(posterior, Posterior)
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


def _kept(run: Callable[[], Any], learner: Method) -> int:
    """Bytes of the tensors that autograd keeps while a function runs, without parameters."""
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
