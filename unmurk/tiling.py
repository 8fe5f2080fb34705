r"""Images larger than those a network was trained on: overlapping tiles, blended smoothly.

Tiles :math:`T_k` of one size cover an image, neighbors overlap, and windows :math:`w_k \ge 0` on
them add up to 1 at every pixel p (a partition of unity). One denoiser of the whole image is

.. math:: D(x, \sigma)(p) = \sum_k w_k(p)\, D_k(x|_{T_k}, \sigma)(p)

with :math:`D_k` the network's denoiser on a tile. The blend is computed at every noise level, so a
solver sees one smooth field and any operator acts on the whole image: the data have no seams. The
draws of the flow,

.. math:: x(p) = \sum_k w_k(p)\, x_k(p), \qquad x_k = m + s \odot g(z|_{T_k}),

are blended in the same way. z is one noise field for the whole image, so overlapping tiles draw
nearly the same images there. The mean of the draws is the blend of the tiles' means. Their
deviations add up as those of one variable, :math:`\mathrm{std} = \sum_k w_k\, \mathrm{std}_k`.

Along an axis, a window is 0 over the first quarter of the overlap, where a tile lacks most of its
surroundings. It rises as :math:`\sin^2` over the next half, and is 1 from there on. At the border
of the image it does not fall. The windows are divided by their sum over the tiles of an axis, so
they add up to 1 for any overlap.

A prior or a posterior of gray images treats the channels of a color image separately.

No tiling library keeps a partition of unity inside the denoiser at every noise level, hence the
code here.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .devices import filled
from .diffusion.prior import Prior
from .errors import InputError, size_text
from .flows.conditioner import known
from .flows.posterior import Posterior
from .operators.weighted import Weighted
from .problem import Problem
from .progress import each
from .rng import generator
from .solvers.inputs import equal_channels

__all__ = ["NoiseField", "TiledPosterior", "TiledPrior", "Tiling", "posterior_for", "prior_for"]

PIXELS = 2**17  # most pixels in one batch of tiles
BLOCK = 64  # side of the blocks that a noise field draws, in pixels
FLOW_STEP = 4  # the flow transforms blocks of 4 x 4 pixels
OTHER_STEP = 8  # for networks that do not state how often they halve an image


class Tiling:
    """The places of the tiles of an image, and their windows.

    Args:
        size: Height and width of the image.
        tile: Side of a tile. On a shorter axis the tiles are as long as fits.
        overlap: Least overlap of neighbors, a multiple of `step`.
        step: Sides and places of the tiles are multiples of it, except the place of the last tile.

    Attributes:
        tile: Height and width of a tile.
        corners: Top and left of every tile, row by row.

    Raises:
        InputError: A side of the image is below `step`, or the overlap is as large as the tile.

    >>> tiling = Tiling((16, 24), tile=16, overlap=8, step=4)
    >>> tiling.tile, tiling.corners
    ((16, 16), [(0, 0), (0, 8)])
    """

    def __init__(self, size: Sequence[int], tile: int, overlap: int, step: int) -> None:
        if tile < step or not 0 <= overlap <= tile - step:
            raise InputError(
                f"tiles of {tile} pixels that overlap by {overlap}: give a tile of at least "
                f"{max(step, overlap + step)} pixels"
            )
        if min(size) < step:
            raise InputError(
                f"an image of {size_text(size)} pixels is too small: give at least {step} a side"
            )
        self.size = (size[0], size[1])
        self.tile = (_side(size[0], tile, step), _side(size[1], tile, step))
        pairs = zip(self.size, self.tile, strict=True)
        rows, columns = (_starts(n, t, overlap, step) for n, t in pairs)
        self._tops, self._lefts = rows, columns
        self.corners = [(top, left) for top in rows for left in columns]
        self._down = _windows(rows, self.size[0], self.tile[0], overlap)
        self._across = _windows(columns, self.size[1], self.tile[1], overlap)

    def window(self, corner: tuple[int, int], like: Tensor) -> Tensor:
        """Return the window w of the tile at a corner, shape (H, W) of the tile."""
        down = self._down[self._tops.index(corner[0])]
        across = self._across[self._lefts.index(corner[1])]
        return torch.outer(down, across).to(like)

    def crop(self, x: Tensor, corner: tuple[int, int]) -> Tensor:
        """Return the tile of images (..., H, W) at a corner."""
        top, left = corner
        return x[..., top : top + self.tile[0], left : left + self.tile[1]]

    def chunks(self, images: int) -> list[list[tuple[int, tuple[int, int]]]]:
        """Return (image, corner) of all tiles of a batch, in lists of at most PIXELS pixels."""
        places = [(image, corner) for image in range(images) for corner in self.corners]
        size = max(1, PIXELS // (self.tile[0] * self.tile[1]))
        return [places[first : first + size] for first in range(0, len(places), size)]

    def gather(self, x: Tensor, places: list[tuple[int, tuple[int, int]]]) -> Tensor:
        """Collect tiles of images (B, C, H, W) into a batch of tiles."""
        return torch.stack([self.crop(x[image], corner) for image, corner in places])

    def add(self, total: Tensor, tiles: Tensor, places: list[tuple[int, tuple[int, int]]]) -> None:
        """Add tiles, each times its window, to images (B, C, H, W)."""
        for tile, (image, corner) in zip(tiles, places, strict=True):
            self.crop(total[image], corner).add_(tile * self.window(corner, tile))


def _side(n: int, tile: int, step: int) -> int:
    return min(tile, n) // step * step


def _starts(n: int, tile: int, overlap: int, step: int) -> list[int]:
    """Return the first pixels of the tiles along an axis, evenly spread."""
    if n <= tile:
        return [0]
    overlap = min(overlap, tile - step)  # a short side limits the tile
    count = max(2, math.ceil((n - overlap) / (tile - overlap)))
    stride = math.ceil((n - tile) / (count - 1) / step) * step
    return sorted({min(k * stride, n - tile) for k in range(count)})


def _windows(starts: list[int], n: int, tile: int, overlap: int) -> Tensor:
    """Compute the windows of the tiles along an axis, (tiles, length of a tile), float64."""
    place = torch.arange(tile, dtype=torch.float64) + 0.5
    least = min((a + tile - b for a, b in zip(starts, starts[1:], strict=False)), default=overlap)
    least = max(min(least, tile), 1)

    def rise(distance: Tensor) -> Tensor:
        part = ((distance - least / 4) / (least / 2)).clamp(0, 1)
        return (math.pi / 2 * part).sin().square()

    total = torch.zeros(n, dtype=torch.float64)
    windows = []
    for start in starts:
        window = torch.ones(tile, dtype=torch.float64)
        if start > 0:
            window = window * rise(place)
        if start + tile < n:
            window = window * rise(tile - place)
        total[start : start + tile] += window
        windows.append(window)
    pairs = zip(windows, starts, strict=True)
    return torch.stack([window / total[start : start + tile] for window, start in pairs])


class TiledPrior:
    """The denoiser of a prior on larger images, blended from tiles.

    Gradients pass through it. Activations are recomputed tile by tile in the backward pass, so
    memory does not grow with the number of tiles.

    Args:
        prior: A `Prior`, or a function (x, sigma) that denoises tiles.
        tile: Side of a tile.
        overlap: Least overlap of neighbors.

    >>> shrink = lambda x, sigma: x / (1 + sigma.view(-1, 1, 1, 1) ** 2)
    >>> x = TiledPrior(shrink, tile=16, overlap=8).denoise(torch.ones(1, 1, 24, 40), 1.0)
    >>> bool((x - 0.5).abs().max() < 1e-6)
    True
    """

    def __init__(self, prior: Any, tile: int, overlap: int) -> None:
        self.prior, self.tile, self.overlap = prior, tile, overlap
        self.step = _halvings(prior) if isinstance(prior, Prior) else OTHER_STEP
        self.channels = prior.shape[0] if isinstance(prior, Prior) else None
        self.sigma_min = float(getattr(prior, "sigma_min", 0.0))
        self.sigma_max = float(getattr(prior, "sigma_max", float("inf")))
        self._sized: dict[tuple[int, int], Callable[..., Tensor]] = {}

    def denoise(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Estimate the clean image D(x, sigma).

        Args:
            x: Noisy images, shape (B, C, H, W).
            sigma: Noise level, a number or (B,).

        Returns:
            Images, shape (B, C, H, W), in the type of x.
        """
        levels = filled(sigma, x).expand(len(x))
        if self.channels == 1 and x.shape[1] > 1:
            levels = levels.repeat_interleave(x.shape[1])
            return self._blend(x.flatten(0, 1)[:, None], levels).reshape(x.shape)
        return self._blend(x, levels)

    __call__ = denoise

    def _blend(self, x: Tensor, sigma: Tensor) -> Tensor:
        tiling = Tiling(x.shape[-2:], self.tile, self.overlap, self.step)
        network = self._network(tiling.tile)
        learning = torch.is_grad_enabled() and x.requires_grad
        total = torch.zeros_like(x)
        for places in each(tiling.chunks(len(x))):
            tiles = tiling.gather(x, places)
            levels = sigma[[image for image, _ in places]]
            if learning:
                clean = checkpoint(network, tiles, levels, use_reentrant=False)
            else:
                clean = network(tiles, levels)
            tiling.add(total, clean, places)
        return total

    def _network(self, tile: tuple[int, int]) -> Callable[..., Tensor]:
        """Return the denoiser of the prior for images of the size of a tile."""
        if not isinstance(self.prior, Prior):
            return getattr(self.prior, "denoise", self.prior)
        if tile not in self._sized:
            shape = (self.prior.shape[0], *tile)
            sized = Prior(self.prior.network, shape, self.prior.scheduler)
            self._sized[tile] = sized.to(self.prior.log_levels.device).eval().denoise
        return self._sized[tile]


