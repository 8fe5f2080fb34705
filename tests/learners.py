"""What every way to learn has to pass: y alone is read, and a run cut short ends as the whole."""

import pytest

from tests.training.test_learn import Clinic, blobs, equal, weights
from unmurk.training import Settings, learn
from unmurk.training.trainer import Trainer

__all__ = ["RUN", "check_run", "cut"]

RUN = Settings(network="tiny", kimg=0.08, batch=8, seed=3, precision="fp32")  # 10 steps


def cut(monkeypatch, step):
    """Ends the next run at a step; it writes its state on the way out."""
    update = Trainer.update

    def ends(self):
        if self.step == step:
            raise KeyboardInterrupt
        return update(self)

    monkeypatch.setattr(Trainer, "update", ends)


def check_run(tmp_path, monkeypatch, method, problem, steps, **options):
    """Learns whole from an object whose every attribute but y raises, then from y, cut at `steps`.

    Returns:
        The prior, the posterior and y.
    """
    y = problem.simulate(blobs())
    kw = {"settings": RUN, "quiet": True, **options}
    learn(Clinic(y), problem, method, out=tmp_path / "whole", **kw)
    for step in steps:
        with monkeypatch.context() as patch:
            cut(patch, step)
            with pytest.raises(KeyboardInterrupt):
                learn(y, problem, method, out=tmp_path / "cut", **kw)
    prior, posterior = learn(y, problem, method, out=tmp_path / "cut", **kw)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    return prior, posterior, y
