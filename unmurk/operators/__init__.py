"""Forward models A: their classes, their text forms, and operators of one's own.

`parse` reads a text form such as "blur:gaussian,sigma=1|sr:average,factor=2"; `registry` lists
all of them. `as_operator` also takes a matrix, a differentiable function, or an object with the
methods of deepinv. `register` gives a class of one's own a text form.

>>> import torch
>>> from unmurk.operators import parse
>>> A = parse("inpaint:box,size=2")
>>> A.A(torch.ones(1, 1, 4, 4)).sum()
tensor(12.)
"""

from .base import NonlinearOperator, Operator
from .compose import Compose
from .external import External, Function
from .matrix import LinearMap, Matrix
from .registry import FAMILIES, as_operator, parse, register
from .weighted import Weighted

__all__ = [
    "FAMILIES",
    "Compose",
    "External",
    "Function",
    "LinearMap",
    "Matrix",
    "NonlinearOperator",
    "Operator",
    "Weighted",
    "as_operator",
    "operator",
    "parse",
    "register",
]

operator = as_operator  # its public name: unmurk.operator
