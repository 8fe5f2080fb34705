"""What the tests of faults share."""

from pathlib import Path

import pytest
import torch

from unmurk.diffusion.prior import Prior
from unmurk.flows.posterior import Posterior


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of grey 28x28 images whose networks were never trained."""
    folder = tmp_path_factory.mktemp("untrained") / "run"
    torch.manual_seed(0)
    Prior.create("tiny", (1, 28, 28)).save(folder / "prior")
    Posterior.create("tiny", (1, 28, 28)).save(folder / "posterior")
    return folder
