"""Runs that are still training: their page, their models, and that a preview changes nothing."""

from functools import partial

import numpy as np
import pytest
import torch

from unmurk.cli import run_page, unfinished
from unmurk.cli.main import main
from unmurk.errors import InputError
from unmurk.evaluation.verdict import Verdict
from unmurk.problem import Problem
from unmurk.training import learn
from unmurk.training.preview import Preview, progress_of

from .test_report import Page

SHORT = {"method": "noisy", "kimg": 0.096, "quiet": True, "precision": "fp32"}
OFTEN = partial(Preview, every=0.0, cost=float("inf"))


@pytest.fixture(scope="module")
def noisy():
    x = torch.zeros(64, 1, 8, 8)
    for i in range(64):
        x[i, :, i % 4 : i % 4 + 3, 2 : 4 + i % 4] = 0.8
    return Problem("identity", 0.2).simulate(x)


def files(run):
    kept = ("prior", "posterior", "state")
    return {
        str(p.relative_to(run)): p.read_bytes()
        for p in sorted(run.rglob("*"))
        if p.is_file() and p.relative_to(run).parts[0] in kept
    }


@pytest.fixture(scope="module")
def watched(noisy, tmp_path_factory):
    """A run with a preview after every step, and the pages of some of them."""
    run, pages = tmp_path_factory.mktemp("runs") / "watched", {}

    def watch(share):
        run_page.unfinished(run, share)
        pages[share] = (run / "report.html").read_text()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unmurk.training.learning.Preview", OFTEN)
        learn(noisy, Problem("identity", 0.2), out=run, **SHORT, watch=watch)
    return run, pages


def test_a_run_with_previews_ends_bit_for_bit_as_one_without(noisy, watched, tmp_path):
    learn(noisy, Problem("identity", 0.2), out=tmp_path / "plain", **SHORT)
    plain, other = files(tmp_path / "plain"), files(watched[0])
    assert plain.keys() == other.keys()
    differ = {name for name in plain if plain[name] != other[name]}
    assert differ <= {"state/latest.pt"}  # which holds the seconds of the run
    states = [
        torch.load(run / "state" / "latest.pt", weights_only=True)
        for run in (tmp_path / "plain", watched[0])
    ]
    for key in states[0]["ema"]["posterior"]:
        assert torch.equal(*(state["ema"]["posterior"][key] for state in states)), key


def test_the_page_of_an_unfinished_run_reloads_itself_and_shows_every_tenth(watched):
    run, pages = watched
    shares = sorted(pages)
    assert shares == pytest.approx([1 / 3, 2 / 3])
    first, last = Page(pages[shares[0]]), Page(pages[shares[-1]])
    for page in (first, last):
        (refresh,) = [a for _, a in page.tags if a.get("http-equiv") == "refresh"]
        assert refresh["content"] == "60"
    assert "unfinished: 67 % of its training" in last.words
    columns = [w for w in last.words if w.endswith("0 %")]
    assert columns == ["30 %", "60 %"]
    assert [w for w in first.words if w.endswith("0 %")] == ["30 %"]
    # four examples with three pictures each and two scales of maps, and one column per tenth
    assert len(last.images) - len(first.images) == 4
    assert progress_of(run) is None  # the run has ended
    held = unfinished.pictures_of(run)
    assert sorted(held) == [3, 6] and held[3].shape == (4, 1, 8, 8)
    assert not torch.equal(held[3], held[6])


def test_restore_takes_an_interrupted_run_and_says_its_share(noisy, tmp_path, capsys):
    run, data = tmp_path / "run", tmp_path / "noisy.npy"
    np.save(data, noisy[:4].numpy())

    def stop(share):
        if share >= 0.6:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unmurk.training.learning.Preview", OFTEN)
        with pytest.raises(KeyboardInterrupt):
            learn(noisy, Problem("identity", 0.2), out=run, **SHORT, watch=stop)
    assert progress_of(run) == pytest.approx(2 / 3)
    out = tmp_path / "restored.npy"
    assert main(["restore", str(data), "--prior", str(run), "--out", str(out)]) == 0
    assert "67 % of its training" in capsys.readouterr().err
    assert np.load(out).shape == (4, 1, 8, 8)
    assert main(["report", str(run)]) == 0
    assert "unfinished: 67 % of its training" in (run / "report.html").read_text()
    learn(noisy, Problem("identity", 0.2), out=run, **SHORT)
    assert progress_of(run) is None
    capsys.readouterr()
    Verdict(True, "Trusted: here.", ()).save(run)
    assert main(["restore", str(data), "--prior", str(run), "--out", str(tmp_path / "b.npy")]) == 0
    assert "unfinished" not in (told := capsys.readouterr().err) and "verdict" not in told
    Verdict(False, "Not trusted: here.", (), "learn longer").save(run)
    assert main(["restore", str(data), "--prior", str(run), "--out", str(tmp_path / "c.npy")]) == 0
    assert "Not trusted: here. What to do: learn longer." in capsys.readouterr().err


def test_previews_keep_to_their_share_of_the_time(tmp_path, monkeypatch):
    """On a clock that is moved by hand: every preview takes three seconds."""
    clock = [0.0]
    monkeypatch.setattr("unmurk.training.preview.time.perf_counter", lambda: clock[0])

    def watch(share):
        clock[0] += 3.0

    preview, made = Preview(tmp_path, watch), []
    for second in range(3600):
        clock[0] += 1.0
        if preview.due(second / 3600):
            preview.make({}, second / 3600)
            made.append(clock[0])
    assert 3.0 * len(made) <= 0.02 * clock[0]
    assert len(made) >= 20  # of 24 that the share allows


@pytest.mark.parametrize(
    "error, text",
    [
        (InputError("the disk is full"), "the disk is full"),
        (MemoryError(), "too little memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "too little memory"),
    ],
)
def test_a_preview_that_fails_does_not_end_the_run(error, text, tmp_path, capsys):
    calls = []

    def watch(share):
        calls.append(share)
        raise error

    preview = Preview(tmp_path, watch)
    for share in (0.1, 0.2):
        preview.make({}, share)
    assert calls == [0.1] and progress_of(tmp_path) == 0.2
    assert capsys.readouterr().err == f"no more previews: {text}\n"


def test_other_errors_of_a_preview_are_raised(tmp_path):
    def watch(share):
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        Preview(tmp_path, watch).make({}, 0.1)


@pytest.mark.parametrize("text", ["[]", '{"share": 2}', '{"share": "x"}', '{"share": true}'])
def test_a_damaged_progress_is_one_line(text, tmp_path):
    (tmp_path / "progress.json").write_text(text)
    with pytest.raises(InputError, match="progress"):
        progress_of(tmp_path)


def test_damaged_pictures_are_one_line(tmp_path):
    assert unfinished.pictures_of(tmp_path) == {}
    (tmp_path / unfinished.IMAGES).write_bytes(b"not tensors")
    with pytest.raises(InputError, match="damaged"):
        unfinished.pictures_of(tmp_path)
