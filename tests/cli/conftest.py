"""Images and a run for the tests of commands."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cli.calls import images
from unmurk.diffusion.prior import Prior
from unmurk.flows.posterior import Posterior
from unmurk.problem import Problem


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "clean.npy"
    np.save(path, images(5))
    return path


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run folder whose networks were never trained: enough to be read and applied."""
    torch.manual_seed(0)
    folder = tmp_path / "trained"
    Prior.create("tiny", (1, 16, 16)).save(folder / "prior")
    Posterior.create("tiny", (1, 16, 16)).save(folder / "posterior")
    problem = Problem("inpaint:random,keep=0.5", 0.1)
    (folder / "config.json").write_text(json.dumps({"problem": problem.to_dict()}))
    return folder
