"""`unmurk learn`: it continues, reports, and says how to go on."""

import numpy as np
import pytest
import torch

from tests.cli.calls import unmurk
from unmurk.problem import Problem
from unmurk.training.examples import Examples


@pytest.mark.pages
@pytest.mark.slow
def test_learn_continues_and_reports(data, tmp_path, capsys):
    """The same command a second time finds the run done; another noise is refused."""
    run = tmp_path / "run"
    argv = ["learn", data, "--noise", "0.1", "--simulate", "--kimg", "0.2", "--out", run]
    argv += ["--precision", "fp32", "--method", "noisy"]
    assert unmurk(*argv) == 0
    weights = (run / "posterior" / "model.safetensors").read_bytes()
    assert unmurk(*argv) == 0
    assert (run / "posterior" / "model.safetensors").read_bytes() == weights
    capsys.readouterr()
    assert unmurk(*argv, "--seed", 1) == 2
    assert "another" in capsys.readouterr().err
    assert (run / "prior" / "model_index.json").exists()
    page = (run / "report.html").read_text()
    kept = Examples.load(run)
    y = Problem("identity", 0.1).simulate(torch.from_numpy(np.load(data))[:, None], 0)
    assert torch.equal(kept.y, y[list(kept.numbers)])
    for number in kept.numbers:
        assert f"<h3>image {number}</h3>" in page
    assert page.count('type="range"') == len(kept.numbers) == 4
    assert f"unmurk restore {data} --prior {run} --out restored --std" in page
    assert unmurk("report", run) == 0
    assert "unmurk restore IMAGES" in (run / "report.html").read_text()


def test_interrupt_says_how_to_go_on(data, tmp_path, capsys, monkeypatch):
    def interrupted(*_args, **_kwargs):
        (tmp_path / "out").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(Problem, "simulate", interrupted)
    assert unmurk("corrupt", data, "--out", tmp_path / "out") == 130
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 1 and "same command" in shown.err
    assert not (tmp_path / "out").exists()
