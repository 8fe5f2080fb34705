"""What the tests of training share: the smallest networks, except in tests marked `presets`."""

import pytest

from tests.device_cases import SMALLEST
from unmurk.diffusion import networks


@pytest.fixture(autouse=True)
def smallest_networks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a run resumes, or who sees what, does not depend on the size of its networks."""
    if request.node.get_closest_marker("presets") is None:
        monkeypatch.setitem(networks.PRESETS, "tiny", SMALLEST)
