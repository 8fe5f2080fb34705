"""Sets in the package go by name, from any folder; a path of the same name comes first."""

import json

import numpy as np
import pytest

import unmurk
from unmurk.cli import main as cli
from unmurk.io.packaged import SETS


def test_sizes_of_the_sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, count in {"digits:test": 1000, "nuclei": 600, "nuclei:val": 100}.items():
        assert len(unmurk.load_images(name)) == count
    assert len(unmurk.load_images("digits", limit=3)) == 3 and "digits" in SETS


def test_a_set_is_corrupted_by_name(tmp_path, monkeypatch, capsys):
    """The same numbers as `simulate` of the whole set, though it is worked on in batches."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["corrupt", "digits:test", "--noise", "0.3", "--out", "y.npy", "--json"]) == 0
    shown = capsys.readouterr()
    assert "digits:test: the images in the package" in shown.err
    assert json.loads(shown.out)["images"] == 1000
    clean = unmurk.load_images("digits:test").images
    y = unmurk.Problem("identity", 0.3).simulate(clean)
    np.testing.assert_array_equal(np.load("y.npy"), y.numpy())


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    unmurk.save_images(unmurk.load_images("digits", limit=2).images, "nuclei", format="png")
    assert cli.main(["corrupt", "nuclei", "--out", "y.npy", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["images"] == 2
    assert f"nuclei: the file or folder {tmp_path / 'nuclei'}" in shown.err
    with pytest.raises(unmurk.InputError, match="there is nothing at cells"):
        unmurk.load_images("cells")
