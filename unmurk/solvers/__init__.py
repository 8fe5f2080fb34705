"""Solvers: measurements y, a problem and a denoiser in, restored images out. One paper a file."""

from .auto import Auto
from .base import Solver
from .daps import Daps
from .ddiff import Ddiff
from .ddnm import Ddnm
from .ddrm import Ddrm, DdrmPaper
from .diffpir import DiffPir
from .dps import Dps
from .draws import Draws
from .fast_dips import FastDips
from .hrdis import Hrdis
from .mmps import Mmps
from .pigdm import Pigdm
from .pnp_dm import PnpDm
from .projdiff import ProjDiff
from .red_diff import RedDiff
from .red_diff_paper import RedDiffPaper
from .red_diff_spread import RedDiffSpread
from .snips import Snips
from .solve import METHODS, PRESETS, Result, configure, solve
from .tds import Tds
from .tmpd import Tmpd

__all__ = [
    "Auto",
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
    "METHODS",
    "Mmps",
    "PRESETS",
    "Pigdm",
    "PnpDm",
    "ProjDiff",
    "RedDiff",
    "RedDiffPaper",
    "RedDiffSpread",
    "Result",
    "Snips",
    "Solver",
    "Tds",
    "Tmpd",
    "configure",
    "solve",
]
