"""Inputs of a solver: checked and whitened measurements, starting images and random streams.

Images and samples form one flat batch. Entry k B + b is sample k of image b, and it draws all its
noise from the stream of (seed, b, k), so a result does not depend on how the batch is divided. A
restart draws from a stream of its own.

Solvers take Gaussian noise of one level; other noise is whitened first (`unmurk.whitening`).

A prior of gray images treats channels one by one. Equal channels that met different noise would
come back with a tint, so images whose channels are equal share the noise of the first channel.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..bounds import Whole, check_total_memory
from ..errors import InputError
from ..missing import without_missing
from ..problem import Problem
from ..rng import PerImageGenerator, StreamId
from ..whitening import whiten

__all__ = ["Inputs", "SharedChannelGenerator", "equal_channels", "prepare"]

SAMPLES = Whole(1, 100_000)


def equal_channels(x: Tensor, channels: int) -> Tensor:
    """Tell which images have equal channels.

    Args:
        x: Images or measurements (B, ...).
        channels: Channels of an image.

    Returns:
        (B,) bool; False for one channel, and where x has another number of channels.

    >>> equal_channels(torch.ones(2, 3, 4, 4), 3)
    tensor([True, True])
    """
    if x.ndim != 4 or x.shape[1] != channels or channels < 2:
        return torch.zeros(len(x), dtype=torch.bool, device=x.device)
    return (x == x[:, :1]).flatten(1).all(1)


class SharedChannelGenerator:
    """Random streams that give chosen images the same draws in every channel.

    Args:
        given: One random stream for each image.
        shared: The chosen images, (B,) bool.
        channels: Channels of an image; draws with another number of channels stay as they are.

    >>> given, shared = PerImageGenerator(0, [0, 1]), torch.tensor([True, False])
    >>> draws = SharedChannelGenerator(given, shared, channels=3).randn(3, 4, 4)
    >>> equal_channels(draws, 3)
    tensor([ True, False])
    """

    def __init__(self, given: PerImageGenerator, shared: Tensor, channels: int) -> None:
        self.given, self.shared, self.channels = given, shared, channels

    def __len__(self) -> int:
        return len(self.given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.given, name)

    def randn(self, *shape: int) -> Tensor:
        """Draw standard normal numbers, with `shape` for each image."""
        return self._share(self.given.randn(*shape))

    def rand(self, *shape: int) -> Tensor:
        """Draw numbers uniform on [0, 1), with `shape` for each image."""
        return self._share(self.given.rand(*shape))

    def _share(self, draws: Tensor) -> Tensor:
        if draws.ndim == 4 and draws.shape[1] == self.channels:
            draws[self.shared] = draws[self.shared, :1]
        return draws


@dataclass(frozen=True)
class Inputs:
    """What a solver runs on; made by `prepare`.

    Attributes:
        y: Whitened measurements (B, ...).
        problem: Operator and Gaussian noise, bound to the images of y.
        shape: Shape (C, H, W) of an image.
        init: Starting images of all entries (samples x B, C, H, W), or None.
        shared: Images whose channels stay equal, (B,) bool.
        samples: Samples for each measurement.
        seed: Seed of all random streams.

    >>> y, problem = torch.tensor([0.2, 0.7]).view(2, 1, 1, 1), Problem("identity", 0.1)
    >>> inputs = prepare(y, problem, None, lambda problem: None, samples=3)
    >>> len(inputs), inputs.select([0, 3, 5])[0].flatten()  # samples 0, 1, 2 of images 0, 1, 1
    (6, tensor([0.2000, 0.7000, 0.7000]))
    """

    y: Tensor
    problem: Problem
    shape: tuple[int, ...]
    init: Tensor | None
    shared: Tensor
    samples: int
    seed: int

    def __len__(self) -> int:
        return self.samples * len(self.y)

    def select(self, entries: Sequence[int]) -> tuple[Tensor, Problem, Tensor | None]:
        """Return measurements, problem and starting images of some entries of the batch."""
        images = self._images(entries)
        init = None if self.init is None else self.init[list(entries)]
        if images == list(range(len(self.y))):  # no copy of what may be one very large image
            return self.y, self.problem, init
        return self.y[images], self.problem.index_select(images), init

    def generator(self, entries: Sequence[int], restart: int = 0) -> PerImageGenerator:
        """Return the random streams of some entries; restart 0 is the run without restarts."""
        images, path = self._images(entries), (restart,) if restart else ()
        index = self.problem.index or range(len(self.y))
        streams = PerImageGenerator.join(
            PerImageGenerator(
                *(self.seed, [index[image]], StreamId.SOLVER, entry // len(self.y), *path),
                device=self.y.device,
            )
            for entry, image in zip(entries, images, strict=True)
        )
        shared = self.shared[images]
        if not bool(shared.any()):
            return streams
        return cast(PerImageGenerator, SharedChannelGenerator(streams, shared, self.shape[0]))

    def equalize(self, x: Tensor, entries: Sequence[int]) -> Tensor:
        """Give images (N, C, H, W) whose channels have to be equal their first channel."""
        shared = self.shared[self._images(entries)]
        return torch.where(shared.view(-1, 1, 1, 1), x[:, :1], x)

    def _images(self, entries: Sequence[int]) -> list[int]:
        return [entry % len(self.y) for entry in entries]


def prepare(
    y: Tensor,
    problem: Problem,
    prior: Any,
    check: Callable[[Problem], None],
    *,
    samples: int = 1,
    seed: int = 0,
    init: Tensor | Literal["posterior"] | None = None,
    posterior: Any = None,
    nan: Literal["refuse", "mask"] = "refuse",
) -> Inputs:
    """Check what a user gives a solver, and bring it to the form that solvers take.

    Args:
        y: Measurements (B, ...), in units of [0, 1] images.
        problem: Operator and noise; of images 0..B-1 unless it is bound to others.
        prior: The prior; its `shape` and `channels` are used where it has them.
        check: Called with the bound problem; raises InputError where the solver cannot handle it.
        samples: Samples for each measurement, a whole number from 1 to 100000.
        seed: Seed of all random streams.
        init: Starting images (B, C, H, W), "posterior" or None.
        posterior: An object with `sample(y, problem, n, seed)`, for init="posterior".
        nan: "mask" treats pixels of y that are not finite as hidden.

    Raises:
        InputError: Shapes do not fit, y is not finite, or an argument is out of its range.

    >>> y, problem = torch.zeros(2, 1, 4, 4), Problem("sr:average,factor=2", 0.1)
    >>> inputs = prepare(y, problem, None, lambda problem: None, samples=3)
    >>> len(inputs), inputs.shape
    (6, (1, 8, 8))
    """
    if y.ndim < 2 or not len(y) or not y.is_floating_point():
        raise InputError(
            f"y is {y.dtype} of shape {tuple(y.shape)}: give floats (B, ...), one entry an image"
        )
    SAMPLES.check("samples", samples)
    shape = _image_shape(y, problem, prior, init)
    size = 4.0 * samples * len(y) * math.prod(shape)
    check_total_memory(f"{samples} samples of {len(y)} images", size, "ask for fewer at a time")
    problem = _bind(y, problem, shape)
    y, problem = without_missing(y, problem, nan, shape)
    _check_shape(y, problem, shape)
    check(problem)
    start = _starting_images(y, problem, init, posterior, samples, seed, shape)
    shared = equal_channels(y, shape[0] if getattr(prior, "channels", None) == 1 else 0)
    if isinstance(init, Tensor):
        shared = shared & equal_channels(init, shape[0])
    y, problem = whiten(y, problem)
    return Inputs(y, problem, shape, start, shared, samples, seed)


def _image_shape(y: Tensor, problem: Problem, prior: Any, init: Any) -> tuple[int, ...]:
    """Find the shape (C, H, W) of the images: from init, else the prior, else the operator."""
    if isinstance(init, Tensor):
        return tuple(init.shape[-3:])
    known = getattr(prior, "shape", None)
    if known is not None and problem.operator.y_shape(known) == tuple(y.shape[1:]):
        return tuple(known)
    return tuple(problem.operator.x_shape(y.shape[1:]))


def _bind(y: Tensor, problem: Problem, shape: tuple[int, ...]) -> Problem:
    """Bind the problem to the images 0..B-1, unless it is bound to others already."""
    problem = problem.to(y.device)
    if problem.index is None:
        return problem.bind(range(len(y)), shape)
    if len(problem.index) != len(y):
        raise InputError(
            f"the problem is bound to {len(problem.index)} images but y has {len(y)}: bind it"
            " with bind() or index_select(), or leave it unbound"
        )
    return problem


def _check_shape(y: Tensor, problem: Problem, shape: tuple[int, ...]) -> None:
    expected = tuple(problem.operator.y_shape(shape))
    if expected != tuple(y.shape[1:]):
        raise InputError(
            f"expected measurements of shape {expected}, which operator"
            f" '{problem.operator.spec}' makes of images {shape}, got {tuple(y.shape[1:])}"
        )
    lost = (~problem.operator.apply_mask(y).isfinite()).flatten(1).any(1)
    if bool(lost.any()):
        raise InputError(
            f"measurement {int(lost.nonzero()[0, 0])} has values that are not finite: hide them"
            " with a mask (inpaint:file) or replace them"
        )


def _starting_images(
    y: Tensor,
    problem: Problem,
    init: Tensor | str | None,
    posterior: Any,
    samples: int,
    seed: int,
    shape: tuple[int, ...],
) -> Tensor | None:
    """Return the starting images of all entries (samples x B, C, H, W), or None."""
    if init is None:
        return None
    if isinstance(init, Tensor):
        if init.shape != (len(y), *shape):
            raise InputError(
                f"init has shape {tuple(init.shape)}: give one image for each of the {len(y)}"
                " measurements"
            )
        return init.to(y).repeat(samples, *[1] * len(shape))
    if init != "posterior":
        raise InputError(f"init '{init}' is unknown: give images, 'posterior' or None")
    if posterior is None:
        raise InputError("init='posterior' needs a posterior: give posterior=")
    return posterior.sample(y, problem, samples, seed=seed).to(y).flatten(0, 1)
