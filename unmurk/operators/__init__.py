"""Forward models A and their text form "family:kind,option=value,...".

    identity
    inpaint:random,keep=0.4,seed=0      inpaint:box,size=12        inpaint:file,path=mask.png
    blur:gaussian,sigma=1.5             blur:uniform,size=9        blur:file,path=kernel.npy
    inpaint:freeform,strokes=4,width=6
    blur:anisotropic,sigma=3,ratio=0.3,angle=30                    blur:motion,length=9,angle=30
    sr:average,factor=4                 sr:bicubic,factor=4        colour:grey
    cs:structured,ratio=0.25            mri:cartesian,acceleration=4
    ct:parallel,angles=60

those that are not linear

    phase:fourier,oversample=2          hdr:clip,factor=2          blur:nonlinear,length=7,seed=0
    quantise,bits=2                     jpeg,quality=10

and their compositions "a|b|..", a first: "blur:gaussian,sigma=1|sr:average,factor=2".

`parse` reads a text form, `as_operator` takes a text form, an `Operator`, a matrix, an object with
a method `A` in deepinv's dialect, or a plain function of x.
"""

import re
from typing import Any

import numpy as np
from torch import Tensor

from ..bounds import shown
from ..errors import InputError
from .base import Operator
from .blur import FileBlur, GaussianBlur, UniformBlur
from .colour import Grey
from .compose import Compose
from .ct import ParallelCt
from .external import External, Function, Matrix
from .identity import Identity
from .jpeg import Jpeg
from .masks import BoxInpaint, FileInpaint, RandomInpaint
from .mri import CartesianMri
from .nonlinear_blur import NonlinearBlur
from .oriented import AnisotropicBlur, MotionBlur
from .phase import FourierMagnitude
from .pixelwise import ClipRange
from .quantise import Quantise
from .resample import AverageDown, BicubicDown
from .sensing import StructuredSensing
from .strokes import FreeformInpaint

__all__ = ["FAMILIES", "Compose", "Operator", "as_operator", "operator", "parse"]

LONGEST = 16384  # characters of a text form: several long paths

FAMILIES: dict[str, type[Operator]] = {
    family.form: family
    for family in (
        Identity,
        RandomInpaint,
        BoxInpaint,
        FileInpaint,
        FreeformInpaint,
        GaussianBlur,
        UniformBlur,
        FileBlur,
        AnisotropicBlur,
        MotionBlur,
        AverageDown,
        BicubicDown,
        Grey,
        StructuredSensing,
        CartesianMri,
        ParallelCt,
        FourierMagnitude,
        ClipRange,
        NonlinearBlur,
        Quantise,
        Jpeg,
    )
}


def parse(text: str) -> Operator:
    """The operator of a text form such as "inpaint:random,keep=0.4,seed=0", or of several with
    "|" between them, the first to be applied first. (So no path may hold a "|".)

    Raises:
        InputError: unknown family; an option that is unknown, missing, given twice, malformed or
            out of its bounds; more than `LONGEST` characters. Files that a form names are read
            later, by `Operator.bind`.
    """
    if len(text) > LONGEST:
        raise InputError(
            f"an operator's text form has at most {LONGEST} characters, this one {len(text)}"
        )
    parts = [_parse_one(part) for part in text.split("|")]
    return Compose(*parts) if len(parts) > 1 else parts[0]


def _parse_one(text: str) -> Operator:
    # only a comma before "key=" separates: paths may hold commas
    form, *pieces = re.split(r",(?=\s*[A-Za-z_]+\s*=)", text.strip())
    form = form.strip()
    if form.startswith("python:"):
        raise InputError(f"operator {shown(form)} was a Python object, not a text; give it again")
    if form not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(f"unknown operator {shown(text)}; known are {known}")
    family = FAMILIES[form]
    values: dict[str, Any] = {}
    for piece in pieces:
        key, _, value = (part.strip() for part in piece.partition("="))
        if key not in family.options:
            known = ", ".join(family.options) or "none"
            raise InputError(f"operator {form} has no option {shown(key)}; known are {known}")
        if key in values:
            raise InputError(f"operator {form}: the option {key} is given twice")
        values[key] = family.options[key].parse(f"{form}: {key}", value)
    try:
        return family(**values)
    except TypeError as error:  # the constructor says which option has no default
        missing = ", ".join(re.findall(r"'(\w+)'", str(error)))
        raise InputError(f"operator {form} needs the option {missing}") from error


def as_operator(obj: Any) -> Operator:
    """An operator from what users have.

    Args:
        obj: A text form; an `Operator`; a matrix (m, d), tensor or array, that acts on images of
            d = C H W numbers; an object with a method `A` (a deepinv physics, say); or a
            differentiable function x (B, C, H, W) -> y (B, ...).

    Raises:
        InputError: for anything else.
    """
    if isinstance(obj, Operator):
        return obj
    if isinstance(obj, str):
        return parse(obj)
    if isinstance(obj, Tensor | np.ndarray):
        return Matrix(obj)
    if callable(getattr(obj, "A", None)):
        return External(obj)
    if callable(obj):
        return Function(obj)
    raise InputError(
        f"an operator is a text such as 'identity', a matrix, an object with A(x) or a function,"
        f" not {type(obj).__name__}"
    )


operator = as_operator  # its public name: unmurk.operator
