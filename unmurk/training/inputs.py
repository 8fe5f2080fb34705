"""What a run learns from: measurements and clean images, checked, in crops or whole.

`learn` takes data of many kinds. The functions of this module bring them to tensors or sources,
hide pixels without a measurement, and refuse what no method can learn from.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bounds import Whole
from ..errors import InputError, remark
from ..io.axes import ALL, Selection
from ..io.capture_set import Captures
from ..io.captures import as_captures, sizes_in
from ..io.crops import Crops, crop_side, croppable, cut_by_default, side_within
from ..io.datasets import Source, as_source
from ..io.formats.pictures import Nan
from ..io.gaps import gaps
from ..io.images import ImageSet
from ..io.noise_maps import NoiseMaps, maps_for
from ..io.scale import Scale, Spans, check_units
from ..io.weighed import Hidden, Weighed
from ..missing import with_missing
from ..noise import Gaussian
from ..operators import Operator, as_operator
from ..operators.crops import Crop
from ..operators.weighted import NumberedWeights, Weighted
from ..problem import Problem
from ..whitening import whiten
from .baselines import Clean, Noisy
from .learner import Learner
from .registry import METHODS, name_of
from .trainer import Settings

__all__ = [
    "captures_in_line",
    "check_data",
    "check_helpers",
    "check_light",
    "check_takes",
    "clean_images",
    "file_ends",
    "file_span",
    "is_clean",
    "measurements",
    "on_crops",
    "scale_record",
    "weighed",
    "with_gaps",
    "with_maps",
]

REPEATS = Whole(1, 1000)
_EMPTY = (
    "noise map {} has no number above 0, and images are learned from whole, by their numbers:"
    " remove it and its image"
)
CHECKED = 128  # images whose values must be in units of [0, 1]
BRIGHTER, DARK = 8.0, 0.02  # ratio of means of clean images and measurements, and least mean


def measurements(
    data: Any,
    operator: Operator,
    settings: Settings,
    span: Spans,
    nan: Nan,
    scratch: Path,
    repeats: int = 1,
    select: Selection = ALL,
) -> Tensor | Source:
    """Return measurements as a tensor or a source: crops of large images, else whole images.

    Raises:
        InputError: The data cannot be read, or crops are asked for and do not fit the operator.

    >>> identity, images = as_operator("identity"), [torch.rand(2, 1, n, n) for n in (28, 128)]
    >>> [measurements(y, identity, Settings(), None, "refuse", Path(".")).shape for y in images]
    [torch.Size([2, 1, 28, 28]), (1048576, 1, 64, 64)]
    """
    crop = settings.crop
    if isinstance(data, list | tuple) and len({tuple(image.shape) for image in data}) == 1:
        data = torch.stack([torch.as_tensor(image) for image in data])
    if not crop and not (
        crop is None and croppable(operator) and _cut_by_default(data, span, nan, select)
    ):
        if settings.augment:
            raise InputError("augmentation needs crops: give their side too (--crop 64)")
        if isinstance(data, Captures | list | tuple):
            raise InputError(
                f"whole images of '{operator.spec}' have one size: give them as one array, or "
                "learn from crops"
            )
        return as_source(data, span, nan, select)
    if not croppable(operator):
        operator.on_crops([Crop(0, 0, 0, 1, 1)], 1)  # says why there are none
    captures = as_captures(data, span, nan, scratch, select)
    side = side_within(captures, operator, crop) if crop else crop_side(captures, operator)
    if crop and side < crop:
        remark(f"no image is as large as crops of {crop}: learning from crops of {side}")
    return Crops(captures, operator, side, settings.augment, settings.seed, repeats=repeats)


def with_maps(
    noise_maps: Any,
    data: Any,
    y: Tensor | Source,
    problem: Problem,
    learner: Learner,
    select: Selection = ALL,
) -> tuple[Tensor | Source, Problem, NoiseMaps | None]:
    """Return measurements, problem and noise maps, where there are any.

    Pixels without a measurement become hidden ones, and the noise is that of the maps.

    Args:
        noise_maps: As for `learn`.
        data: As for `learn`; its scale is that of the maps.
        y: The measurements.
        problem: Operator and noise; a noise above 0 belongs to weights.
        learner: The learner.
        select: Axes and channels of the measurements, which files of maps may have too.

    Raises:
        InputError: The maps do not fit the measurements, the noise or the method.

    >>> maps = torch.tensor([[[[0.1, 0.2, 0.4]]]])
    >>> y, learner = torch.ones(1, 1, 1, 3), METHODS["flowdiff"]()
    >>> problem = with_maps(maps, y, y, Problem("identity", 0.0), learner)[1]
    >>> round(problem.sigma, 4)  # the median
    0.2
    """
    if noise_maps is None:
        return y, problem, None
    if is_clean(learner):
        raise InputError("clean images cannot have noise maps: leave out --noise-maps")
    scale = _scale_of(data, y)
    gain = 1.0 if scale is None else scale.gain
    maps = maps_for(noise_maps, problem, gain, select.beside())
    if isinstance(y, Crops):
        captures, positions = y.captures, y.captures.numbers
        maps.check(captures.sizes, captures.channels, positions, captures.total)
        if not maps.empty.isdisjoint(positions):
            raise InputError(_EMPTY.format(min(maps.empty)))
        if maps.hides:
            y.lost = lambda position, place: maps.absent(positions[position], place)
    else:
        if getattr(y, "skipped", ()) or getattr(data, "skipped", ()):
            raise InputError(
                "images were left out, and noise maps go by the numbers of all images: remove"
                " these images and their maps"
            )
        maps.check([(int(y.shape[-2]), int(y.shape[-1]))] * len(y), int(y.shape[1]))
        if maps.empty:
            raise InputError(_EMPTY.format(min(maps.empty)))
        y = Hidden(y, maps) if maps.hides else y
    return y, problem if maps.relative else Problem(problem.operator, maps.level), maps


def weighed(
    y: Tensor | Source,
    problem: Problem,
    maps: NoiseMaps | None,
    shape: tuple[int, int, int],
    repeats: int = 1,
) -> tuple[Tensor | Source, Problem]:
    """Return measurements with white noise of one level, and their problem.

    Noise maps are known. The variance of other noise that depends on the brightness is estimated
    from neighboring pixels (`whitening`), unless A = I and nothing is hidden: there the learners
    take such noise as it is.

    Args:
        y: Measurements (N, ...), zero where they are hidden.
        problem: Operator and noise.
        maps: Noise maps, or None.
        shape: Shape (C, H, W) of the images that are learned.
        repeats: Number of captures of each scene.

    Raises:
        InputError: Repeated captures have noise that would be estimated.

    >>> maps = maps_for(torch.tensor([[[[0.1, 0.2, 0.4]]]]), Problem("identity", 0.0))
    >>> y, problem = weighed(torch.ones(1, 1, 1, 3), Problem("identity", 0.2), maps, (1, 1, 3))
    >>> y[:].flatten(), problem.bind([0], (1, 1, 3)).A(torch.ones(1, 1, 1, 3)).flatten()
    (tensor([2.0000, 1.0000, 0.5000]), tensor([2.0000, 1.0000, 0.5000]))
    """
    gaussian = isinstance(problem.noise, Gaussian)
    if maps is None and (gaussian or problem.operator.spec == "identity"):
        return y, problem
    if repeats > 1 and not gaussian:
        raise InputError(
            f"noise '{problem.noise.spec}' is not Gaussian: repeated captures have it only with"
            " operator identity, without hidden pixels and with even noise: give --noise"
            " gaussian,auto or a number, or --flat-noise even"
        )

    def weights(numbers: Sequence[int]) -> Tensor | None:
        if maps is None:
            return None
        return maps.crops(y, numbers) if isinstance(y, Crops) else maps.weights(numbers)[0]

    @lru_cache(maxsize=1)  # a batch asks twice: for the weights of y and those of A
    @torch.inference_mode(False)  # they outlive the mode of who asks first
    def white(numbers: tuple[int, ...]) -> Tensor:
        known = weights(numbers)
        if gaussian and known is not None:
            return known
        chosen = torch.tensor(list(numbers))
        measured, bound = y[chosen.to(y.device)].cpu(), problem.bind(numbers, shape)
        if known is not None:
            measured = known * measured
            bound = bound._with(Weighted(bound.operator, known.expand_as(measured)), bound.index)
        operator = whiten(measured, bound)[1].operator
        assert isinstance(operator, Weighted)
        return operator.weights

    def found(numbers: Sequence[int]) -> Tensor:
        return white(tuple(numbers))

    return Weighed(y, found), Problem(NumberedWeights(problem.operator, found), problem.level)


def check_helpers(learner: Learner, repeats: int, clean: Any) -> None:
    """Raise InputError for repeated captures, or clean images, that a method cannot use.

    >>> check_helpers(METHODS["em"](), repeats=2, clean=None)
    >>> check_helpers(METHODS["ambient"](), repeats=2, clean=None)
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: ambient does not learn from repeated captures (--repeats): take ...
    """
    REPEATS.check("repeats (--repeats)", repeats)
    for given, word, what in (
        (repeats > 1, "takes_repeats", "repeated captures (--repeats)"),
        (clean is not None, "takes_clean", "clean images beside the measurements (--clean)"),
    ):
        if given and not getattr(learner, word):
            others = ", ".join(name for name, cls in METHODS.items() if getattr(cls, word))
            raise InputError(
                f"{name_of(learner)} does not learn from {what}: take one of {others}"
            )


def captures_in_line(data: Any, repeats: int) -> Any:
    """Return captures (S, N, C, H, W) as (S N, C, H, W); other data as they are.

    >>> captures_in_line(torch.zeros(5, 2, 1, 8, 8), repeats=2).shape
    torch.Size([10, 1, 8, 8])
    """
    if not isinstance(data, Tensor | np.ndarray) or data.ndim != 5 or repeats == 1:
        return data
    if data.shape[1] != repeats:
        raise InputError(
            f"captures of shape {tuple(data.shape)} are {data.shape[1]} of each scene, not"
            f" {repeats}: give repeats={data.shape[1]}"
        )
    return data.reshape(-1, *data.shape[2:])


def clean_images(
    clean: Any,
    y: Tensor | Source,
    shape: tuple[int, ...],
    span: Spans,
    scratch: Path,
    select: Selection = ALL,
) -> Tensor | Source | None:
    """Return clean images of the shape that is learned: crops of them, or whole images.

    Args:
        clean: The images, as for `data` of `learn`, or None.
        y: The measurements.
        shape: Shape (C, H, W) of the images that are learned.
        span: File values of black and white.
        scratch: See `measurements`.
        select: Axes and channels of the measurements, which files of clean images may have too.

    Raises:
        InputError: The images cannot be read, or have another shape.

    >>> y, clean = torch.zeros(5, 1, 8, 8), torch.rand(3, 1, 8, 8)
    >>> clean_images(clean, y, (1, 8, 8), None, Path(".")).shape
    torch.Size([3, 1, 8, 8])
    """
    if clean is None:
        return None
    select = replace(select.beside(), repeats=1)
    if isinstance(y, Crops):
        captures = as_captures(clean, span, "refuse", scratch, select)
        if any(min(size) < y.side for size in captures.sizes):
            raise InputError(
                f"the clean images are smaller than the crops of {y.side}: give larger ones, or"
                " smaller crops (--crop)"
            )
        found: Tensor | Source = Crops(
            captures, as_operator("identity"), y.side, y.augment, y.seed
        )
    else:
        found = as_source(clean, span, "refuse", select)
    if tuple(found.shape[1:]) != shape or not len(found):
        raise InputError(
            f"the clean images have the shape {tuple(found.shape[1:])}, those that are learned"
            f" {shape}: give clean images of that shape"
        )
    index = torch.linspace(0, len(found) - 1, min(len(found), CHECKED)).long()
    check_units("the clean set", found[index], 0.0)
    return found


def check_light(
    clean: Tensor | Source | None, y: Tensor | Source, problem: Problem, shape: tuple[int, ...]
) -> None:
    """Raise InputError if clean images are far brighter or darker than the measurements.

    Clean images are read in the range of the measurements, and files of another unit would be so
    many times too bright or too dark.

    >>> y, problem = torch.full((4, 1, 8, 8), 0.5), Problem("identity", 0.1)
    >>> check_light(torch.full((4, 1, 8, 8), 0.4), y, problem, (1, 8, 8))
    >>> check_light(torch.full((4, 1, 8, 8), 0.002), y, problem, (1, 8, 8))
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: the clean images have the mean 0.002 where that of the...
    """
    if clean is None or not problem.linear or not problem.operator.pictorial:
        return
    count = min(len(clean), len(y), CHECKED)
    index = torch.arange(count)
    bound = problem.bind(index.tolist(), shape)
    x, measured = (part[index].cpu() for part in (clean, y))
    means = [abs(float(bound.A(x).mean())), abs(float(measured.mean()))]
    if max(means) > BRIGHTER * max(min(means), DARK):
        raise InputError(
            f"the clean images have the mean {means[0]:.3g} where that of the measurements is"
            f" {means[1]:.3g}: save them in the numbers of the measurements (the same number means"
            " the same light), or give --range BLACK WHITE"
        )


def _cut_by_default(data: Any, span: Spans, nan: Nan, select: Selection) -> bool:
    """Whether data are learned from in crops if nothing else is asked for."""
    if isinstance(data, str | Path):
        return cut_by_default(sizes_in(Path(data), select))
    if isinstance(data, Captures):
        return cut_by_default(data.sizes)
    if isinstance(data, list | tuple):
        return cut_by_default([tuple(image.shape[-2:]) for image in data])
    y = as_source(data, span, nan, select)
    return y.ndim == 4 and cut_by_default([(int(y.shape[-2]), int(y.shape[-1]))])


def on_crops(crops: Crops, problem: Problem, learner: Learner) -> tuple[Problem, Learner]:
    """Return the problem of the crops, and the learner with a solver if crops hide pixels.

    >>> operator = as_operator("blur:gaussian,sigma=1")
    >>> crops = Crops(as_captures(torch.rand(2, 1, 100, 120)), operator, 64)
    >>> problem, _ = on_crops(crops, Problem(operator, 0.1), METHODS["flowdiff"]())
    >>> problem.bind([3, 5], (1, 64, 64)).A(torch.ones(2, 1, 64, 64)).shape
    torch.Size([2, 1, 64, 64])
    """
    if crops.masked and is_clean(learner):
        raise InputError(
            "clean images have no missing pixels: leave out those that have, or that are smaller "
            f"than the crops of {crops.side}"
        )
    found = crops.problem(problem)
    return found, learner if found is problem else _with_solver(learner, problem)


def is_clean(learner: Learner) -> bool:
    """Whether a learner is given clean images in place of measurements.

    >>> is_clean(Clean()), is_clean(Noisy())
    (True, False)
    """
    return isinstance(learner, Clean) and not isinstance(learner, Noisy)


def check_data(y: Tensor | Source, problem: Problem, clean: bool) -> None:
    """Raise InputError for measurements or noise that no method can learn from.

    >>> check_data(torch.rand(2, 1, 8, 8), Problem("identity", 0.1), clean=False)
    >>> check_data(torch.rand(2, 8, 8), Problem("identity", 0.1), clean=False)
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: measurements must be (N, C, H, W) with N > 0, not (2, 8, 8)
    """
    if y.ndim != 4 or not len(y):
        raise InputError(f"measurements must be (N, C, H, W) with N > 0, not {tuple(y.shape)}")
    if problem.level <= 0 and not clean:
        raise InputError("learning needs the noise level: give a noise above 0")
    if problem.operator.pictorial:
        index = torch.linspace(0, len(y) - 1, min(len(y), CHECKED)).long()
        part = y.read(index.tolist()) if isinstance(y, Source) else y[index]
        scale = y.scale if isinstance(y, Source) else None
        check_units("the set", part, 0.0 if clean else problem.level, scale)


def check_takes(learner: Learner, problem: Problem, given: Problem) -> None:
    """Raise InputError for a problem that the learner cannot learn from.

    Args:
        learner: The learner.
        problem: The problem that it would learn, with hidden pixels and white noise.
        given: The problem as it was given, for the message.

    >>> denoising, blur = Problem("identity", 0.1), Problem("blur:gaussian,sigma=1", 0.1)
    >>> check_takes(METHODS["ambient"](), denoising, denoising)
    >>> check_takes(METHODS["ambient"](), blur, blur)
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: ambient cannot learn from blur:... with noise ...: take one of ...
    """
    if learner.takes(problem):
        return
    others = [name for name in METHODS if name != "clean" and METHODS[name].takes(problem)]
    hint = f"take one of {', '.join(others)}" if others else "no method can"
    what = f"{given.operator.spec} with noise {given.noise.spec}"
    if problem.operator.spec != given.operator.spec:
        what += " that varies over the pixels (--flat makes it so, --flat-noise even does not)"
        what += ", or with hidden pixels"
    raise InputError(f"{name_of(learner)} cannot learn from {what}: {hint}")


def with_gaps(
    y: Tensor | Source, problem: Problem, nan: Nan, learner: Learner
) -> tuple[Tensor | Source, Problem, Learner]:
    """Hide pixels that are not finite: return such measurements, problem and learner.

    >>> y, problem = torch.tensor([[[[1.0, torch.nan]]]]), Problem("identity", 0.1)
    >>> y, problem, _ = with_gaps(y, problem, "mask", METHODS["flowdiff"]())
    >>> seen = problem.bind([0], (1, 1, 2)).A(torch.ones(1, 1, 1, 2))
    >>> y.flatten().tolist(), seen.flatten().tolist()
    ([1.0, 0.0], [1.0, 0.0])
    """
    y, pixels = gaps(y, nan)
    if not pixels:
        return y, problem, learner
    if is_clean(learner):
        raise InputError("clean images have no missing pixels: leave these images out")
    empty = next((n for n, lost in pixels.items() if len(lost) == math.prod(y.shape[-2:])), None)
    if empty is not None:
        raise InputError(f"measurement {empty} has no pixel with a finite value: leave it out")
    learner = _with_solver(learner, problem)
    return y, Problem(with_missing(problem.operator, pixels), problem.noise), learner


def _with_solver(learner: Learner, problem: Problem) -> Learner:
    """Return a learner that has a solver where hidden pixels make a mask of the identity."""
    if getattr(learner, "solver", ...) is None and problem.operator.spec == "identity":
        from ..solvers import Draws

        return replace(learner, solver=Draws("diffpir", steps=16))  # type: ignore[call-arg]
    return learner


def _scale_of(data: Any, y: Tensor | Source) -> Scale | None:
    """Return the scale of the files behind measurements; None if there are none."""
    held = y if isinstance(y, Source) else data if isinstance(data, ImageSet) else None
    return None if held is None else held.scale


def scale_record(data: Any, y: Tensor | Source) -> dict[str, Any]:
    """Return what config.json says of the files: type, format, and range if it needs one.

    >>> data = ImageSet(torch.rand(2, 1, 8, 8), ["a", "b"], Scale.of("uint16", (0, 4095)))
    >>> scale_record(data, data.images)
    {'file_type': 'uint16', 'file_format': 'npy', 'range': [0.0, 4095.0]}
    """
    scale = _scale_of(data, y)
    if scale is None:
        return {}
    found: dict[str, Any] = {"file_type": scale.dtype, "file_format": scale.format}
    if scale.span is None:
        return found
    pairs = [list(pair) for pair in scale.span.pairs]
    return found | {"range": pairs if scale.channels else pairs[0]}


def file_ends(data: Any, y: Tensor | Source) -> Spans:
    """Return the numbers of black and white of files, for files of any type that belong to them.

    >>> data = ImageSet(torch.rand(2, 1, 8, 8), ["a", "b"], Scale.of("uint16", (0, 4095)))
    >>> file_ends(data, data.images)
    Span(black=0.0, white=4095.0, dtype=None)
    """
    span = file_span(data, y)
    return None if span is None else span._replace(dtype=None)


def file_span(data: Any, y: Tensor | Source) -> Any:
    """Return file values of black and white and their type, if the type is not enough.

    >>> data = ImageSet(torch.rand(2, 1, 8, 8), ["a", "b"], Scale.of("uint16", (0, 4095)))
    >>> file_span(data, data.images)
    Span(black=0.0, white=4095.0, dtype='uint16')
    """
    scale = _scale_of(data, y)
    return None if scale is None else scale.span
