"""Random streams that do not depend on how images are batched.

Every draw in unmurk comes from a `torch.Generator` that is identified by a path of integers, such
as (seed, image number, purpose, sample number). Two paths give independent streams, because
`numpy.random.SeedSequence` mixes them; one path always gives the same stream. So a result is the
same for any batch size, and a training step is the same after a restart.

Where several processes share a batch, each process draws for the whole batch and keeps its own
images (`ShardedGenerator`). So the numbers that an image gets do not depend on the number of
processes.
"""

import enum
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .bounds import SEED

__all__ = [
    "PerImageGenerator",
    "ShardedGenerator",
    "StreamId",
    "binomial",
    "binomial_pairs",
    "generator",
    "global_batch",
    "host_integers",
    "integers",
    "lent",
    "normal",
    "permutation",
    "poisson",
    "uniform",
]

NORMAL = 128  # expected counts from which a binomial law is taken as normal


class StreamId(enum.IntEnum):
    """The number that stands for a purpose in the path of a random stream.

    Streams of one image have the path (seed, image number, id, ...), streams of a whole run
    (seed, id, ...). The ids of the latter are small, or larger than any image number. Two
    purposes may share a number where their paths differ in length, or where they never meet in
    one computation; the second name is then an alias of the first. The numbers are part of the
    results: a changed number changes every draw of its purpose.

    >>> purposes = StreamId.MASK, StreamId.NOISE
    >>> draws = [torch.rand(2, generator=generator(0, 5, purpose)) for purpose in purposes]
    >>> torch.equal(*draws)  # image 5 has a stream of its own for each purpose
    False
    """

    PATCHES = 1
    """Places of the patches of the sliced Wasserstein distance."""
    DIRECTIONS = 2
    """Directions of the sliced Wasserstein distance."""
    PRIOR = 21
    """Samples of an exact prior."""
    POSTERIOR = 22
    """Samples of an exact posterior."""
    COMPONENT = 23
    """Component of a mixture that a sample of the prior comes from."""
    POSTERIOR_COMPONENT = 24
    """Component of a mixture that a sample of the posterior comes from."""
    EXAMPLE = 25
    """Parameters of the exact priors that serve as examples."""
    WAVELET_PRIOR = 26
    """Gaussian part of the samples of the heavy-tailed wavelet prior."""
    GAUSSIAN_PRIOR = 26
    """Samples of the Gaussian prior that is fitted to measurements."""
    WAVELET_SCALE = 27
    """Scales of the samples of the heavy-tailed wavelet prior."""
    GIBBS = 28
    """Chains of the Gibbs sampler."""
    GIBBS_SUBSET = 29
    """Choice among the pooled states of the Gibbs chains."""
    MASK = 7001
    """Parameters of operators that are drawn: masks, columns of k-space, random matrices."""
    NOISE = 7002
    """Noise of simulated measurements."""
    SOLVER = 7003
    """Draws of solvers."""
    FLOWDIFF_E_STEP = 7004
    """Posterior samples in the E-step of FlowDiff."""
    NONLINEAR_BLUR = 7004
    """Weights of the network of the nonlinear blur."""
    GAUSSIAN_POSTERIOR = 7005
    """Posterior samples while the Gaussian prior is fitted."""
    E_STEP = 7006
    """Posterior samples in the E-step of EM, and samples that a flow is distilled from."""
    CROP = 7007
    """Place and orientation of a random crop."""
    REPEATS = 7008
    """The captures of a scene that a training step uses."""
    CLEAN = 7009
    """The clean images of a training step."""
    HALF_SCALE = 7010
    """The restorations at half scale of a training step, and the parts of them."""
    STEP = 0xFFFF0001
    """Random numbers of a training step."""
    BATCH = 0xFFFF0002
    """Choice of the images of a training batch."""
    INIT = 0xFFFF0003
    """Initial weights of networks."""
    GAUSSIAN_PROBE = 0xFFFF0005
    """Probes of an operator for the Gaussian prior."""
    GAUSSIAN_SUBSET = 0xFFFF0006
    """Choice of the measurements in a round of fitting the Gaussian prior."""
    GAUSSIAN_START = 0xFFFF0007
    """Image that the first guess of the Gaussian prior is scaled with."""
    VALIDATION = 0xFFFF0008
    """Draws for the validation losses."""
    CALIBRATION = 0xFFFF0009
    """Probes and splits for the calibration of error bars."""


HOST = 0x5DEECE66D  # separates the draws on the host from those on the device


