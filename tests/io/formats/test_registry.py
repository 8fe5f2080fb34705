"""Readers of one's own, by decorator and by entry point: every command reads their files."""

import json
from importlib import metadata
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

import unmurk
from unmurk.cli import main as cli
from unmurk.diffusion.prior import Prior
from unmurk.io import formats
from unmurk.io.datasets import open_source
from unmurk.io.formats import readers, registry
from unmurk.io.formats.pictures import open_pages

CUBE = np.random.default_rng(0).integers(0, 4095, (3, 16, 16)).astype("uint16")


class Cube(formats.Pages):
    """A file that is an array of 12-bit numbers, under another name."""

    def __init__(self, file: Path) -> None:
        self.file, self.array = file, np.load(BytesIO(file.read_bytes()))
        self.shape, self.dtype, self.bits = (*self.array.shape[1:], 1), "uint16", 12
        self.axes, self.metadata = "ZYX", {"exposure": 0.1}

    def __len__(self) -> int:
        return len(self.array)

    def read(self, page: int) -> np.ndarray:
        return self.array[page][..., None]


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    monkeypatch.setattr(registry, "_readers", dict(registry._readers))
    registry._plugins.cache_clear()
    yield
    registry._plugins.cache_clear()


@pytest.fixture
def cube(tmp_path):
    file = tmp_path / "set" / "scan.cube.gz"
    file.parent.mkdir()
    with file.open("wb") as stream:
        np.save(stream, CUBE)
    return file


def by_decorator(monkeypatch):
    assert formats.register("cube", suffixes=(".cube.gz",))(Cube) is Cube


def by_entry_point(monkeypatch):
    entry = metadata.EntryPoint("cube.gz", f"{__name__}:Cube", registry.GROUP)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry])


@pytest.mark.parametrize("add", [by_decorator, by_entry_point])
def test_a_registered_format_is_read_everywhere(add, cube, tmp_path, monkeypatch, capsys):
    """12 bits by its metadata; page by page; results are TIFF files."""
    add(monkeypatch)
    with open_pages(cube) as pages:
        assert (len(pages), pages.axes, pages.metadata["exposure"]) == (3, "ZYX", 0.1)
    expected = torch.from_numpy(CUBE.astype("f4")).div(4095)[:, None]
    for path in (cube, cube.parent):
        data = unmurk.load_images(path)
        assert torch.equal(data.images, expected) and data.scale.bits == 12
    assert data.names == [f"scan-0000{i}.cube.gz" for i in range(3)]
    assert torch.equal(open_source(cube.parent)[:], expected)
    torch.manual_seed(0)
    Prior.create("tiny", (1, 16, 16)).save(tmp_path / "prior")
    argv = ["solve", cube.parent, "--prior", tmp_path / "prior", "--operator", "identity"]
    argv += ["--noise", "0.1", "--steps", "1", "--out", tmp_path / "out", "--json"]
    assert cli.main([str(a) for a in argv]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 3
    written = tifffile.imread(tmp_path / "out" / "scan.tif")
    assert written.shape == (3, 16, 16) and written.dtype == "uint16" and written.max() <= 4095
    argv = ["corrupt", cube.parent, "--out", tmp_path / "y"]
    assert cli.main([str(a) for a in argv]) == 0
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "y" / "scan.tif"), CUBE)


def test_an_unknown_suffix_is_no_picture(cube):
    with pytest.raises(unmurk.InputError, match="there is no PNG, JPEG, TIFF or BMP picture"):
        unmurk.load_images(cube.parent)
    with pytest.raises(unmurk.InputError, match="no reader is known"):
        readers.reader_of(Path("scan.xyz"))


def test_a_broken_entry_point_is_one_line_when_it_is_needed(cube, monkeypatch):
    entry = metadata.EntryPoint("cube.gz", "no_such_package:Cube", registry.GROUP)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry])
    unmurk.load_images("nuclei:val", limit=1)  # other files are read all the same
    with pytest.raises(
        unmurk.InputError, match="its reader cannot be loaded from no_such_package:Cube"
    ) as error:
        unmurk.load_images(cube)
    assert "\n" not in str(error.value)


def test_readers_are_not_trusted(cube, tmp_path):
    """Whatever a reader does wrong is one line with the file's name."""

    def wrong(**changes):
        class Wrong(Cube):
            def __init__(self, file):
                super().__init__(file)
                for name, value in changes.items():
                    setattr(self, name, value)

        return Wrong

    class Failing(Cube):
        def read(self, page):
            raise KeyError("inside")

    cases = [
        (wrong(shape=(2**20, 2**20, 1)), "the limit is"),
        (wrong(shape=(4, 4, 1)), "declared are"),
        (wrong(dtype="complex64"), "holds 3 images of complex64"),
        (Failing, "inside"),
        (lambda file: None, "cannot read"),
    ]
    for number, (reader, part) in enumerate(cases):
        file = tmp_path / f"a.wrong{number}"
        file.write_bytes(cube.read_bytes())
        formats.register(f"wrong{number}", (f".wrong{number}",))(reader)
        with pytest.raises(unmurk.InputError, match=part) as error:
            unmurk.load_images(file)
        assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_registration_is_checked():
    with pytest.raises(unmurk.InputError, match="written as '.fits', not 'fits'"):
        formats.register("fits", ("fits",))
    with pytest.raises(unmurk.InputError, match="'TIFF' reads .tif files already"):
        formats.register("mine", (".tif",))
