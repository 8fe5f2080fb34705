"""A run that is killed, or meets a full disk, ends as if nothing had happened."""

import errno
import os

import pytest
import torch

from benchmarks.survive import run as benchmark
from tests import programs
from tests.training.test_learn import TINY, Fragile, blobs, equal, weights
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.problem import Problem
from unmurk.training import Settings, learn
from unmurk.training.trainer import Trainer

RUN = Settings(kimg=0.4, batch=4, rate=0.1, precision="fp32")  # 100 steps
Y = torch.rand(8, 1, generator=torch.Generator().manual_seed(0))


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Meets(Fragile):
    """The disk is full from one of its losses on."""

    def __init__(self, monkeypatch, call=None):
        super().__init__(set())
        torch.nn.init.constant_(self.weight.weight, 0.3)
        torch.nn.init.constant_(self.ema["w"].weight, 0.3)
        self.monkeypatch, self.call = monkeypatch, call

    def losses(self, *given):
        found = super().losses(*given)
        if self.calls == self.call:
            self.monkeypatch.setattr("unmurk.io.atomic.os.fsync", full)
        return found


def test_a_full_disk_stops_a_run_whose_last_state_stays(tmp_path):
    """One line that says what to do; the state is that of before, and the run goes on from it."""
    whole = Meets(None)
    Trainer(whole, Y, RUN, tmp_path / "whole", quiet=True).run()
    with pytest.MonkeyPatch.context() as patch:
        trainer = Trainer(Meets(patch, call=31), Y, RUN, tmp_path / "cut", every=0.0, quiet=True)
        with pytest.raises(InputError) as raised:
            trainer.run()
    assert "No space left on device; correct that and run the same command" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    assert torch.load(tmp_path / "cut" / "state" / "latest.pt", weights_only=True)["step"] == 30
    assert sorted(p.name for p in (tmp_path / "cut" / "state").iterdir()) == ["latest.pt"]
    rest = Meets(None)
    Trainer(rest, Y, RUN, tmp_path / "cut", quiet=True).run()
    assert rest.calls == 70 and torch.equal(rest.weight.weight, whole.weight.weight)


def test_records_that_cannot_be_written_end_a_run_with_its_state(tmp_path):
    """The disk is full for metrics.jsonl alone (/dev/full is such a disk)."""
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    trainer = Trainer(Meets(None), Y, RUN, tmp_path, quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.open", lambda *_a, _open=open, **k: _open("/dev/full", "wb", 0))
        for module in ("checkpoint", "metric_log"):
            patch.setattr(f"unmurk.training.{module}.write", lambda *_: None)
        with pytest.raises(InputError, match="cannot write /dev/full: No space left"):
            trainer.run()
    assert trainer.step == 1


def test_models_that_cannot_be_written_are_written_by_the_next_call(tmp_path, monkeypatch):
    problem = Problem("identity", 0.2)
    y, kw = problem.simulate(blobs()), {"settings": TINY, "kimg": 0.03, "quiet": True}
    learn(y, problem, "noisy", out=tmp_path / "whole", **kw)
    with monkeypatch.context() as patch:
        patch.setattr(Prior, "save", full)
        with pytest.raises(InputError, match="cannot write .*prior: No space left on device"):
            learn(y, problem, "noisy", out=tmp_path / "cut", **kw)
    assert not list((tmp_path / "cut").glob(".unmurk-*"))
    learn(y, problem, "noisy", out=tmp_path / "cut", **kw)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


@pytest.mark.slow
def test_killed_and_on_a_full_disk_it_ends_as_if_nothing_had_happened(tmp_path, monkeypatch):
    """The benchmark of survival with 2 kills (docs/large_runs.md)."""
    monkeypatch.setattr("benchmarks.common.subprocess", programs)
    found = benchmark.survive("flowdiff", tmp_path, kills=2, steps=30)
    assert found.pop("method") == "flowdiff" and found.pop("kills") >= 1
    assert all(found.values()), found