class NoiseField:
    """Standard normal noise on an infinite plane, drawn only where it is needed.

    Args:
        channels: Values at every pixel.
        path: Seed, and the further integers of the field's random stream. The block of BLOCK x
            BLOCK pixels at row i, column j comes from the generator at ``(*path, i, j)``.

    >>> field = NoiseField(1, 0, 7)
    >>> whole, part = field.crop(0, 0, 80, 80), field.crop(60, 60, 10, 10)
    >>> bool(torch.equal(whole[:, 60:70, 60:70], part))
    True
    """

    def __init__(self, channels: int, *path: int) -> None:
        self.channels, self.path = channels, path

    def crop(self, top: int, left: int, height: int, width: int) -> Tensor:
        """Return the noise of a rectangle, shape (channels, height, width), on the CPU."""
        rows = range(top // BLOCK, (top + height - 1) // BLOCK + 1)
        columns = range(left // BLOCK, (left + width - 1) // BLOCK + 1)
        parts = [torch.cat([self._block(i, j) for j in columns], 2) for i in rows]
        top, left = top - rows.start * BLOCK, left - columns.start * BLOCK
        return torch.cat(parts, 1)[:, top : top + height, left : left + width]

    def _block(self, i: int, j: int) -> Tensor:
        return torch.randn(self.channels, BLOCK, BLOCK, generator=generator(*self.path, i, j))


class TiledPosterior:
    """The flow q(x | y) on larger images, blended from tiles.

    Args:
        posterior: The flow.
        tile: Side of a tile.
        overlap: Least overlap of neighbors.

    >>> posterior = TiledPosterior(Posterior.create("tiny", (1, 8, 8)), tile=16, overlap=8)
    >>> y, problem = torch.rand(1, 1, 24, 40), Problem("identity", 0.1)
    >>> posterior.sample(y, problem, n=2).shape
    torch.Size([2, 1, 1, 24, 40])
    >>> mean, std = posterior.mean_std(y, problem, n=2)
    >>> torch.allclose(mean, y, atol=1e-4)  # untrained: the mean is A_dagger(y)
    True
    """

    def __init__(self, posterior: Posterior, tile: int, overlap: int) -> None:
        self.posterior, self.tile, self.overlap = posterior, tile, overlap

    @torch.no_grad()
    def sample(
        self,
        y: Tensor,
        problem: Problem,
        n: int = 1,
        seed: int = 0,
        index: Sequence[int] | None = None,
    ) -> Tensor:
        """Draw from q(x | y), shape (n, B, C, H, W); see `Posterior.sample`."""
        start, mask, spread, tiling, numbers = self._look(y, problem, index)
        draws = torch.zeros(n, *start.shape, dtype=start.dtype, device=start.device)
        for places in each(tiling.chunks(len(start))):
            context = self.posterior.read(*self._known(start, mask, spread, tiling, places))
            for k in range(n):
                z = self._noise(tiling, places, numbers, seed, k, start)
                tiling.add(draws[k], self.posterior.transform(z, context)[0], places)
        draws = draws.reshape(n, len(y), -1, *start.shape[-2:])
        return torch.stack([_equalised(draw, y) for draw in draws])

    @torch.no_grad()
    def mean_std(
        self,
        y: Tensor,
        problem: Problem,
        n: int = 16,
        seed: int = 0,
        index: Sequence[int] | None = None,
        calibrated: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Estimate mean and standard deviation of q(x | y), (B, C, H, W) each, from n draws.

        See `Posterior.mean_std`.

        Raises:
            InputError: n is odd or below 2, or the images do not fit the flow.
        """
        if n < 2 or n % 2:
            raise InputError(f"the number of draws is {n}: give an even number of at least 2")
        start, mask, spread, tiling, numbers = self._look(y, problem, index)
        mean, std = torch.zeros_like(start), torch.zeros_like(start)
        for places in each(tiling.chunks(len(start))):
            tiles, inputs = self._known(start, mask, spread, tiling, places)

            def noise(k: int, chosen: Any = places) -> Tensor:
                return self._noise(tiling, chosen, numbers, seed, k, start)

            found = self.posterior.estimate(tiles, inputs, n, noise)
            tiling.add(mean, found[0], places)
            tiling.add(std, found[1], places)
        shape = (len(y), -1, *start.shape[-2:])
        mean, std = _equalised(mean.reshape(shape), y), _equalised(std.reshape(shape), y)
        if calibrated and self.posterior.error_bars is not None:
            std = self.posterior.error_bars.std(std, problem.operator.mask)
        return mean, std

    def _look(
        self, y: Tensor, problem: Problem, index: Sequence[int] | None
    ) -> tuple[Tensor, Tensor | None, Tensor | float, Tiling, list[tuple[int, int]]]:
        """Prepare start images, masks and noise levels; the tiling; number and channel of each.

        The channels of color images become separate images if the flow is one of gray images.
        """
        y, problem = self.posterior.white(y, problem)
        start, mask = self.posterior.first(y, problem), problem.operator.mask
        spread = problem.deviation(y)
        channels, own = start.shape[1], self.posterior.config.channels
        numbers = list(index if index is not None else problem.index or range(len(y)))
        split = channels if own == 1 else 1
        if channels != own and split == 1:
            raise InputError(
                f"expected measurements of images of {own} channels, got {channels}: convert them,"
                " or use another posterior"
            )
        if mask is not None:
            mask = mask.to(start).expand(len(y), 1, *start.shape[-2:])
            mask = mask.repeat_interleave(split, 0)
        if split > 1:
            _apart(problem, start)
            start = start.flatten(0, 1)[:, None]
        if isinstance(spread, Tensor):
            spread = spread.flatten(0, 1)[:, None] if split > 1 else spread.mean(1, keepdim=True)
        tiling = Tiling(start.shape[-2:], self.tile, self.overlap, FLOW_STEP)
        # equal channels get equal noise
        alike = equal_channels(y, split).tolist()
        pairs = zip(numbers, alike, strict=True)
        fields = [(i, 0 if same else c) for i, same in pairs for c in range(split)]
        return start, mask, spread, tiling, fields

    def _known(
        self,
        start: Tensor,
        mask: Tensor | None,
        spread: Tensor | float,
        tiling: Tiling,
        places: Any,
    ) -> tuple[Tensor, Tensor]:
        tiles = tiling.gather(start, places)
        masks = None if mask is None else tiling.gather(mask, places)
        if isinstance(spread, Tensor):
            spread = tiling.gather(spread, places)
        return tiles, known(tiles, masks, spread)

    def _noise(
        self,
        tiling: Tiling,
        places: list[tuple[int, tuple[int, int]]],
        numbers: list[tuple[int, int]],
        seed: int,
        draw: int,
        like: Tensor,
    ) -> Tensor:
        fields = (NoiseField(like.shape[1], seed, *numbers[image], draw) for image, _ in places)
        crops = [
            field.crop(*corner, *tiling.tile)
            for field, (_, corner) in zip(fields, places, strict=True)
        ]
        return torch.stack(crops).to(like)


def _equalised(x: Tensor, y: Tensor) -> Tensor:
    """Make the channels of images exactly equal where those of their measurements are."""
    alike = equal_channels(y, x.shape[1])
    x[alike] = x[alike, :1]
    return x


def _apart(problem: Problem, x: Tensor) -> None:
    """Raise InputError unless the operator acts on every channel separately and alike."""
    operator = problem.operator
    inner = operator.operator if isinstance(operator, Weighted) else operator  # weights of pixels
    full = inner.A(x)
    if full.shape[1] == x.shape[1]:
        parts = [inner.A(x[:, c : c + 1]) for c in range(x.shape[1])]
        if torch.allclose(full, torch.cat(parts, 1), atol=1e-5):
            return
    raise InputError(
        f"operator '{problem.operator.spec}' mixes the {x.shape[1]} channels of an image, and the "
        "posterior is one of gray images: use one of color images, or use solve"
    )


# -- choosing -------------------------------------------------------------------------------------


def prior_for(prior: Prior, shape: Sequence[int], tile: int | None = None) -> Prior | TiledPrior:
    """Adapt a prior to images of a shape: return itself if it fits, else the prior in tiles.

    Args:
        prior: The prior.
        shape: Shape (C, H, W) of the images.
        tile: Side of the tiles; None takes about twice that of the prior's images.

    Raises:
        InputError: The images are smaller than those of a prior that is not of any size, or have
            other channels.

    >>> tiled = prior_for(Prior.create("tiny", (1, 16, 16)), (1, 40, 24))
    >>> tiled.denoise(torch.rand(1, 1, 40, 24), 0.1).shape
    torch.Size([1, 1, 40, 24])
    """
    if tile is None and tuple(shape) == prior.shape:
        return prior
    _larger("prior", shape, prior)
    return TiledPrior(prior, *_tile(prior.shape, tile, _halvings(prior)))


def posterior_for(
    posterior: Posterior, shape: Sequence[int], tile: int | None = None
) -> Posterior | TiledPosterior:
    """Adapt a posterior to images of a shape: return itself if it fits, else it in tiles.

    Args:
        posterior: The posterior.
        shape: Shape (C, H, W) of the images.
        tile: Side of the tiles; None takes about twice that of the posterior's images.

    Raises:
        InputError: The images are smaller than those of a posterior that is not of any size, or
            have other channels.

    >>> posterior = Posterior.create("tiny", (1, 8, 8))
    >>> posterior_for(posterior, (1, 8, 8)) is posterior
    True
    >>> tiled = posterior_for(posterior, (3, 24, 16))  # in tiles, channel by channel
    >>> tiled.sample(torch.rand(1, 3, 24, 16), Problem("identity", 0.1)).shape
    torch.Size([1, 1, 3, 24, 16])
    """
    if tile is None and tuple(shape) == posterior.shape:
        return posterior
    _larger("posterior", shape, posterior)
    return TiledPosterior(posterior, *_tile(posterior.shape, tile, FLOW_STEP))


def _halvings(prior: Prior) -> int:
    """Return the size of an image over that of the coarsest scale of the prior's network."""
    widths = getattr(getattr(prior.network, "config", None), "block_out_channels", None)
    return OTHER_STEP if widths is None else 2 ** (len(widths) - 1)


def _tile(shape: Sequence[int], tile: int | None, step: int) -> tuple[int, int]:
    """Return side and overlap of the tiles of a network trained on images of a shape."""
    trained = max(shape[-2:])
    side = (2 * trained if tile is None else tile) // step * step
    if side < 2 * step:
        raise InputError(f"tile is {tile}: give at least {2 * step} pixels")
    return side, min(trained, side) // 2 // step * step


def _larger(what: str, shape: Sequence[int], model: Prior | Posterior) -> None:
    trained = model.shape
    fits = trained[-3] in (1, shape[-3])
    small = shape[-2] < trained[-2] or shape[-1] < trained[-1]
    if not fits or (small and not model.any_size):
        text = [size_text(s[-3:]) for s in (trained, shape)]
        raise InputError(
            f"the {what} needs images of at least {text[0]} (channels, height, width), got"
            f" {text[1]}: crop, resize or convert them, or use another {what}"
        )
