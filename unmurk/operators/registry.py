"""The text forms of operators, and operators of one's own by name.

A text form is "family:kind,option=value,...". Linear families:

- ``identity``
- ``inpaint:random,keep=0.4,seed=0``, ``inpaint:box,size=12``,
  ``inpaint:freeform,strokes=4,width=6``, ``inpaint:file,path=mask.png``
- ``blur:gaussian,sigma=1.5``, ``blur:uniform,size=9``,
  ``blur:anisotropic,sigma=3,ratio=0.3,angle=30``, ``blur:motion,length=9,angle=30``,
  ``blur:file,path=kernel.npy``
- ``sr:average,factor=4``, ``sr:bicubic,factor=4``, ``colour:grey``
- ``cs:structured,ratio=0.25``, ``mri:cartesian,acceleration=4``, ``mri:file,path=scan.h5``,
  ``ct:parallel,angles=60``

Nonlinear families:

- ``phase:fourier,oversample=2``, ``hdr:clip,factor=2``, ``blur:nonlinear,length=7,seed=0``
- ``quantise,bits=2``, ``jpeg,quality=10``

``"a|b|..."`` is the composition that applies a first:
``blur:gaussian,sigma=1|sr:average,factor=2``.

A class of one's own gets a text form by the decorator `register`. An installed package offers one
by an entry point of the group ``unmurk.operators``, whose name is the text form's first word.
Entry points are loaded only when a text form asks for their name.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from ..bounds import shown
from ..errors import InputError
from ..plugins import load, offered
from .base import Operator
from .blur import AnisotropicBlur, FileBlur, GaussianBlur, MotionBlur, UniformBlur
from .compose import Compose
from .ct import ParallelCt
from .external import External, Function
from .inpainting import Identity
from .jpeg import Jpeg
from .masks import BoxInpaint, FileInpaint, FreeformInpaint, RandomInpaint
from .matrix import LinearMap, Matrix, is_linear_map
from .mri import CartesianMri, FileMri
from .nonlinear_blur import NonlinearBlur
from .phase import FourierMagnitude
from .pixelwise import ClipRange, Quantize
from .resample import AverageDown, BicubicDown, Grayscale
from .sensing import StructuredSensing

__all__ = ["BUILT_IN", "FAMILIES", "as_operator", "parse", "register"]

MAX_LENGTH = 16384  # characters of a text form: several long paths
GROUP = "unmurk.operators"
NAME = re.compile(r"[a-z][a-z0-9_-]*(:[a-z0-9_-]+)?")

Class = TypeVar("Class", bound=type[Operator])

_families: dict[str, type[Operator]] = {
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
        Grayscale,
        StructuredSensing,
        CartesianMri,
        FileMri,
        ParallelCt,
        FourierMagnitude,
        ClipRange,
        NonlinearBlur,
        Quantize,
        Jpeg,
    )
}
BUILT_IN = frozenset(_families)
"""The text forms of unmurk itself, which cannot be replaced."""

FAMILIES: Mapping[str, type[Operator]] = MappingProxyType(_families)
"""The classes of operators by the first word of their text form. Read only; see `register`."""


def register(form: str) -> Callable[[Class], Class]:
    """Give a class of operators a text form. Use it as a decorator.

    Afterwards `parse`, `Problem` and the command line read the form, within this process. The
    class declares its options in `options`, and takes them as arguments of its constructor. A
    class that is defined again (in a notebook) replaces the former one of the same name.

    Args:
        form: First word of the text form, "my-blur" or "my:blur": small letters, digits, "-" and
            "_".

    Returns:
        The decorator. It sets `form` of the class and returns the class.

    Raises:
        InputError: The form is malformed or belongs to another operator; or the class is not an
            `Operator`, or has another form already.

    >>> from typing import ClassVar
    >>> import torch
    >>> from unmurk import operators
    >>> from unmurk.bounds import Real
    >>> @operators.register("gain")
    ... class Gain(operators.Operator):
    ...     options: ClassVar = {"factor": Real(0.1, 10)}
    ...     def __init__(self, factor):
    ...         self._take_options(factor=factor)
    ...     def _A(self, x):
    ...         return self.factor * x
    ...     def _A_adjoint(self, y):
    ...         return self.factor * y
    >>> A = operators.parse("gain,factor=2")
    >>> A.A_dagger(torch.ones(1, 1, 1, 2))
    tensor([[[[0.5000, 0.5000]]]])
    >>> operators.parse("gain,factor=99")
    Traceback (most recent call last):
    ...
    unmurk.errors.InputError: gain: factor must be a number from 0.1 to 10, got '99'
    """
    if not isinstance(form, str) or not NAME.fullmatch(form):
        raise InputError(
            f"the form of an operator is small letters, digits, '-' and '_' such as 'my-blur' or"
            f" 'my:blur', not {shown(form)}"
        )

    def decorate(family: Class) -> Class:
        if not (isinstance(family, type) and issubclass(family, Operator)):
            raise InputError(f"operator {form}: register a class of Operator, not {shown(family)}")
        if form in BUILT_IN or not _same_class(_families.get(form, family), family):
            raise InputError(f"operator {form} exists already: choose another form")
        taken = next((f for f, known in _families.items() if known is family and f != form), None)
        if taken is not None:
            raise InputError(f"operator {form}: its class is {taken} already: register a subclass")
        family.form = form
        _families[form] = family
        return family

    return decorate


def _same_class(one: type, other: type) -> bool:
    names = [(c.__module__, c.__qualname__) for c in (one, other)]
    return names[0] == names[1]


def parse(text: str) -> Operator:
    """Read the text form of an operator, or of several with "|" between them.

    The first operator is applied first. No path may hold a "|".

    Args:
        text: The text form, such as "inpaint:random,keep=0.4,seed=0".

    Raises:
        InputError: The family is unknown; an option is unknown, missing, given twice, malformed or
            out of its bounds; or the text has more than 16,384 characters. Files that a form
            names are read later, by `Operator.bind`.

    >>> from unmurk.operators import parse
    >>> parse("blur:gaussian,sigma=1|sr:average,factor=2")
    <operator blur:gaussian,sigma=1,pad=reflect|sr:average,factor=2>
    """
    if len(text) > MAX_LENGTH:
        raise InputError(
            f"an operator's text form has at most {MAX_LENGTH} characters, this one {len(text)}"
        )
    parts = [_parse_one(part) for part in text.split("|")]
    return Compose(*parts) if len(parts) > 1 else parts[0]


def _parse_one(text: str) -> Operator:
    # only a comma before "key=" separates: paths may hold commas
    form, *pieces = re.split(r",(?=\s*[A-Za-z_]+\s*=)", text.strip())
    form = form.strip()
    if form.startswith("python:"):
        raise InputError(f"operator {shown(form)} was a Python object, not a text: give it again")
    family = _families.get(form) or _from_package(form, text)
    values: dict[str, Any] = {}
    for piece in pieces:
        key, _, value = (part.strip() for part in piece.partition("="))
        if key not in family.options:
            known = ", ".join(family.options) or "none"
            raise InputError(f"operator {form} has no option {shown(key)}: known are {known}")
        if key in values:
            raise InputError(f"operator {form}: the option {key} is given twice")
        values[key] = family.options[key].parse(f"{form}: {key}", value)
    return _construct(family, form, values)


def _construct(family: type[Operator], form: str, values: dict[str, Any]) -> Operator:
    try:
        return family(**values)
    except TypeError as error:
        missing = ", ".join(re.findall(r"'(\w+)'", str(error)))
        if "required" not in str(error) or not missing:
            raise InputError(f"operator {form} cannot be made: {error}") from error
        raise InputError(f"operator {form} needs the option {missing}") from error


def _from_package(form: str, text: str) -> type[Operator]:
    """The class that an installed package offers for a form; it stays known."""
    points = offered(GROUP)
    if form not in points:
        known = ", ".join(sorted({*_families, *points}))
        raise InputError(f"unknown operator {shown(text)}: known are {known}")
    return register(form)(load(points[form], f"operator {form}"))


def as_operator(obj: Any, shape: Sequence[int] | None = None) -> Operator:
    """Make an operator of a text form, a matrix, a function or an object.

    Args:
        obj: A text form; an `Operator`; a matrix (m, d), tensor or array, that acts on images of
            d = C H W numbers; a sparse matrix or a scipy `LinearOperator`; an object with a method
            `A` (a deepinv physics, for example); or a differentiable function x (B, C, H, W) -> y
            (B, ...).
        shape: Shape (C, H, W) of the images, where the measurements do not determine it. Text
        forms and
            operators do not take it; use `Operator.bind`.

    Raises:
        InputError: obj is something else, or the shape does not fit.

    >>> import torch
    >>> import unmurk
    >>> unmurk.operator("sr:average,factor=2")
    <operator sr:average,factor=2>
    >>> unmurk.operator(torch.eye(4), shape=(1, 2, 2)).x_shape((4,))
    (1, 2, 2)
    """
    if isinstance(obj, Operator | str):
        if shape is not None:
            raise InputError(
                "shape= is for matrices, functions and objects: use bind(index, shape)"
            )
        return obj if isinstance(obj, Operator) else parse(obj)
    if shape is not None and (len(shape) != 3 or not all(int(n) >= 1 for n in shape)):
        raise InputError(f"shape= must be (channels, height, width), got {shown(shape)}")
    if isinstance(obj, Tensor | np.ndarray):
        return Matrix(obj, shape)
    if callable(getattr(obj, "A", None)):
        return External(obj, shape)
    if is_linear_map(obj):
        return LinearMap(obj, shape)
    if callable(obj):
        return Function(obj, shape=shape)
    raise InputError(
        f"an operator is a text such as 'identity', a matrix, an object with A(x) or a function,"
        f" not {type(obj).__name__}"
    )
