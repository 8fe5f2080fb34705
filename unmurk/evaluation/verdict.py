r"""A verdict on a restoration: whether it can be trusted, from the measurements alone.

`judge` holds the figures of `predictive.measure` against `LIMITS`. A figure fails if it leaves its
interval by more than two of its standard errors. The benchmark of verdicts sets the limits on some
seeds and tests them on others.

**What it cannot tell.** Two descriptions of the same law of y are equally right. If the stated
blur is narrower than the true one, the learner finds images that are blurred by the rest, and all
figures are those of a right run. The same holds for noise where no part of y is flat.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, reason
from ..io.atomic import write
from ..io.json_files import read_object
from ..problem import Problem
from .predictive import has_unbiased_psnr, measure, unbiased_psnr_of

__all__ = ["LIMITS", "Figure", "Verdict", "assess", "examine", "judge"]

FILE = "verdict.json"
LIMITS: dict[str, tuple[float, float]] = {
    "noise": (0.8, 1.25),
    "chi2": (0.9, 1.15),
    "whiteness": (0.0, 0.012),
    "detail": (-0.06, 0.08),
    "gain": (0.0, math.inf),
    "range": (0.125, math.inf),
    "black": (-0.5, math.inf),
}
"""Interval of each figure in a restoration that can be trusted."""
ERRORS = 2.0  # standard errors beyond a limit
FEWEST = 1000  # measured values
DRAWS = 16  # of a posterior mean
TOGETHER = 2**16  # values of a batch


@dataclass(frozen=True)
class Figure:
    """One figure of a verdict.

    Attributes:
        name: Its name in `LIMITS`, or "kind" or "bars", which have no number or no limit.
        label: What it is, for a page.
        value: The number, or None.
        limits: Smallest and largest value of a right restoration, or None.
        passed: Whether it lies between them, within its error.
        meaning: One line that explains it.
        found: What is wrong, as part of a sentence; "" if nothing is.
        advice: What to do about it; "" if nothing is wrong.

    >>> (figure,) = judge({"values": 10_000, "chi2": (1.6, 0.01)}).figures
    >>> figure.name, figure.value, figure.limits, figure.passed
    ('chi2', 1.6, (0.9, 1.15), False)
    """

    name: str
    label: str
    value: float | None
    limits: tuple[float, float] | None
    passed: bool
    meaning: str
    found: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether a restoration can be trusted, and why.

    Attributes:
        trusted: Whether no figure fails.
        sentence: The verdict in one sentence, with the figures behind it.
        figures: The figures.
        advice: What to do if it is not trusted; "" otherwise.

    >>> verdict = judge({"values": 10_000, "chi2": (1.6, 0.01)})
    >>> verdict.trusted, verdict.advice.partition(",")[0]
    (False, 'check the noise and the operator')
    """

    trusted: bool
    sentence: str
    figures: tuple[Figure, ...]
    advice: str = ""

    @property
    def text(self) -> str:
        """The sentence, and what to do, in one line."""
        return f"{self.sentence} What to do: {self.advice}." if self.advice else self.sentence

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        values = asdict(self)
        for figure in values["figures"]:
            ends = figure["limits"] or ()
            figure["limits"] = [end if math.isfinite(end) else None for end in ends] or None
        return values | {"figures": list(values["figures"])}

    def save(self, folder: str | Path) -> None:
        """Write verdict.json into a folder. Raises InputError if it cannot be written."""
        write(Path(folder) / FILE, (json.dumps(self.to_dict(), indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: str | Path) -> "Verdict | None":
        """Read verdict.json from a folder; None if there is none.

        Raises:
            InputError: The file cannot be read.
        """
        path = Path(folder) / FILE
        if not path.exists():
            return None
        values = read_object(path)
        try:
            figures = tuple(_figure(one) for one in values["figures"])
            trusted, texts = values["trusted"], (values["sentence"], values["advice"])
            if not isinstance(trusted, bool) or not all(isinstance(t, str) for t in texts):
                raise TypeError("a text or a flag is missing")
            return cls(trusted, texts[0], figures, texts[1])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"cannot read {path} ({reason(error)}): remove it; the run then has no verdict"
            ) from error


def _figure(values: Any) -> Figure:
    """Return the figure that a JSON object holds."""
    if not isinstance(values, dict):
        raise TypeError("a figure is no object")
    figure = Figure(**values)
    texts = (figure.name, figure.label, figure.meaning, figure.found, figure.advice)
    numbers = [figure.value, *(figure.limits or ())]
    plain = all(n is None or type(n) in (int, float) for n in numbers)
    if not all(isinstance(t, str) for t in texts) or not plain or len(numbers) not in (1, 3):
        raise TypeError("a figure has another form")
    if figure.limits is not None:
        low, high = figure.limits
        ends = (-math.inf if low is None else low, math.inf if high is None else high)
        figure = replace(figure, limits=ends)
    return figure


# -- measuring ------------------------------------------------------------------------------------


def examine(
    posterior: Any,
    y: Tensor,
    problem: Problem,
    numbers: Sequence[int],
    *,
    seed: int = 0,
    unbiased_psnr: float | None = None,
    calibrated: bool | None = None,
) -> Verdict:
    """Give the verdict on the restoration of measurements by a posterior.

    Args:
        posterior: The posterior q(x | y): a `Posterior`, or an object with its `sample` and
            `mean_std`.
        y: Measurements (N, ...).
        problem: How they were made, not bound to images.
        numbers: Numbers of the images, N of them.
        seed: Seed of all draws.
        unbiased_psnr: Unbiased PSNR of the restoration in dB, as a calibration has it; None: it is
            estimated here if the measurements are only noisy.
        calibrated: Whether the error bars are calibrated; None: not known.

    Returns:
        The verdict.

    Raises:
        InputError: The measurements are those of images of another shape.

    >>> from unmurk.flows.posterior import Posterior
    >>> posterior = Posterior.create("tiny", (1, 32, 32))  # untrained: y plus noise of 0.05
    >>> problem = Problem("identity", 0.1)
    >>> verdict = examine(posterior, torch.rand(2, 1, 32, 32), problem, range(2))
    >>> figures = {figure.name: figure.value for figure in verdict.figures}
    >>> verdict.trusted, abs(figures["chi2"] - (0.05 / 0.1) ** 2) < 0.05
    (False, True)
    """
    numbers = [int(n) for n in numbers]
    shape = problem.operator.x_shape(tuple(y.shape))
    parts = torch.arange(len(y)).split(max(1, TOGETHER // max(1, math.prod(shape))))
    problem = problem.to(y.device)

    def each(function: Callable[[Tensor, Problem, list[int]], Tensor], y: Tensor) -> Tensor:
        held = ([numbers[i] for i in part] for part in parts)
        cut = (y[part.to(y.device)] for part in parts)
        found = [function(z, problem.bind(n, shape), n) for z, n in zip(cut, held, strict=True)]
        return torch.cat(found)

    def restore(y: Tensor) -> Tensor:
        return each(lambda y, p, n: posterior.mean_std(y, p, DRAWS, seed, n)[0], y)

    bound = problem.bind(numbers, shape)
    y = bound.operator.apply_mask(y)
    x = each(lambda y, p, n: posterior.sample(y, p, 1, seed + 1, n)[0], y)
    if unbiased_psnr is None and has_unbiased_psnr(bound):
        unbiased_psnr = unbiased_psnr_of(restore, y, bound, seed)
    return assess(y, x, bound, unbiased_psnr=unbiased_psnr, calibrated=calibrated)


def assess(
    y: Tensor,
    x: Tensor,
    problem: Problem,
    *,
    unbiased_psnr: float | None = None,
    calibrated: bool | None = None,
) -> Verdict:
    """Give the verdict on draws from a posterior, as `predictive.measure` takes them.

    >>> x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> x = torch.nn.functional.interpolate(x, scale_factor=8, mode="bilinear")
    >>> y = Problem("identity", 0.1).simulate(x)
    >>> assess(y, x, Problem("identity", 0.1)).trusted
    True
    >>> assess(y, x, Problem("identity", 0.05)).trusted
    False
    """
    return judge(measure(y, x, problem, unbiased_psnr=unbiased_psnr) | {"bars": calibrated})


# -- judging --------------------------------------------------------------------------------------

LABELS = {
    "noise": "noise found / noise stated",
    "chi2": "chi-square of the residual",
    "whiteness": "largest autocorrelation of the residual",
    "detail": "correlation of residual and detail",
    "gain": "gain over a plain filter (dB)",
    "range": "brightness range of the restored images",
    "black": "darkest restored values",
}
MEANINGS = {
    "noise": "Noise in the flat parts of the images over the noise that was stated; 1 is right.",
    "chi2": "Mean square of measured minus restored in units of the noise; 1 is right, and more"
    " means that the restored images do not explain the measured ones.",
    "whiteness": "What is removed should be noise alone, without a pattern from pixel to pixel;"
    " 0 is right.",
    "detail": "Whether what was removed resembles the detail of the image; 0 is right, more means"
    " that the restored images are too smooth, and less that they have detail of their own.",
    "gain": "Unbiased PSNR of the restored images minus that of a filter that has learned nothing;"
    " it should be above 0.",
    "range": "Difference of the brightest and the darkest parts, where black is 0 and white is 1.",
    "black": "0.1 percentile of the restored images; black is 0, and values far below it are an"
    " artifact.",
    "kind": "Whether the noise is of a kind that a noise model here describes.",
    "bars": "Whether the standard deviations were compared with unbiased errors and corrected.",
}
LONGER = (
    "learn longer (the same command with a larger --kimg, or in the app a run of greater Length)"
)


def judge(measured: Mapping[str, Any]) -> Verdict:
    """Judge the figures of `predictive.measure`.

    Args:
        measured: What it returns; "bars" says whether the error bars are calibrated.

    Returns:
        The verdict.

    >>> figures = {"values": 10_000, "chi2": (1.6, 0.01)}
    >>> judge(figures).sentence
    'Not trusted: the restored images do not explain the measured ones (chi-square 1.60).'
    """
    if measured.get("level", 1.0) <= 0:
        return Verdict(
            False,
            "Not tested: without noise nothing in the measurements tells errors from detail.",
            (),
            "compare restored images with images that you know",
        )
    if measured.get("values", 0) < FEWEST:
        return Verdict(
            False,
            f"Not tested: {measured.get('values', 0)} measured values are too few.",
            (),
            "give more or larger images",
        )
    figures = [_kind(measured)] if "kind" in measured else []
    figures += [_one(name, measured) for name in LIMITS if measured.get(name) is not None]
    if (calibrated := measured.get("bars")) is not None:
        text = MEANINGS["bars"]
        figures.append(
            Figure("bars", "error bars calibrated", float(calibrated), None, True, text)
        )
    wrong = [figure for figure in figures if not figure.passed]
    if wrong:
        sentence = f"Not trusted: {'; '.join(figure.found for figure in wrong)}."
        return Verdict(False, sentence, tuple(figures), wrong[0].advice)
    return Verdict(True, f"Trusted: {_reasons(figures, measured)}.", tuple(figures))


def _kind(measured: Mapping[str, Any]) -> Figure:
    """Return the figure of the kind of noise."""
    text = str(measured["kind"])
    found, _, advice = text.partition(": ")
    return Figure(
        *("kind", "noise of a known kind", float(not text), None, not text, MEANINGS["kind"]),
        *(found, advice),
    )


def _one(name: str, measured: Mapping[str, Any]) -> Figure:
    """Return the figure of a number."""
    value, error = measured[name]
    low, high = LIMITS[name]
    passed = low - ERRORS * error <= value <= high + ERRORS * error
    found, advice = ("", "") if passed else _wrong(name, value, measured)
    return Figure(*(name, LABELS[name], value, (low, high), passed, MEANINGS[name]), found, advice)


def _wrong(name: str, value: float, measured: Mapping[str, Any]) -> tuple[str, str]:
    """Return what is wrong with a figure, and what to do."""
    level = measured.get("level", 0.0)
    channel = measured.get("channel")
    subject = "the images have" if channel is None else f"channel {channel} has"
    level = measured.get("channel level", level)
    noise = (
        f"check the noise: {subject} about {value * level:.3g} where {level:.3g} was stated"
        " (unmurk noise IMAGES), and the range of the files (--range BLACK WHITE)"
    )
    psnr = measured.get("psnr") or {}
    texts = {
        "noise": (f"{subject} {value:.2f} times the noise that was stated", noise),
        "whiteness": (
            f"the residual is not white (autocorrelation {value:.3f})",
            f"{LONGER}; if the residual stays so, check the operator",
        ),
        "detail": (
            f"the restored images are too smooth (detail in the residual, {value:.2f})"
            if value > 0
            else f"the restored images have detail that was not measured ({value:.2f})",
            LONGER,
        ),
        "gain": (
            f"a plain filter is better ({psnr.get('reference') or 0:.1f} dB against"
            f" {psnr.get('after') or 0:.1f} dB)",
            LONGER,
        ),
        "range": (
            f"the restored images fill {value:.1%} of the range from black to white",
            "give the file values of black and white (--range BLACK WHITE)",
        ),
        "black": (
            f"the restored images go far below black ({value:.2f})",
            "check the operator, whose blur may be too wide, and the range of the files"
            " (--range BLACK WHITE)",
        ),
    }
    if name != "chi2":
        return texts[name]
    if value < 1:
        text = f"the restored images follow the noise (chi-square {value:.2f})"
        return text, f"check whether the noise is weaker than stated, or {LONGER}"
    text = f"the restored images do not explain the measured ones (chi-square {value:.2f})"
    return text, f"check the noise and the operator, or {LONGER}"


def _reasons(figures: Sequence[Figure], measured: Mapping[str, Any]) -> str:
    """Return why a restoration is trusted."""
    held = {figure.name: figure.value for figure in figures}
    parts = []
    if held.get("chi2") is not None:
        parts.append(f"the noise is explained (chi-square {held['chi2']:.2f})")
    if held.get("whiteness") is not None:
        parts.append(f"the residual is white (autocorrelation {held['whiteness']:.3f})")
    psnr = measured.get("psnr") or {}
    if psnr.get("before") is not None and psnr.get("after") is not None:
        parts.append(
            f"the unbiased PSNR rises from {psnr['before']:.1f} to {psnr['after']:.1f} dB"
        )
    if "bars" in held:
        parts.append(f"the error bars are {'' if held['bars'] else 'not '}calibrated")
    return ", ".join(parts) if len(parts) < 2 else f"{', '.join(parts[:-1])}, and {parts[-1]}"
