"""Noise maps of the commands: read, checked, and applied to batches of images."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .data import run_config

if TYPE_CHECKING:
    import torch

    from ..io.noise_maps import NoiseMaps
    from ..io.scale import Scale
    from ..problem import Problem

__all__ = ["check_maps", "given_maps", "kept", "mapped_scene", "run_maps"]


def check_maps(command: Any) -> None:
    """Raise InputError for options of a command that cannot go with its noise maps."""
    if command.noise_maps is None:
        return
    for given, name, why in (
        (command.repeats > 1, "--repeats", "the maps are of single captures"),
        (command.flat is not None, "--flat", "it divides the images, and not the maps"),
        ("auto" in str(command.noise), "--noise auto", "the maps hold the noise, and weights need"
         " a number"),
        (getattr(command, "simulate", False), "--simulate", "the maps belong to measured images"),
    ):  # fmt: skip
        if given:
            raise InputError(f"{name} cannot go with --noise-maps: {why}")


def given_maps(
    command: Any, problem: "Problem", scale: "Callable[[], Scale]"
) -> "tuple[NoiseMaps | None, Problem]":
    """Return the noise maps of a command, and the problem with their level.

    Args:
        command: The command.
        problem: Operator and noise as they are given.
        scale: Returns the scale of the images.
    """
    if command.noise_maps is None:
        return None, problem
    from ..io.noise_maps import maps_for
    from ..problem import Problem

    maps = maps_for(command.noise_maps, problem, scale().gain)
    return maps, Problem(problem.operator, maps.level)


def run_maps(
    command: Any, problem: "Problem", scale: "Callable[[], Scale]"
) -> "tuple[NoiseMaps | None, Problem]":
    """Return the noise maps of a command that restores by a run, and the problem.

    Args:
        command: The command.
        problem: The problem of the run.
        scale: Returns the scale of the images.
    """
    from ..noise import in_units
    from ..problem import Problem

    if command.noise_maps is None:
        if command.noise is None and "noise maps" in run_config(command.prior):
            print(
                f"'{command.prior}' was learned with noise maps, and these images have none: their"
                f" noise is taken as {problem.level:g} everywhere (--noise-maps gives their own)",
                file=sys.stderr,
            )
        return None, problem
    noise = in_units(str(command.noise or 0), scale())
    return given_maps(command, Problem(problem.operator, noise), scale)


def kept(maps: "NoiseMaps | None") -> dict[str, Any]:
    """Return what a result depends on of its noise maps."""
    return {} if maps is None else {"noise maps": maps.record()}


def mapped_scene(
    maps: "NoiseMaps | None",
    y: "torch.Tensor",
    problem: "Problem",
    numbers: list[int],
    shape: tuple[int, ...],
    nan: Any,
) -> "tuple[torch.Tensor, Problem]":
    """Return measurements with white noise, and their problem; see `restoring.scene_of`.

    Args:
        maps: The noise maps, or None.
        y, problem, numbers, shape, nan: See `restoring.scene_of`.
    """
    from ..operators import Weighted
    from .commands.restoring import scene_of

    if maps is None:
        return scene_of(y, problem, numbers, shape, nan)
    found = maps.batch(numbers, y.shape[1], (y.shape[-2], y.shape[-1]))
    weights, hidden = (value.to(y.device) for value in found)
    if bool(hidden.any()):
        y, nan = y.masked_fill(hidden, float("nan")), "mask"
    y, bound = scene_of(y, problem, numbers, shape, nan)
    weights = weights.expand_as(y)
    return weights * y, bound._with(Weighted(bound.operator, weights), bound.index)
