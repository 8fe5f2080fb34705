"""State files and logs that were damaged or come from strangers: named in one line, and kept."""

import copy
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from unmurk.cli.main import main as command_line
from unmurk.errors import InputError
from unmurk.io.json_files import read_json
from unmurk.io.ledger import LOG, Ledger
from unmurk.io.weights import read_weights
from unmurk.problem import Problem
from unmurk.rng import PerImageGenerator, generator
from unmurk.training import Settings, learn
from unmurk.training.checkpoint import Checkpoint
from unmurk.training.trainer import Trainer

PROBLEM = Problem("identity", 0.2)
SETTINGS = Settings(kimg=0.08, batch=8, precision="fp32")
HUGE = torch.zeros(1).expand(10**12)  # one number in the file


def y():
    return torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Small(torch.nn.Module):
    """A network of one kernel and its bias, so that states are small."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t):
        return self.conv(x)


def again(folder):
    torch.manual_seed(0)
    given = {"settings": SETTINGS, "network": Small(), "quiet": True}
    return learn(y(), PROBLEM, "noisy", out=folder, **given)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was interrupted after four of ten steps, its state, and its trainer."""
    folder, update, trainers = tmp_path_factory.mktemp("runs") / "run", Trainer.update, []

    def ends(self):
        if self.step == 4:
            trainers.append(self)
            raise KeyboardInterrupt
        return update(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "update", ends)
        again(folder)
    state = torch.load(folder / "state" / "latest.pt", weights_only=True)
    return folder, state, trainers[0]


MATRIX, VECTOR = 0, 1  # numbers of a kernel and of its bias
ANY = [None, True, -1, math.nan, [], {"a": 1}, HUGE]
PLACES = [
    *((key,) for key in ("step", "seconds", "skipped", "factor", "precision", "best")),
    *((key,) for key in ("modules", "ema", "buffers", "optimizer")),
    ("modules", "prior"),
    ("ema", "posterior"),
    ("modules", "prior", "network.conv.weight"),
    ("optimizer", "state"),
    ("optimizer", "state", MATRIX),
    ("optimizer", "state", MATRIX, "momentum_buffer"),
    ("optimizer", "state", VECTOR),
    ("optimizer", "state", VECTOR, "step"),
    ("optimizer", "state", VECTOR, "exp_avg"),
    ("optimizer", "param_groups"),
    ("optimizer", "param_groups", 0),
    ("optimizer", "param_groups", 0, "params"),
]
GOOD = {("best",): [None], ("buffers",): [{}], ("optimizer", "state"): [{}]}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: "/".join(map(str, place)))
def test_values_of_any_type_in_a_state(place, run):
    folder, state, trainer = run
    file = folder / "state" / "latest.pt"
    for value in ANY:
        if any(type(value) is type(good) and value == good for good in GOOD.get(place, [])):
            continue
        odd = copy.deepcopy(state)
        inner = odd
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        torch.save(odd, file)
        before = file.read_bytes()
        with pytest.raises(InputError, match=r"latest.pt: it is damaged, .* remove the file"):
            trainer.load()
        assert file.read_bytes() == before


