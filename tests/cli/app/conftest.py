"""What the tests of the app share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unmurk.cli.app import jobs
from unmurk.cli.app.actions import Desk
from unmurk.cli.app.sessions import Limits, Sessions


@pytest.fixture
def desk(process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """A desk whose commands run in `process`, a fixture of each file, not in a new process."""
    monkeypatch.setattr(jobs.subprocess, "Popen", process)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    sessions = Sessions(Limits(pixels=10**6))
    yield Desk(sessions, tmp_path / "runs", local=True)
    sessions.close()
