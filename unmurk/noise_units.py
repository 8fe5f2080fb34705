"""Noise in gray levels of a file ("12dn") and in electrons ("poisson,gain=2.1e/dn")."""

import math
import re

from .bounds import Real, shown
from .errors import InputError
from .io.scale import Scale

__all__ = ["GAIN", "PER_CHANNEL", "has_units", "in_units"]

GAIN = Real(1e-12, 10)
"""Bounds of a gain: from 1e12 counts at white, hardly any noise, to one count in ten pixels."""
PER_CHANNEL = "per-channel:"
"""What the text form of noise per channel begins with."""

UNITS = re.compile(
    r"(?P<number>[0-9.]+(?:[eE][+-]?[0-9]+)?)(?P<unit>e-?/(?:dn|adu)|dn|adu|e-?)", re.I
)
"""A number in gray levels (dn, adu), in electrons (e), or in electrons for each gray level."""


def has_units(text: str) -> bool:
    """Whether a text form has numbers in gray levels or electrons; `in_units` reads it.

    >>> has_units("12dn"), has_units("0.1")
    (True, False)
    """
    values = (part.rpartition("=")[2].strip() for part in re.split("[,:]", text))
    return any(UNITS.fullmatch(value) for value in values)


def in_units(text: str, scale: Scale | None) -> str:
    r"""Convert numbers in gray levels of a file, or in electrons, to units of [0, 1].

    A file's number v and an image's value x belong together by v = black + (white - black) x.

    =================================  =====================================================
    text                               meaning
    =================================  =====================================================
    ``12dn``, ``gaussian,sigma=12dn``  standard deviation of 12 gray levels
    ``gain=2.1e/dn``                   2.1 electrons for each gray level
    ``gain=0.5dn``                     0.5 gray levels for each electron
    ``read=3e``, ``sigma=3e``          Gaussian noise of 3 electrons (in place of ``sigma``)
    ``offset=100dn``                   the gray level of black, where no light falls
    =================================  =====================================================

    Args:
        text: A text form of `noise`.
        scale: The scale of the files (`load_images(...).scale`); None: unknown.

    Returns:
        The text form in units of [0, 1]; `text` itself if it has no such units. With a range for
        each channel it is one of noise per channel.

    Raises:
        InputError: No scale is known, or a unit does not fit its option.

    >>> in_units("poisson-gaussian,gain=2.5e/dn,read=5e", Scale.of("uint8"))
    'poisson-gaussian,gain=0.00156863,sigma=0.00784314'
    """
    text = text.replace(" ", "")
    if not has_units(text):
        return text
    if scale is None:
        raise InputError(
            f"noise '{shown(text)}' is in gray levels of a file, and no file gives their range:"
            " give it in units of [0, 1], or convert it with"
            " unmurk.noise_units.in_units(text, scale)"
        )
    several = text.startswith(PER_CHANNEL)
    if several or scale.channels:
        models = text.removeprefix(PER_CHANNEL).split(":") if several else [text] * scale.channels
        if scale.channels not in (0, len(models)):
            raise InputError(
                f"noise '{shown(text)}' is of {len(models)} channels, and black and white are"
                f" given for {scale.channels}"
            )
        return PER_CHANNEL + ":".join(in_units(m, scale.channel(i)) for i, m in enumerate(models))
    black, white = scale.ends.pairs[0]
    step = white - black
    form, *pieces = text.split(",")
    if not pieces:
        return _number(_in_dn("sigma", form, 0.0) / step)
    given = dict(piece.partition("=")[::2] for piece in pieces)
    if "read" in given and "sigma" not in given:
        given = {"sigma" if key == "read" else key: value for key, value in given.items()}
    electron = _electron(given["gain"], step) if "gain" in given else 0.0
    found = {}
    for key, value in given.items():
        if not UNITS.fullmatch(value):
            found[key] = value
        elif key == "gain":
            found[key] = _number(electron)
        elif key == "offset":
            found[key] = _number((_in_dn(key, value, 0.0) - black) / step)
        else:
            found[key] = _number(_in_dn(key, value, electron * step) / step)
    return ",".join([form, *(f"{key}={value}" for key, value in found.items())])


def _electron(value: str, step: float) -> float:
    """Return the value of one electron in units of [0, 1], whose length is `step` gray levels."""
    match = UNITS.fullmatch(value)
    if match is None:
        return GAIN.parse("noise: gain", value)
    number = float(match["number"]) if _is_number(match["number"]) else 0.0
    unit = match["unit"].lower()
    if number <= 0 or unit in ("e", "e-"):
        raise InputError(f"noise: gain={value}: write electrons for each gray level, as 2.1e/dn")
    return (number if unit in ("dn", "adu") else 1 / number) / step


def _in_dn(key: str, value: str, electron: float) -> float:
    """Return a number in gray levels; `electron` is the gray levels of one electron."""
    match = UNITS.fullmatch(value)
    if match is None or "/" in match["unit"] or not _is_number(match["number"]):
        raise InputError(f"noise: {key}={shown(value)}: write gray levels, as {key}=12dn")
    number = float(match["number"])
    if match["unit"].lower() in ("dn", "adu"):
        return number
    if not electron:
        raise InputError(
            f"noise: {key}={value} is in electrons, which needs a gain, as gain=2.1e/dn"
        )
    return number * electron


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _number(value: float) -> str:
    return f"{value:.6g}"
