"""A few measurements of a run that differ from each other, kept in its folder for its page.

The page of a run shows the user's own images, also long after the data have moved. So `learn`
keeps a few of them in `examples.safetensors`: whole images, or for a run on crops the part of a
capture that varies most.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from ..errors import InputError, reason
from ..io.atomic import write
from ..io.crops import Crops
from ..io.datasets import Source
from ..io.noise_maps import NoiseMaps
from ..io.weights import opened
from ..missing import with_missing
from ..operators.cropped import on_numbered_crops
from ..operators.crops import Crop
from ..operators.weighted import Weighted
from ..problem import Problem
from ..whitening import whiten

__all__ = ["Examples", "are_kept", "choose_examples", "distinct"]

FILE = "examples.safetensors"
COUNT = 4  # examples of a run
CANDIDATES = 48  # measurements that they are chosen from
SIDE = 256  # pixels to a side of a part of a capture
MOST = 2**22  # numbers in all examples of a run; larger images have none


@dataclass(frozen=True)
class Examples:
    """A few measurements with what binds a problem to them.

    Attributes:
        y: Measurements (N, ...).
        numbers: Their numbers in the set.
        crops: Where they lie in their images, for parts of captures; empty for whole images.
        hidden: 1 where a measurement is missing, (N, 1, h, w), or None.
        weights: What the measurements are multiplied with so that their noise is that of the
            problem everywhere, (N, 1 or C, h, w), for noise maps; or None.

    >>> examples = Examples(torch.rand(2, 1, 8, 8), [3, 7])
    >>> Path("shown").mkdir()
    >>> examples.save(Path("shown"))
    >>> found = Examples.load(Path("shown"))
    >>> torch.equal(found.y, examples.y), found.problem(Problem("identity", 0.1)).index
    (True, [3, 7])
    """

    y: Tensor
    numbers: Sequence[int]
    crops: Sequence[Crop] = ()
    hidden: Tensor | None = None
    weights: Tensor | None = None

    def white(self, problem: Problem) -> tuple[Tensor, Problem]:
        """Return measurements with the noise of a problem of whole images, and theirs.

        Under noise maps they are weighted, and noise that depends on the brightness is whitened.

        >>> weights = torch.full((1, 1, 4, 4), 2.0)
        >>> y, bound = Examples(torch.ones(1, 1, 4, 4), [3], weights=weights).white(
        ...     Problem("identity", 0.1)
        ... )
        >>> float(y.mean()), float(bound.A(torch.ones(1, 1, 4, 4)).mean()), bound.sigma
        (2.0, 2.0, 0.1)
        """
        bound = self.problem(problem)
        if self.weights is None:
            return self.y, bound
        weights = self.weights.expand_as(self.y)
        operator = Weighted(bound.operator, weights)
        return whiten(weights * self.y, bound._with(operator, bound.index))

    def problem(self, problem: Problem) -> Problem:
        """Return a problem of whole images, bound to the examples."""
        operator = problem.operator
        if not self.crops and self.hidden is not None:
            lost = (image.flatten().nonzero()[:, 0] for image in self.hidden)
            operator = with_missing(operator, dict(zip(self.numbers, lost, strict=True)))
            problem = Problem(operator, problem.noise)
        if not self.crops or (operator.spec == "identity" and self.hidden is None):
            return problem.bind(self.numbers, operator.x_shape(self.y.shape))
        side = operator.x_shape(self.y.shape)[-1]
        places, hidden = list(self.crops), self.hidden
        operator = on_numbered_crops(
            operator,
            side,
            lambda number: places[number],
            lambda numbers: None if hidden is None else hidden[list(numbers)],
        )
        found = Problem(operator, problem.noise)
        return found.bind(range(len(self.y)), operator.x_shape(self.y.shape))

    def save(self, run: Path) -> None:
        """Write the examples into a run folder, atomically."""
        tensors = {"y": self.y.contiguous()}
        if self.hidden is not None:
            tensors["hidden"] = self.hidden.contiguous()
        if self.weights is not None:
            tensors["weights"] = self.weights.contiguous()
        about = {"numbers": list(self.numbers), "crops": [asdict(crop) for crop in self.crops]}
        write(run / FILE, save(tensors, {"examples": json.dumps(about)}))

    @classmethod
    def load(cls, run: Path) -> "Examples | None":
        """Read the examples of a run; None if it has none.

        Raises:
            InputError: The file is damaged.
        """
        file = run / FILE
        if not file.exists():
            return None
        try:
            with opened(file) as tensors:
                about = json.loads((tensors.metadata() or {})["examples"])
                y = tensors.get_tensor("y")
                held = set(tensors.keys())
                hidden, weights = (
                    tensors.get_tensor(name) if name in held else None
                    for name in ("hidden", "weights")
                )
            crops = [Crop(**values) for values in about["crops"]]
            found = cls(y.float(), [int(n) for n in about["numbers"]], crops, hidden, weights)
            if y.ndim != 4 or len(found.numbers) != len(y) or len(crops) not in (0, len(y)):
                raise ValueError("the numbers do not fit the images")
            if weights is not None and not (
                (weights.shape[0], *weights.shape[2:]) == (y.shape[0], *y.shape[2:])
                and weights.shape[1] in (1, y.shape[1])
                and bool((weights.isfinite() & (weights > 0)).all())
            ):
                raise ValueError("the weights do not fit the images")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{file} is damaged ({reason(error)}): delete it; the page then shows no images"
            ) from error
        return found


def choose_examples(
    y: Tensor | Source,
    problem: Problem,
    missing: Mapping[int, Tensor] | None = None,
    maps: NoiseMaps | None = None,
) -> Examples:
    """Choose a few measurements that differ from each other.

    Args:
        y: Measurements (N, C, H, W), with zeros where they are missing, or random crops.
        problem: The problem of whole images, without missing pixels.
        missing: For each number of whole images the positions (row * W + column) of missing
            pixels; crops know theirs.
        maps: The noise maps of the measurements, or None.

    Returns:
        At most `COUNT` examples.

    Raises:
        InputError: They would be larger than `MOST` numbers; see `are_kept`.

    >>> y = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.1, 0.8]).view(6, 1, 1, 1).expand(6, 1, 8, 8)
    >>> choose_examples(y, Problem("identity", 0.1)).numbers  # the most usual, then the others
    [0, 4, 5, 1]
    """
    if not are_kept(y):
        raise InputError(f"examples of {tuple(y.shape[1:])} are larger than {MOST} numbers")
    if isinstance(y, Crops):
        return _parts(y, problem, maps)
    candidates = torch.linspace(0, len(y) - 1, min(len(y), CANDIDATES)).long().unique()
    images = y[candidates.to(y.device)].cpu().float()
    numbers = [int(candidates[i]) for i in distinct(images, COUNT)]
    chosen = y[torch.tensor(numbers, device=y.device)].cpu().float()
    lost = {place: missing[n] for place, n in enumerate(numbers) if missing and n in missing}
    weights = None if maps is None else maps.weights(numbers)[0].clone()
    if not lost:
        return Examples(chosen, numbers, weights=weights)
    hidden = torch.zeros(len(chosen), 1, *chosen.shape[-2:])
    for place, pixels in lost.items():
        hidden[place].view(-1)[pixels.cpu()] = 1
    return Examples(chosen, numbers, (), hidden, weights)


def are_kept(y: Tensor | Source) -> bool:
    """Tell whether examples of measurements are small enough to be kept with a run.

    >>> [are_kept(torch.zeros(1, 1, side, 1).expand(1, 1, side, side)) for side in (64, 4096)]
    [True, False]
    """
    channels, *size = y.shape[1:]
    if isinstance(y, Crops) and y.operator.spec == "identity":
        size = [_side(y)] * 2
    return COUNT * channels * math.prod(size) <= MOST


def _side(crops: Crops) -> int:
    """Return the side of examples of captures: that of the crops, or larger where tiles fit."""
    if crops.operator.spec != "identity":
        return crops.side
    shortest = min(min(size) for size in crops.sizes)
    return max(crops.side, min(SIDE, shortest // 8 * 8))


def _parts(crops: Crops, problem: Problem, maps: NoiseMaps | None) -> Examples:
    """Choose parts of captures that differ, each where its capture varies most."""
    captures, operator, side = crops.captures, problem.operator, _side(crops)
    grid, every = crops.operator.crop_grid, range(len(captures.sizes))
    step = max(1, len(every) // CANDIDATES)
    candidates = every[::step][:CANDIDATES]
    places = [(position, *_busiest(crops, position, side, grid)) for position in candidates]
    found = Crops(captures, operator, side, False, crops.seed, places)
    found.lost = crops.lost
    images = found[torch.arange(len(places))].cpu()
    chosen = distinct(images, COUNT)
    hidden = found.hidden(chosen)
    places_of = [found.place(number) for number in chosen]
    numbers = [place.number for place in places_of]
    weights = None if maps is None else maps.crops(found, chosen).clone()
    return Examples(images[chosen].clone(), numbers, places_of, hidden, weights)


def _busiest(crops: Crops, position: int, side: int, grid: int) -> tuple[int, int]:
    """Return row and column, in pixels of x, of the square of a capture that varies most."""
    measured = side // crops.factor
    height, width = crops.captures.sizes[position]
    step = max(grid // crops.factor, measured // 2)
    best, place = -1.0, (0, 0)
    for row in range(0, max(1, height - measured + 1), step):
        for column in range(0, max(1, width - measured + 1), step):
            size = min(measured, height), min(measured, width)
            part = torch.as_tensor(crops.captures.region(position, row, column, *size))
            value = float(part.float().nan_to_num(0.0).var())
            if value > best:
                best, place = value, (row * crops.factor, column * crops.factor)
    row, column = (n // grid * grid for n in place)
    return row, column


def distinct(images: Tensor, count: int) -> list[int]:
    """Choose images that differ: the most usual one first, then always the farthest from all.

    Images are compared by their mean, standard deviation, mean absolute gradient and brightest
    hundredth, each in units of its standard deviation over the images.

    Args:
        images: (N, C, H, W).
        count: How many; all of them if there are fewer.

    Returns:
        Their positions, distinct.

    >>> images = torch.tensor([0.5, 0.5, 0.1, 0.8]).view(4, 1, 1, 1).expand(4, 1, 4, 4)
    >>> distinct(images, 3)
    [0, 2, 3]
    """
    flat = images.flatten(1).nan_to_num(0.0)
    steps = images.nan_to_num(0.0)
    gradient = steps.diff(dim=-1).abs().flatten(1).mean(1) if images.shape[-1] > 1 else flat[:, 0]
    bright = flat.sort(1).values[:, int(0.99 * (flat.shape[1] - 1))]
    features = torch.stack([flat.mean(1), flat.std(1, correction=0), gradient, bright], 1).double()
    features = (features - features.mean(0)) / features.std(0, correction=0).clamp_min(1e-12)
    chosen = [int(features.square().sum(1).argmin())]
    while len(chosen) < min(count, len(images)):
        gaps = torch.cdist(features, features[chosen]).min(1).values
        gaps[chosen] = -1.0
        chosen.append(int(gaps.argmax()))
    return chosen
