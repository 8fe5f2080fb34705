"""Solvers: restore images from measurements, a problem and a prior. One paper a file.

>>> import unmurk
>>> list(unmurk.solvers.METHODS)[:3]
['red-diff', 'dps', 'hrdis']
"""

from .auto import Auto
from .base import AnnealedSolver, ProximalSolver, Solver
from .coupling import CoupledSolver
from .daps import Daps
from .data_term import likelihood_grad, prox
from .ddiff import Ddiff
from .ddnm import Ddnm
from .ddrm import Ddrm, DdrmPaper
from .diffpir import DiffPir
from .dps import Dps
from .fast_dips import FastDips
from .hrdis import Hrdis
from .mmps import Mmps
from .pigdm import Pigdm
from .pnp_dm import PnpDm
from .projdiff import ProjDiff
from .red_diff import RedDiff
from .red_diff_paper import RedDiffPaper
from .red_diff_spread import RedDiffSpread
from .registry import Draws, register
from .restoration import METHODS, PRESETS, Result, configure, solve
from .snips import Snips
from .state import CountingDenoiser, State
from .tds import Tds
from .tmpd import Tmpd

__all__ = [
    "METHODS",
    "PRESETS",
    "AnnealedSolver",
    "Auto",
    "CountingDenoiser",
    "CoupledSolver",
    "Daps",
    "Ddiff",
    "Ddnm",
    "Ddrm",
    "DdrmPaper",
    "DiffPir",
    "Dps",
    "Draws",
    "FastDips",
    "Hrdis",
    "Mmps",
    "Pigdm",
    "PnpDm",
    "ProjDiff",
    "ProximalSolver",
    "RedDiff",
    "RedDiffPaper",
    "RedDiffSpread",
    "Result",
    "Snips",
    "Solver",
    "State",
    "Tds",
    "Tmpd",
    "configure",
    "likelihood_grad",
    "prox",
    "register",
    "solve",
]
