"""Learning a prior and a posterior from corrupted images. One method a file."""

from ..io.datasets import Source
from .ambient import Ambient
from .ambientflow import AmbientFlow
from .baselines import Clean, Noisy
from .em import Em, Rounds
from .flowdiff import FlowDiff
from .learner import Learner
from .learning import learn
from .muon import Muon
from .prior_first import PriorFirst
from .recipe import Recipe
from .registry import METHODS, configure, describe, learner_class, names, register
from .run_folder import FORMAT, read_config
from .schedule import LRPhase, ParamGroup
from .sure import Sure
from .trainer import Settings, Trainer

__all__ = [
    "FORMAT",
    "METHODS",
    "Ambient",
    "AmbientFlow",
    "Clean",
    "Em",
    "FlowDiff",
    "LRPhase",
    "Learner",
    "Muon",
    "Noisy",
    "ParamGroup",
    "PriorFirst",
    "Recipe",
    "Rounds",
    "Settings",
    "Source",
    "Sure",
    "Trainer",
    "configure",
    "describe",
    "learn",
    "learner_class",
    "names",
    "read_config",
    "register",
]