def generator(seed: int, *path: int, device: str | torch.device = "cpu") -> torch.Generator:
    """Return the generator at a path of integers below a seed.

    Args:
        seed: Seed of the whole computation.
        path: Non-negative integers: image numbers, a `StreamId`, sample numbers.
        device: Where the generator draws.

    Raises:
        InputError: The seed is not a whole number from 0 to 9223372036854775807.

    >>> import torch
    >>> from unmurk.rng import generator
    >>> torch.randint(100, (3,), generator=generator(0, 1)).tolist()
    [28, 25, 45]
    """
    seed = SEED.check("seed", seed)
    # the length goes first: numpy reads (seed, i) and (seed, i, 0) as the same
    state = np.random.SeedSequence([len(path), seed, *path]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


class PerImageGenerator:
    """One random stream for each image of a batch.

    Args:
        seed: Seed of the whole computation.
        index: Numbers of the images, one for each image of the batch.
        path: Further numbers of every image's path, such as a `StreamId` and a sample number.
        device: Where the draws are made.

    >>> import torch
    >>> from unmurk.rng import PerImageGenerator
    >>> both = PerImageGenerator(0, [5, 9]).randn(1, 2, 2)
    >>> torch.equal(both[1:], PerImageGenerator(0, [9]).randn(1, 2, 2))
    True
    """

    def __init__(
        self,
        seed: int,
        index: Iterable[int],
        *path: int,
        device: str | torch.device = "cpu",
    ) -> None:
        self.generators = [generator(seed, int(i), *path, device=device) for i in index]

    @classmethod
    def join(cls, streams: "Iterable[PerImageGenerator]") -> "PerImageGenerator":
        """Concatenate the streams of several batches."""
        joined = cls(0, ())
        joined.generators = [g for s in streams for g in s.generators]
        return joined

    def __len__(self) -> int:
        return len(self.generators)

    def _stack(self, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        draws = [draw(shape, generator=g, device=g.device) for g in self.generators]
        return draws[0][None] if len(draws) == 1 else torch.stack(draws)

    def randn(self, *shape: int) -> Tensor:
        """Draw standard normal numbers (B, ...), with `shape` for each image."""
        return self._stack(torch.randn, shape)

    def rand(self, *shape: int) -> Tensor:
        """Draw numbers uniform on [0, 1), (B, ...), with `shape` for each image."""
        return self._stack(torch.rand, shape)

    def poisson(self, rates: Tensor) -> Tensor:
        """Draw Poisson counts of these rates (B, ...), which are on the device of the streams."""
        pairs = zip(rates, self.generators, strict=True)
        return torch.stack([torch.poisson(rate, generator=g) for rate, g in pairs])


# ---------------------------------------------------------------- one generator for a whole batch


class ShardedGenerator(torch.Generator):
    """A generator for a batch of which this process holds the images rank, rank + ranks, ...

    The functions below return the draws of one process, but advance the generator by the draws of
    all processes. So the generators of all processes stay in the same state. `ShardedGenerator.of`
    makes one.

    Attributes:
        rank: Number of the process, 0, ..., ranks - 1.
        ranks: Number of processes, each with equally many images.

    >>> import torch
    >>> from unmurk.rng import ShardedGenerator, generator, normal
    >>> whole = normal((4, 2), generator(0))
    >>> second = normal((2, 2), ShardedGenerator.of(generator(0), rank=1, ranks=2))
    >>> torch.equal(second, whole[1::2])
    True
    """

    rank: int
    ranks: int

    @classmethod
    def of(cls, generator: torch.Generator, rank: int, ranks: int) -> "ShardedGenerator":
        """Return a generator in the state of another, for one of several processes."""
        share = cls(generator.device)
        share.set_state(generator.get_state())
        share.rank, share.ranks = rank, ranks
        return share


def global_batch(n: int, generator: torch.Generator | None) -> int:
    """Return the size of the whole batch, of which this process holds n images.

    >>> global_batch(4, None), global_batch(4, ShardedGenerator.of(generator(0), 0, 2))
    (4, 8)
    """
    return n * generator.ranks if isinstance(generator, ShardedGenerator) else n


def _own_images(draws: Tensor, generator: torch.Generator | None) -> Tensor:
    return (
        draws[generator.rank :: generator.ranks]
        if isinstance(generator, ShardedGenerator)
        else draws
    )


def _drawn(
    draw: Callable[..., Tensor],
    shape: Sequence[int],
    generator: torch.Generator | None,
    **kind: Any,
) -> Tensor:
    if generator is not None:
        kind.setdefault("device", generator.device)
    size = (global_batch(shape[0], generator), *shape[1:])
    return _own_images(draw(size, generator=generator, **kind), generator)


def normal(shape: Sequence[int], generator: torch.Generator | None, **kind: Any) -> Tensor:
    """Draw standard normal numbers (B, ...); `kind` holds device and dtype.

    >>> normal((2, 3), generator(0)).shape
    torch.Size([2, 3])
    """
    return _drawn(torch.randn, shape, generator, **kind)


def uniform(shape: Sequence[int], generator: torch.Generator | None, **kind: Any) -> Tensor:
    """Draw numbers uniform on [0, 1), (B, ...); `kind` holds device and dtype.

    >>> u = uniform((2, 3), generator(0))
    >>> u.shape, bool((0 <= u).all() and (u < 1).all())
    (torch.Size([2, 3]), True)
    """
    return _drawn(torch.rand, shape, generator, **kind)


def integers(high: int, shape: Sequence[int], generator: torch.Generator, **kind: Any) -> Tensor:
    """Draw integers uniform on 0, ..., high - 1, (B, ...).

    >>> integers(1, (3,), generator(0))
    tensor([0, 0, 0])
    """
    return _drawn(partial(torch.randint, high), shape, generator, **kind)


def host_integers(high: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw integers uniform on 0, ..., high - 1, (B, ...), on the CPU, without waiting for a GPU.

    With a generator of a GPU, two calls give the same numbers; see `lent`.

    >>> host_integers(1, (3,), generator(0)).tolist()
    [0, 0, 0]
    """
    own = generator.device.type == "cpu"
    return integers(high, shape, generator if own else lent(generator))


def lent(generator: torch.Generator) -> torch.Generator:
    """Return a CPU generator that depends on another's seed, but not on its state.

    >>> device = generator(0)
    >>> before = torch.rand(2, generator=lent(device))
    >>> _ = torch.rand(9, generator=device)  # changes the state, not the seed
    >>> torch.equal(before, torch.rand(2, generator=lent(device)))
    True
    """
    host = torch.Generator().manual_seed((generator.initial_seed() ^ HOST) % 2**63)
    if isinstance(generator, ShardedGenerator):
        return ShardedGenerator.of(host, generator.rank, generator.ranks)
    return host


def permutation(
    shape: Sequence[int], generator: torch.Generator | None, device: torch.device | str
) -> Tensor:
    """Draw a random order of all numbers of the whole batch.

    Args:
        shape: Shape (B, ...) of the images of this process.
        generator: The generator, or None for torch's own.
        device: Where the draw is made.

    Returns:
        The part of the order that belongs to the images of this process, of this shape.

    >>> permutation((2, 3), generator(0), "cpu").flatten().sort().values
    tensor([0, 1, 2, 3, 4, 5])
    """
    size = (global_batch(shape[0], generator), *shape[1:])
    order = torch.randperm(math.prod(size), generator=generator, device=device)
    return _own_images(order.view(size), generator)


def poisson(rates: Tensor, generator: torch.Generator) -> Tensor:
    """Draw Poisson counts of these rates (B, ...).

    >>> poisson(torch.zeros(1, 3), generator(0))
    tensor([[0., 0., 0.]])
    """
    return _image_by_image(torch.poisson, rates, generator)


def binomial(counts: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Draw how many of these counts (B, ...) succeed, each with probability `share`.

    >>> binomial(torch.tensor([[2.0, 5.0]]), 1.0, generator(0))
    tensor([[2., 5.]])
    """

    def draw(image: Tensor, generator: torch.Generator) -> Tensor:
        return torch.binomial(image, torch.full_like(image, share), generator=generator)

    return _image_by_image(draw, counts, generator)


def binomial_pairs(counts: Tensor, share: float, generator: torch.Generator) -> Tensor:
    r"""Draw two binomial numbers for each count, as far as possible one below and one above.

    They are the quantiles of u and of 1 - u for one uniform u (Hammersley and Morton, 1956, Proc.
    Cambridge Philos. Soc. 52), so each by itself is binomial. Where the rarer outcome is expected
    more than `NORMAL` times, the binomial law is replaced by the normal one of its mean and
    variance.

    Args:
        counts: Whole numbers n of 0 or more, (B, ...), in double precision.
        share: Probability p, between 0 and 1.
        generator: Source of u.

    Returns:
        The successes: (2 B, ...), those of u first.

    >>> counts = torch.full((1, 1000), 20.0, dtype=torch.float64)
    >>> one, other = binomial_pairs(counts, 0.8, generator(0))
    >>> bool(torch.corrcoef(torch.stack([one, other]))[0, 1] < -0.9)
    True
    """
    rare = min(share, 1 - share)
    u = uniform(counts.shape, generator, dtype=torch.float64, device=counts.device)
    u = torch.cat([u, 1 - u]).clamp(1e-16, 1 - 1e-16)
    counts = torch.cat([counts, counts])
    expected = rare * counts
    few = expected <= NORMAL
    most = float(torch.where(few, expected, 0).max())
    chance = (counts * math.log1p(-rare)).exp()  # of k of the rarer outcome
    below, drawn = chance.clone(), torch.zeros_like(u)
    for k in range(math.ceil(most + 9 * most**0.5 + 9)):
        drawn += u > below
        chance *= (counts - k).clamp_min(0) * (rare / (1 - rare) / (k + 1))
        below += chance
    spread = (expected * (1 - rare)).sqrt()
    drawn = torch.where(few, drawn, expected + spread * torch.special.ndtri(u))
    drawn = torch.minimum(drawn, counts)
    return drawn if rare == share else counts - drawn


def _image_by_image(
    draw: Callable[..., Tensor], given: Tensor, generator: torch.Generator
) -> Tensor:
    """Draw numbers whose law depends on the images (B, ...).

    The number of random bits that such a draw uses depends on the image, which other processes do
    not know. So every image has a generator of its own.
    """
    seeds = integers(2**62, (len(given),), generator).tolist()
    streams = [torch.Generator(given.device).manual_seed(seed) for seed in seeds]
    return torch.stack([draw(x, generator=g) for x, g in zip(given, streams, strict=True)])
