"""Learning a prior and a posterior from corrupted images. One method a file."""

from ..io.datasets import Source
from .ambient import Ambient
from .ambientflow import AmbientFlow
from .baselines import Clean
from .em import Em, Rounds
from .flowdiff import FlowDiff, Recipe
from .learn import METHODS, configure, learn
from .noisy import Noisy
from .sure import Sure
from .trainer import Method, Settings, Trainer

__all__ = [
    "METHODS",
    "Ambient",
    "AmbientFlow",
    "Clean",
    "Em",
    "FlowDiff",
    "Method",
    "Noisy",
    "Recipe",
    "Rounds",
    "Settings",
    "Source",
    "Sure",
    "Trainer",
    "configure",
    "learn",
]
