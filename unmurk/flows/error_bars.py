r"""Calibrated error bars: a monotone map from predicted to true standard deviations.

A flow that is learned from corrupted images predicts standard deviations that are too small or too
large. `evaluation.calibration` measures by how much, without clean images. The result is kept
beside the weights of the posterior as a map :math:`s \mapsto c(s)` from the predicted standard
deviation s of a pixel to its calibrated one. Between the knots :math:`(s_k, c_k)` the map is
linear in :math:`\log s` and :math:`\log c`; beyond them the ratio c / s stays that of the nearest
knot.

The errors of restored pixels are no Gaussians, so an interval of probability 0.9 does not reach
1.645 standard deviations to each side. Every knot therefore has a `width`, the half-width of that
interval in units of c, taken from the shape of the flow's own draws.

Pixels that a mask hides have a map of their own.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..io.json_files import read_object, typed

__all__ = ["FILE", "Curve", "ErrorBars"]

FILE = "error_bars.json"
FORMAT = 1
MOST = 64  # knots of a map
SMALLEST, LARGEST = 1e-9, 1e9  # numbers of a map
LEVEL = 0.9  # probability that the widths of the knots belong to
NORMAL = 1.6448536269514722  # half-width of that interval of a standard normal distribution


@dataclass(frozen=True)
class Curve:
    """A monotone map from predicted to calibrated standard deviations, for one kind of pixels.

    Args:
        predicted: Predicted standard deviations of the knots, increasing.
        calibrated: Calibrated standard deviations of the knots, not decreasing.
        width: Half-width of the interval of probability 0.9 at the knots, in units of the
            calibrated standard deviation.

    Raises:
        InputError: The numbers are no such map.

    >>> curve = Curve((0.1, 0.2), (0.2, 0.3), (1.6, 1.6))
    >>> curve.std(torch.tensor([0.05, 0.1, 0.2, 0.4]))
    tensor([0.1000, 0.2000, 0.3000, 0.6000])
    """

    predicted: tuple[float, ...]
    calibrated: tuple[float, ...]
    width: tuple[float, ...]

    def __post_init__(self) -> None:
        lists = (self.predicted, self.calibrated, self.width)
        count = len(self.predicted)
        numbers = [number for values in lists for number in values]
        rising = all(a < b for a, b in zip(self.predicted, self.predicted[1:], strict=False))
        level = all(a <= b for a, b in zip(self.calibrated, self.calibrated[1:], strict=False))
        inside = all(
            isinstance(number, int | float)
            and not isinstance(number, bool)
            and SMALLEST <= number <= LARGEST
            for number in numbers
        )
        if not 1 <= count <= MOST or any(len(values) != count for values in lists):
            raise InputError(f"a calibration has 1 to {MOST} knots of three numbers each")
        if not inside or not rising or not level:
            raise InputError(
                "the knots of a calibration are positive numbers, the predicted ones increasing"
                " and the calibrated ones not decreasing"
            )

    def std(self, predicted: Tensor) -> Tensor:
        """Return calibrated standard deviations for predicted ones, in the same shape."""
        return predicted * self._between(predicted, self._log_ratios()).exp()

    def half_width(self, predicted: Tensor, level: float = LEVEL) -> Tensor:
        """Return half-widths of central intervals for predicted standard deviations.

        At levels other than 0.9 the half-width changes as that of a normal distribution.

        Args:
            predicted: Predicted standard deviations.
            level: Probability of the interval, between 0 and 1.
        """
        shape = torch.as_tensor(self.width, dtype=torch.float64).log().tolist()
        return self.std(predicted) * self._between(predicted, shape).exp() * normal_ratio(level)

    def _log_ratios(self) -> list[float]:
        pairs = zip(self.predicted, self.calibrated, strict=True)
        return [math.log(after / before) for before, after in pairs]

    def _between(self, predicted: Tensor, values: list[float]) -> Tensor:
        """Interpolate values at the knots, linearly in the log of the standard deviation."""
        knots = predicted.new_tensor([math.log(s) for s in self.predicted])
        held = predicted.new_tensor(values)
        if len(knots) == 1:
            return held.expand_as(predicted)
        place = predicted.clamp(self.predicted[0], self.predicted[-1]).log()
        right = torch.bucketize(place.contiguous(), knots).clamp(1, len(knots) - 1)
        share = (place - knots[right - 1]) / (knots[right] - knots[right - 1])
        return torch.lerp(held[right - 1], held[right], share.clamp(0, 1))


@dataclass(frozen=True)
class ErrorBars:
    """The calibration of a posterior's error bars, which is stored beside its weights.

    Args:
        measured: Map for pixels that y measures, and for all pixels if A is no mask.
        hidden: Map for pixels that a mask hides; None leaves their predictions as they are.
        trusted: Whether the assumptions of the calibration hold. Without trust it is not applied.
        why: Reason for missing trust, for messages.

    >>> measured, hidden = (Curve((0.1,), (c,), (1.6,)) for c in (0.2, 0.3))
    >>> predicted, mask = torch.full((1, 1, 1, 2), 0.1), torch.tensor([[[[1.0, 0.0]]]])
    >>> ErrorBars(measured, hidden).std(predicted, mask)
    tensor([[[[0.2000, 0.3000]]]])
    >>> ErrorBars(measured, hidden, trusted=False).std(predicted, mask)
    tensor([[[[0.1000, 0.1000]]]])
    """

    measured: Curve
    hidden: Curve | None = None
    trusted: bool = True
    why: str = ""

    def std(self, predicted: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return calibrated standard deviations.

        Args:
            predicted: Predicted standard deviations, shape (B, C, H, W).
            mask: 1 where a pixel is measured, 0 where it is hidden, shape (B or 1, 1, H, W); None
                where no pixel is hidden.

        Returns:
            Calibrated standard deviations, shape (B, C, H, W). Without trust, the predicted ones.
        """
        if not self.trusted:
            return predicted
        hidden = predicted if self.hidden is None else self.hidden.std(predicted)
        return _by_mask(self.measured.std(predicted), hidden, mask)

    def half_width(
        self, predicted: Tensor, mask: Tensor | None = None, level: float = LEVEL
    ) -> Tensor:
        """Return half-widths of central intervals; arguments as for `std` and `Curve`."""
        plain = predicted * NORMAL * normal_ratio(level)
        if not self.trusted:
            return plain
        hidden = plain if self.hidden is None else self.hidden.half_width(predicted, level)
        return _by_mask(self.measured.half_width(predicted, level), hidden, mask)

    def save(self, folder: str | Path) -> None:
        """Write error_bars.json into a folder."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"
        (Path(folder) / FILE).write_text(text)

    @classmethod
    def load(cls, folder: str | Path) -> "ErrorBars | None":
        """Read error_bars.json from a folder.

        Returns:
            The calibration, or None if the folder has none.

        Raises:
            InputError: The file cannot be read, or has another format.
        """
        path = Path(folder) / FILE
        if not path.exists():
            return None
        values = read_object(path)
        if values.get("format") != FORMAT:
            raise InputError(
                f"{path} has another format than {FORMAT}: remove it to use the posterior without"
                " calibration, or learn again"
            )
        try:
            measured = _curve(typed(values, "measured", dict, path), path)
            hidden = values.get("hidden")
            held = None if hidden is None else _curve(typed(values, "hidden", dict, path), path)
            trusted = typed(values, "trusted", bool, path)
            return cls(measured, held, trusted, typed(values, "why", str, path))
        except InputError as error:
            text = str(error)
            raise (
                error if str(path) in text else InputError(f"cannot read {path}: {text}")
            ) from error


def normal_ratio(level: float) -> float:
    """Return the half-width of a normal interval of a probability over that of 0.9.

    Raises:
        InputError: The level is not between 0 and 1.

    >>> round(normal_ratio(0.95), 4)
    1.1916
    """
    if not 0 < level < 1:
        raise InputError(f"level is {level:g}: give a probability between 0 and 1")
    half = torch.tensor((1 + level) / 2, dtype=torch.float64)
    return float(torch.special.ndtri(half)) / NORMAL


def _by_mask(measured: Tensor, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Choose between the values of measured and of hidden pixels."""
    return measured if mask is None else torch.where(mask.to(measured) > 0, measured, hidden)


def _curve(values: dict[str, Any], path: Path) -> Curve:
    """Return the map that a JSON object holds."""
    lists = (typed(values, name, list, path) for name in ("predicted", "calibrated", "width"))
    return Curve(*(tuple(numbers) for numbers in lists))
