"""Commands that are killed, or interrupted, and given again: the same files, and no other one."""

import pytest

from benchmarks.survive_commands import run as benchmark
from tests import programs

COMMANDS = ("corrupt", "sample", "restore", "solve")


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_and_interrupted_it_ends_as_if_nothing_had_happened(command, tmp_path, monkeypatch):
    """The benchmark of survival with a kill and an interrupt."""
    monkeypatch.setattr(benchmark, "subprocess", programs)
    found = benchmark.survive(command, tmp_path, kills=1)
    assert found.pop("command") == command
    assert found.pop("kills") == 1 and found.pop("interrupts") == 1
    assert all(found.values()), found