def test_files_that_are_no_state(run):
    folder, state, trainer = run
    file = folder / "state" / "latest.pt"
    torch.save(state, file)
    whole = file.read_bytes()
    for data in (b"", whole[:1000], whole[: len(whole) // 2], b"text", whole[:-1]):
        file.write_bytes(data)
        with pytest.raises(InputError, match=r"latest.pt: it is damaged"):
            trainer.load()
    for odd in ([], 3, {}, {**state, "more": 1}, {k: v for k, v in state.items() if k != "best"}):
        torch.save(odd, file)
        with pytest.raises(InputError, match=r"latest.pt: it is damaged"):
            trainer.load()
    with file.open("wb") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(InputError, match="far too large"):
        again(folder)


def test_the_state_itself_is_gone_on_from(run, tmp_path):
    """As if it had never been stopped, bit for bit: the checks change nothing."""
    folder, state, _ = run
    torch.save(state, folder / "state" / "latest.pt")
    prior, _ = again(folder)
    other, _ = again(tmp_path / "other")
    for a, b in zip(prior.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


# -- logs of results -----------------------------------------------------------------------------

ENTRIES = [
    "[" * 100_000,
    "[]",
    "3",
    '{"begun": 3, "by": "x"}',
    '{"begun": [[1]], "by": "x"}',
    '{"begun": "x", "by": "x"}',
    '{"begun": ["x"], "by": 3}',
    '{"file": [], "number": 0, "bytes": 0, "changed": 0, "out": {}, "settings": {}}',
    '{"file": "a", "number": {}, "bytes": 0, "changed": 0, "out": {}, "settings": {}}',
    '{"file": "a", "number": 0, "bytes": 0, "changed": 0, "out": [], "settings": {}}',
    '{"file": "a", "number": 0, "bytes": 0, "changed": 0, "out": {"a": 1}, "settings": {}}',
    '{"file": "a", "number": 0, "bytes": 0, "changed": 0, "out": {}, "settings": 3}',
    '{"file": "a", "number": 0, "bytes": 0, "changed": 0, "out": {}, "settings": [1]}',
    '{"file": "a", "number": ' + "9" * 400 + "}",
]


@pytest.mark.parametrize("line", ENTRIES, ids=lambda line: line[:60])
def test_lines_of_a_log_that_are_none(line, tmp_path):
    """They count as lines that were cut short; those around them hold."""
    (tmp_path / "a.png").write_bytes(b"a")
    log = Ledger(tmp_path / LOG, {"seed": 0})
    log.begin(["b.png"])
    (tmp_path / "b.png").write_bytes(b"b")
    log.end(("in.png", 0, 5, 7), ["b.png"])
    good = (tmp_path / LOG).read_text()
    (tmp_path / LOG).write_text(line + "\n" + good + line + "\n")
    log = Ledger(tmp_path / LOG, {"seed": 0})
    assert log.finished(("in.png", 0, 5, 7), ["b.png"])
    with pytest.raises(InputError, match="is no result of this command"):
        log.check(["a.png"])
    (tmp_path / LOG).write_text(line)
    if not line.startswith(('{"file": ', '{"begun": ')):
        with pytest.raises(InputError, match="is no log of unmurk"):
            Ledger(tmp_path / LOG, {"seed": 0})


def test_the_log_is_written_as_it_is_read(tmp_path):
    log = Ledger(tmp_path / LOG)  # results of any settings
    log.begin(["a.npy"])
    (tmp_path / "a.npy").write_bytes(b"a")
    log.end(("a", 0, 1, 2), ["a.npy"])
    assert [json.loads(s) for s in (tmp_path / LOG).read_text().splitlines()][1][
        "settings"
    ] is None
    assert Ledger(tmp_path / LOG).finished(("a", 0, 1, 2), ["a.npy"])


# -- what is read, and seeds ---------------------------------------------------------------------


def test_a_short_file_of_lines_takes_no_more_memory_than_it_has(tmp_path, monkeypatch):
    from unmurk.io import json_files

    path = tmp_path / "a.json"
    path.write_text('{"a": "' + "x" * (3 * 2**20) + '"}')
    asked, read = [], json_files._up_to

    def noted(file, limit):
        class File:
            def read(self, count):
                asked.append(count)
                return file.read(count)

        return read(File(), limit)

    monkeypatch.setattr(json_files, "_up_to", noted)
    assert len(read_json(path)["a"]) == 3 * 2**20
    assert max(asked) <= 2**20


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, None, "1", math.nan])
def test_seeds_out_of_their_bounds(seed):
    with pytest.raises(InputError, match="^seed must be a whole number from 0 to 9223372"):
        generator(seed)
    with pytest.raises(InputError, match="^seed must be"):
        PerImageGenerator(seed, range(2))


def test_a_log_of_training_that_is_far_too_large_is_not_read(tmp_path):
    from unmurk.training.metric_log import MAX_BYTES, MetricLogger

    with (tmp_path / "metrics.jsonl").open("wb") as sparse:
        sparse.truncate(MAX_BYTES + 1)
    with pytest.raises(InputError, match="metrics.jsonl is far too large for a log of training"):
        MetricLogger(tmp_path / "metrics.jsonl", 10, 8)


def test_torch_prints_no_line_about_a_foreign_pickle_protocol(tmp_path, recwarn):
    file = tmp_path / "weights.pt"
    torch.save({"w": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes().replace(b"\x80\2", b"\x80\0"))
    torch.load(file, weights_only=True)
    assert "protocol" in str(recwarn.pop(UserWarning).message)
    recwarn.clear()
    assert torch.equal(read_weights(file)["w"], torch.ones(2))
    with pytest.raises(InputError, match="latest.pt: it is damaged, or of another version"):
        Checkpoint(tmp_path).parse(file.read_bytes(), {"step": 0}, 1)
    assert not recwarn.list


def alarmed(_number, _frame):
    raise AssertionError("it waits")


def test_no_file_of_a_run_is_waited_for(tmp_path, monkeypatch):
    """A FIFO in the place of any file: an error or the same result, and not a wait for ever."""
    monkeypatch.chdir(tmp_path)
    np.save("y.npy", y().numpy())
    learning = ["learn", "y.npy", "--noise", "0.2", "--kimg", "0.08", "--batch", "8"]
    learning += ["--method", "noisy", "--precision", "fp32", "--out", "run"]
    restoring = ["restore", "y.npy", "--prior", "run", "--out", "found"]
    reporting = ["report", "run"]
    for command in (learning, restoring, reporting):
        assert command_line(command) == 0
    before = signal.signal(signal.SIGALRM, alarmed)
    files = [p for folder in ("run", "found") for p in Path(folder).rglob("*") if p.is_file()]
    assert len(files) >= 10
    try:
        for file in files:
            file.rename("aside")
            os.mkfifo(file)
            used = {"prior", "posterior", "found"} & set(file.parts)
            for command in (restoring,) if used else (learning, reporting):
                signal.alarm(20)
                assert command_line(command) in (0, 2), (file, command[0])
            signal.alarm(0)
            file.unlink(missing_ok=True)
            Path("aside").rename(file)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
