"""What every test shares: one thread, so that results and times do not depend on the machine.

Files with many slow tests run first (with xdist: ``--dist loadfile --no-loadscope-reorder``), so
that no process is left with a long one when the others have finished.
"""

import os
from collections import Counter
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from tests.device_cases import SMALLEST
from unmurk.diffusion import networks
from unmurk.diffusion.networks import Preset
from unmurk.io.formats import readers
from unmurk.io.formats import registry as formats
from unmurk.operators import registry as operators
from unmurk.solvers import base
from unmurk.training import FlowDiff
from unmurk.training import registry as learners
from unmurk.training.trainer import Trainer

torch.set_num_threads(1)

probe = Trainer.probe


@pytest.fixture(scope="session", autouse=True)
def no_probe() -> Iterator[None]:
    """Runs whose precision is "auto" take fp32, without timing both for a second or more.

    So results do not depend on the load of the machine. The test of `probe` calls it itself.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "probe", lambda trainer: "fp32")
        yield


@pytest.fixture(autouse=True)
def plain_pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of runs have no charts and no new images, except in tests marked `pages`.

    Their drawing takes half of the time of a short run. The images of the set are on the page.
    """
    if request.node.get_closest_marker("pages") is None:
        monkeypatch.setattr("unmurk.cli.run_page.drawn", lambda run: [])
        monkeypatch.setattr("unmurk.cli.charts._svg", lambda chart, name, size: "")


@pytest.fixture(autouse=True)
def plain_starts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that name no start begin with random weights, except in tests marked `starts`.

    Loading and checking those of the package takes a third of a second.
    """
    if request.node.get_closest_marker("starts") is None:
        monkeypatch.setattr(FlowDiff, "default_start", "none")


@pytest.fixture(scope="session", autouse=True)
def smallest_networks() -> Iterator[Preset]:
    """Networks called "tiny" are the smallest ones, except in tests marked `presets`.

    Whether a run resumes, or who sees what, does not depend on the size of its networks.
    """
    with pytest.MonkeyPatch.context() as patch:
        own = networks.PRESETS["tiny"]
        patch.setitem(networks.PRESETS, "tiny", SMALLEST)
        yield own


@pytest.fixture(autouse=True)
def own_networks(request: pytest.FixtureRequest, smallest_networks: Preset) -> Iterator[None]:
    """Tests marked `presets` have the networks of users."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("presets") is not None:
            patch.setitem(networks.PRESETS, "tiny", smallest_networks)
        yield


@pytest.fixture
def registries() -> Iterator[None]:
    """The tables of operators, solvers, learners and readers forget what a test registers."""
    readers._own_readers()
    tables = (
        operators._families,
        *(base.REGISTERED, base.REGISTERED_PRESETS),
        learners._learners,
        formats._readers,
    )
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files by their number of slow tests; the tests of a file keep their order."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
