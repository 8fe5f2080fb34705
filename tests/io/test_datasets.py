"""Measurements in files: the numbers and the run are those in memory; what is wrong is named."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.training.test_learn import TINY
from unmurk.cli import main as cli
from unmurk.errors import InputError
from unmurk.io.datasets import (
    Array,
    Batches,
    PictureFolder,
    Simulated,
    as_source,
    large,
    open_source,
)
from unmurk.io.images import load_images
from unmurk.io.saving import save_images
from unmurk.io.scale import Scale
from unmurk.problem import Problem
from unmurk.training import learn

ROWS = torch.tensor([3, 0, 3, 5])


def numbers(shape, kind):
    """Random numbers of a type, over all of its range or over [-0.2, 1.2]."""
    draw = np.random.default_rng(0)
    if kind == "float32":
        return draw.uniform(-0.2, 1.2, shape).astype(kind)
    return draw.integers(0, np.iinfo(kind).max, shape, kind, endpoint=True)


def file_of(tmp_path, array):
    np.save(tmp_path / "set.npy", array)
    return tmp_path / "set.npy"


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("shape", [(6, 4, 8), (6, 4, 8, 3), (6, 3, 8, 8)])
def test_rows_of_a_file_are_those_of_load_images(tmp_path, kind, shape):
    """Every layout and type; a view of a mapped array knows where in the file it begins."""
    path = file_of(tmp_path, numbers(shape, kind))
    expected = load_images(path).images
    found = open_source(path)
    assert found.shape == expected.shape and len(found) == 6 and found.ndim == 4
    assert torch.equal(found[ROWS], expected[ROWS])
    assert torch.equal(found[1:3], expected[1:3])
    mapped = np.load(path, mmap_mode="r")
    assert as_source(mapped).file == (path, 128)
    assert torch.equal(as_source(mapped[2:])[torch.tensor([1])], expected[3:4])
    assert as_source(mapped[::2]).file is None  # rows that do not follow each other are not read
    assert torch.equal(as_source(mapped[::2])[torch.tensor([1])], expected[2:3])


def test_other_numbers_have_the_units_of_load_images(tmp_path):
    """Floats are what they are, and images that are not finite are left out alike."""
    array = numbers((6, 4, 8), "float32") * 1000
    array[2, 0, 0] = np.nan
    path = file_of(tmp_path, array)
    expected = load_images(path, skip_bad=True)
    found = open_source(path, skip_bad=True)
    assert torch.equal(found[torch.arange(5)], expected.images)
    assert torch.equal(expected.images[:, 0], torch.from_numpy(np.delete(array, 2, 0)))
    assert found.skipped == expected.skipped == [("00002", "not finite")]
    with pytest.raises(InputError, match="00002.*not finite"):
        open_source(path)


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_rows_of_a_folder_are_those_of_load_images(tmp_path, kind):
    folder = tmp_path / "set"
    scale = replace(Scale.of(kind), format="png")
    save_images(torch.rand(6, 3, 8, 8), folder, scale=scale)
    expected = load_images(folder).images
    assert torch.equal(PictureFolder(folder)[ROWS], expected[ROWS])


def test_bad_pictures_are_left_out_or_named(tmp_path):
    """One that cannot be read and one of another size: left out as `load_images` leaves them."""
    folder = tmp_path / "set"
    save_images(torch.rand(6, 1, 8, 8), folder, format="png")
    (folder / "00001.png").write_bytes(b"broken")
    save_images(torch.rand(1, 1, 4, 8), folder / "00004.png")
    expected = load_images(folder, skip_bad=True)
    found = open_source(folder, skip_bad=True)
    assert torch.equal(found[torch.arange(4)], expected.images)
    assert found.skipped == expected.skipped
    careless = open_source(folder)
    for row, words in [(1, "cannot read .*00001"), (4, "00004.png is 4x8 gray 8-bit, others")]:
        with pytest.raises(InputError, match=words):
            careless[torch.tensor([row])]


def test_fingerprints_tell_sets_apart(tmp_path):
    array = numbers((6, 4, 8), "uint8")
    path = file_of(tmp_path, array)
    first = open_source(path).fingerprint()
    assert first == open_source(path).fingerprint() and json.dumps(first)
    array[5, 0, 0] ^= 1
    assert open_source(file_of(tmp_path, array)).fingerprint() != first
    save_images(torch.rand(3, 1, 8, 8), tmp_path / "set", format="png")
    before = open_source(tmp_path / "set").fingerprint()
    assert before == open_source(tmp_path / "set").fingerprint()
    (tmp_path / "set" / "00001.png").touch()
    assert open_source(tmp_path / "set").fingerprint() != before


def test_simulated_measurements_are_those_of_all_at_once(tmp_path):
    path = file_of(tmp_path, numbers((6, 8, 8), "uint8"))
    problem = Problem("inpaint:random,keep=0.5", 0.1)
    expected = problem.simulate(load_images(path).images, seed=7)
    found = Simulated(open_source(path), problem, 7)
    assert found.shape == expected.shape
    assert torch.equal(found[ROWS], expected[ROWS])


def test_batches_are_read_ahead_and_in_order():
    """While step k is at hand, k + 1 and k + 2 are on their way; a jump back is served too."""
    read = []

    class Counting(Array):
        def read(self, rows):
            read.append(rows[0])
            return super().read(rows)

    y = Counting(np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1), Scale(gain=1.0))
    batches = Batches(y, lambda step: torch.tensor([step, 2 * step]), torch.device("cpu"))
    for step in (0, 1, 2, 3, 1, 2):
        rows, found = batches.batch_at(step)
        assert rows.tolist() == [step, 2 * step] == found.flatten().tolist()
    batches.close()
    assert read[:4] == [0, 1, 2, 3] and set(read) <= set(range(6))


def test_what_cannot_be_read_is_named(tmp_path):
    path = file_of(tmp_path, numbers((6, 8, 8), "uint8"))
    cut = open_source(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="cut short"):
        cut[torch.tensor([5])]
    with pytest.raises(InputError, match="cannot read"):
        open_source(path)  # numpy sees that it is too short
    (tmp_path / "set.txt").touch()
    for path in (tmp_path / "set.txt", tmp_path / "none.npy"):
        with pytest.raises(InputError, match="a folder of pictures or a .npy file"):
            open_source(path)


def losses(run):
    """What metrics.jsonl says of a run, the seconds aside."""
    lines = [json.loads(s) for s in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_a_run_on_a_file_is_the_run_in_memory(tmp_path):
    path = file_of(tmp_path, numbers((24, 8, 8), "uint8"))
    problem = Problem("identity", 0.2)
    kw = {"settings": TINY, "kimg": 0.04, "quiet": True}
    learn(load_images(path).images, problem, "noisy", out=tmp_path / "held", **kw)
    for name, data in [("path", path), ("mapped", np.load(path, mmap_mode="r"))]:
        learn(data, problem, "noisy", out=tmp_path / name, **kw)
        assert losses(tmp_path / name) == losses(tmp_path / "held")
        learn(data, problem, "noisy", out=tmp_path / name, **kw)  # found done
    with pytest.raises(InputError, match="another (data|file_type)"):
        learn(path, problem, "noisy", out=tmp_path / "held", **kw)


def test_a_large_set_is_streamed_with_the_same_result(tmp_path, capsys, monkeypatch):
    """A folder of 100 pictures, one of them broken: left out and listed, streamed or not."""
    folder = tmp_path / "set"
    images = torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    save_images(images, folder, format="png")
    (folder / "00042.png").write_bytes(b"broken")
    argv = ["learn", str(folder), "--noise", "0.1", "--simulate", "--kimg", "0.1"]
    argv += ["--precision", "fp32", "--method", "noisy", "--skip-bad", "--json"]
    monkeypatch.setattr("unmurk.cli.commands.report.page_of", lambda run, data: run)
    found = {}
    for name in ("held", "streamed"):
        monkeypatch.setattr("unmurk.io.source.HELD", 2**30 if name == "held" else 0)
        assert large(folder) == (name == "streamed")
        assert cli.main([*argv, "--out", str(tmp_path / name)]) == 0
        shown = capsys.readouterr()
        assert "left out 00042.png: cannot read" in shown.err
        found[name] = json.loads(shown.out)
        assert found[name]["images"] == 99 and list(found[name]["skipped"]) == ["00042.png"]
    assert losses(tmp_path / "held") == losses(tmp_path / "streamed")
    config = json.loads((tmp_path / "streamed" / "config.json").read_text())
    assert config["data"]["simulated"] == 0
