"""Noise maps of the commands: read, checked, scaled, and applied to batches of images."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import InputError, remark
from .data import Sample, run_config, selection_of

if TYPE_CHECKING:
    import torch

    from ..io.capture_set import Captures
    from ..io.noise_maps import NoiseMaps
    from ..io.scale import Scale
    from ..noise_scale import NoiseScale
    from ..problem import Problem

__all__ = [
    "NEAR",
    "NO_MAP",
    "check_maps",
    "given_maps",
    "is_scaled",
    "kept",
    "noise_of",
    "run_maps",
    "scene_of",
]

NEAR = 1.25
"""Noise over that of the maps, or its inverse, from which on a remark says so."""

NO_MAP = "its noise map has no number above 0"
"""Why --skip-bad leaves out an image."""

AUTO = ("auto", "gaussian,auto")


def check_maps(command: Any) -> None:
    """Raise InputError for options of a command that cannot go with its noise maps."""
    if command.noise_maps is None:
        return
    noise = str(getattr(command, "noise", None) or "").replace(" ", "")
    for given, name, why in (
        ("auto" in noise and noise not in AUTO, f"--noise {noise}", "the maps hold the noise, of"
         " which --noise auto estimates one factor"),
        (getattr(command, "simulate", False), "--simulate", "the maps belong to measured images"),
    ):  # fmt: skip
        if given:
            raise InputError(f"{name} cannot go with --noise-maps: {why}")


def is_scaled(command: Any) -> bool:
    """Whether a command multiplies its noise maps by a factor that the images give."""
    return command.noise_maps is not None and "auto" in str(command.noise)


def noise_of(command: Any) -> str:
    """Return the text of the noise that a command was given beside its noise maps."""
    return "0" if is_scaled(command) else str(command.noise or 0)


def given_maps(
    command: Any,
    problem: "Problem",
    scale: "Callable[[], Scale]",
    sample: Callable[[], Sample],
    flat: "torch.Tensor | None" = None,
    known: "dict[str, Any] | None" = None,
    compare: bool = False,
) -> "tuple[NoiseMaps | None, Problem]":
    """Return the noise maps of a command, and the problem with their level.

    Args:
        command: The command.
        problem: Operator and noise as they are given.
        scale: Returns the scale of the images.
        sample: Returns images from which the factor of the maps is estimated.
        flat: Sensitivity (C, H, W) of a flat field that the images were divided by, or None.
        known: What a run keeps of the maps that it was learned with; their factor applies to maps
            of the same kind. None: the maps are as they are.
        compare: Whether to say how far off maps are that are not scaled.
    """
    from ..io.map_scale import measured_scale
    from ..io.noise_maps import flat_maps, kind_of, maps_for
    from ..problem import Problem

    if command.noise_maps is None:
        return (None, problem) if flat is None else (flat_maps(flat), problem)
    weights = kind_of(command.noise_maps)[0] == "weights"
    automatic = is_scaled(command)
    unit = automatic or known is not None
    given = Problem(problem.operator, float(weights)) if unit else problem
    more = (selection_of(command, getattr(command, "prior", None)).beside(), command.skip_bad)
    maps = maps_for(command.noise_maps, given, scale().gain, *more).under(flat)
    if automatic:
        found = measured_scale(maps, *_first(sample, problem))
        maps = maps.scaled(found.factor)
        remark(_said(found, weights))
    elif known is not None:
        maps = maps.scaled(_factor(known, maps))
    elif compare:
        try:
            found = measured_scale(maps, *_first(sample, problem))
        except InputError:  # too few flat patches: nothing is known
            return maps, Problem(problem.operator, maps.level)
        if not 1 / NEAR < found.factor < NEAR:
            remark(f"{_said(found, False)}: --noise auto scales the maps")
    return maps, Problem(problem.operator, maps.level)


def _first(
    sample: Callable[[], Sample], problem: "Problem"
) -> "tuple[torch.Tensor | Captures, Any, Sequence[int] | None]":
    found = sample()
    return found.y, problem.operator, found.numbers


def _said(found: "NoiseScale", weights: bool) -> str:
    if weights:
        return f"noise at the mean weight, estimated from the images: {found}"
    return f"the noise of the images is {found} times that of their noise maps"


def _factor(known: dict[str, Any], maps: "NoiseMaps") -> float:
    """Return the factor that a run keeps, for its kind of maps; for weights, for their unit."""
    if known.get("kind") != maps.kind:
        if maps.kind == "weights":
            raise InputError(
                "the run was learned with other noise maps than weights: give --noise at their"
                " mean, or auto"
            )
        return 1.0
    numbers = [known.get(name, 1.0) for name in ("factor", "sigma", "mean")]
    if not all(type(n) in (int, float) and 0 < n < math.inf for n in numbers):
        raise InputError("the run has no readable scale of its noise maps: give --noise auto")
    factor, sigma, mean = map(float, numbers)
    if maps.kind != "weights":
        return factor
    return factor * sigma * math.sqrt(mean / maps.mean)


def run_maps(
    command: Any,
    problem: "Problem",
    scale: "Callable[[], Scale]",
    sample: Callable[[], Sample],
    flat: "torch.Tensor | None" = None,
) -> "tuple[NoiseMaps | None, Problem]":
    """Return the noise maps of a command that restores by a run, and the problem.

    Args:
        command: The command.
        problem: The problem of the run.
        scale, sample, flat: See `given_maps`.
    """
    from ..noise_units import in_units
    from ..problem import Problem

    known = run_config(command.prior).get("noise maps")
    known = known if isinstance(known, dict) else None
    if command.noise_maps is None:
        learned = known is not None and known.get("kind") != "flat"
        if command.noise is None and learned:
            remark(
                f"'{command.prior}' was learned with noise maps, and these images have none: their"
                f" noise is taken as {problem.level:g} everywhere (--noise-maps gives their own)"
            )
        return given_maps(command, problem, scale, sample, flat)
    noise = in_units(noise_of(command), scale())
    given = Problem(problem.operator, noise)
    known = known if command.noise is None else None
    return given_maps(command, given, scale, sample, flat, known)


def kept(maps: "NoiseMaps | None") -> dict[str, Any]:
    """Return what a result depends on of its noise maps."""
    return {} if maps is None or maps.relative else {"noise maps": maps.record()}


def scene_of(
    maps: "NoiseMaps | None",
    y: "torch.Tensor",
    problem: "Problem",
    numbers: list[int],
    shape: tuple[int, ...],
    nan: Any,
) -> "tuple[torch.Tensor, Problem]":
    """Return the measurement of each image or scene, without missing values, and its problem.

    Args:
        maps: The noise maps, which make the noise white; or None.
        y: Measurements (B, C, H, W), or all captures of scenes (B, N, C, H, W).
        problem: How one measurement was made, not bound to images.
        numbers: Numbers of the images or scenes; capture j of scene i has the number i N + j.
        shape: Shape (C, H, W) of the images.
        nan: See `missing.without_missing`.
    """
    from ..missing import without_missing
    from ..operators import Weighted
    from ..repeats import combined_captures, grouped
    from ..whitening import whiten

    repeats, captures = 0, numbers
    if y.ndim == 5:
        repeats = y.shape[1]
        captures = [i * repeats + j for i in numbers for j in range(repeats)]
        y = y.flatten(0, 1)
    weights = None
    if maps is not None:
        found = maps.batch(captures, y.shape[-3], (y.shape[-2], y.shape[-1]))
        weights, hidden = (value.to(y.device) for value in found)
        if bool(hidden.any()):
            y, nan = y.masked_fill(hidden, float("nan")), "mask"
    y, bound = without_missing(y, problem.to(y.device).bind(captures, shape), nan, shape)
    if weights is not None:
        weights = weights.expand_as(y)
        y, bound = weights * y, bound._with(Weighted(bound.operator, weights), bound.index)
    if repeats:
        y, bound = combined_captures(grouped(y, repeats), bound, numbers, shape)
    return (y, bound) if maps is None else whiten(y, bound)
