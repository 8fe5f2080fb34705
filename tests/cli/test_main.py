"""How the program ends."""

import errno

import pytest

from tests.cli.calls import unmurk
from unmurk.problem import Problem


def test_full_disk_is_one_line(data, tmp_path, capsys, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "y.npy")

    monkeypatch.setattr("unmurk.io.generated.GeneratedWriter.write", full)
    assert unmurk("corrupt", data, "--out", tmp_path / "y.npy") == 2
    assert capsys.readouterr().err == "unmurk: cannot write y.npy: No space left on device\n"


def test_other_errors_are_not_hidden(data, tmp_path, monkeypatch):
    """What is no bad input keeps its traceback; still nothing is left behind."""

    def broken(*_args, **_kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(Problem, "simulate", broken)
    with pytest.raises(ZeroDivisionError):
        unmurk("corrupt", data, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
