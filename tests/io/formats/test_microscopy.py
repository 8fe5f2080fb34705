"""ND2, LIF, CZI and OME-Zarr: files of their own libraries, one line for all others."""

import builtins
import json
import lzma
import pickle
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import unmurk
from unmurk.errors import InputError
from unmurk.io.axes import Selection
from unmurk.io.datasets import open_source
from unmurk.io.formats.pictures import open_pages
from unmurk.io.images import load_images
from unmurk.io.jobs import jobs_of, process

RECORDED = Path(__file__).parents[2] / "data" / "cluster.nd2.xz"
DATA = np.random.default_rng(0).integers(0, 60000, (2, 3, 20, 30)).astype("uint16")  # T C Y X


def with_library(name: str):
    """Skip, with the name of the library, where it is missing."""
    return pytest.importorskip(name, reason=f"{name} is not installed")


@pytest.fixture
def nd2_file(tmp_path):
    with_library("nd2")
    path = tmp_path / "cluster.nd2"
    path.write_bytes(lzma.decompress(RECORDED.read_bytes()))
    return path


def test_a_recorded_nd2_file(nd2_file):
    """Against the array of the library itself; 12 bits by its metadata."""
    nd2 = with_library("nd2")
    with nd2.ND2File(nd2_file) as opened:
        truth = opened.asarray().reshape(30, 2, 31, 38)
    found = load_images(nd2_file)
    assert found.scale.bits == 12 and found.names[29] == "cluster-00029.nd2"
    expected = torch.from_numpy(truth.astype("f4")).div(4095)
    assert torch.equal(found.images, expected)
    assert torch.equal(load_images(nd2_file, channel="FM 4-64/2% CHAPS").images, expected[:, 1:])
    other = load_images(nd2_file, axes="ZTCXY").images
    assert torch.equal(other, expected.transpose(2, 3))
    assert torch.equal(open_source(nd2_file.parent)[7:9], expected[7:9])
    with open_pages(nd2_file, Selection(channels=("0",))) as pages:
        about = dict(pages.metadata)
        assert pages.axes == "TZCYX"
    assert about.pop("source") and about == {
        "pixel_size": (0.167808983233, 0.167808983233),
        "z_step": 0.5,
        "channels": ["5-FAM/pH 9.0"],
        "datetime": "18/06/2014  15:55:27",
    }


def test_results_of_a_microscope_are_tiff_files(nd2_file, tmp_path):
    done = process(jobs_of(nd2_file, tmp_path / "out"), lambda y, index: {"images": y})
    assert done.images == 30
    again = load_images(tmp_path / "out" / "cluster.tif", span=(0, 4095)).images
    assert torch.equal(again, load_images(nd2_file).images)


@pytest.fixture
def czi_file(tmp_path):
    czi = with_library("pylibCZIrw.czi")
    path = tmp_path / "a.czi"
    with czi.create_czi(str(path)) as file:
        for t in range(2):
            for c in range(3):
                file.write(DATA[t, c][..., None], plane={"T": t, "C": c, "Z": 0})
        names = {0: "DAPI", 1: "FITC", 2: "TRITC"}
        file.write_metadata("a", channel_names=names, scale_x=1e-7, scale_y=2e-7, scale_z=5e-7)
    return path


def test_a_czi_file(czi_file, tmp_path):
    images = load_images(czi_file).images
    np.testing.assert_array_equal((images * 65535).round().numpy().astype("uint16"), DATA)
    with open_pages(czi_file, Selection(channels=("fitc",))) as pages:
        assert (len(pages), pages.shape, pages.axes) == (2, (20, 30, 1), "TCYX")
        np.testing.assert_array_equal(pages.read(1)[..., 0], DATA[1, 1])
        about = dict(pages.metadata)
    assert "<ImageDocument>" in about.pop("source")
    assert about == {"pixel_size": (0.2, 0.1), "z_step": 0.5, "channels": ["FITC"]}
    czi = with_library("pylibCZIrw.czi")
    color = np.random.default_rng(1).integers(0, 255, (20, 30, 3)).astype("uint8")
    with czi.create_czi(str(tmp_path / "c.czi")) as file:
        file.write(color[..., ::-1].copy(), plane={"T": 0, "C": 0, "Z": 0})  # Bgr24
    with open_pages(tmp_path / "c.czi") as pages:
        assert (pages.axes, pages.dtype) == ("YXS", "uint8")
        np.testing.assert_array_equal(pages.read(0), color)


@pytest.mark.parametrize("same", [True, False])
def test_scenes_number_the_images_or_are_chosen(same, tmp_path):
    czi = with_library("pylibCZIrw.czi")
    width = 30 if same else 24
    with czi.create_czi(str(tmp_path / "a.czi")) as file:
        file.write(DATA[0, 0][..., None], location=(0, 0), scene=0)
        file.write(DATA[1, 1][:, :width, None].copy(), location=(100, 5), scene=1)
    if same:
        found = load_images(tmp_path / "a.czi", span=(0, 1)).images[:, 0].numpy()
        np.testing.assert_array_equal(found, np.stack([DATA[0, 0], DATA[1, 1]]))
        return
    with pytest.raises(InputError, match=r"differ: 0 \(20x30\), 1 \(20x24\): choose one as a.czi"):
        load_images(tmp_path / "a.czi")
    found = load_images(f"{tmp_path / 'a.czi'}:1", span=(0, 1)).images[0, 0].numpy()
    np.testing.assert_array_equal(found, DATA[1, 1][:, :24])
    with pytest.raises(InputError, match="no single image '2'"):
        load_images(f"{tmp_path / 'a.czi'}:2")


AXES = [
    {"name": "t", "type": "time", "unit": "second"},
    {"name": "c", "type": "channel"},
    {"name": "y", "type": "space", "unit": "micrometer"},
    {"name": "x", "type": "space", "unit": "nanometer"},
]
IMAGE = {
    "axes": AXES,
    "datasets": [
        {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [2, 1, 0.2, 100]}]}
    ],
}


@pytest.mark.parametrize("version", [2, 3])
def test_ome_zarr(version, tmp_path):
    """The metadata of versions 0.4 and 0.5."""
    zarr = with_library("zarr")
    path = tmp_path / "set" / "a.ome.zarr"
    group = zarr.open_group(path, mode="w", zarr_format=version)
    group.create_array("0", data=DATA, chunks=(1, 1, 16, 16))
    labels = {"channels": [{"label": name} for name in ("DAPI", "FITC", "TRITC")]}
    about = {"multiscales": [IMAGE], "omero": labels}
    group.attrs.update(about if version == 2 else {"ome": about})
    for place in (path, path.parent, f"{path}:0"):  # also in a folder, and the array itself
        axes = "TCYX" if str(place).endswith(":0") else ""
        found = load_images(place, channel=(2, 0), axes=axes, span=(0, 1)).images.numpy()
        np.testing.assert_array_equal(found, DATA[:, [2, 0]])
    with open_pages(path, Selection(channels=("tritc",))) as pages:
        metadata = dict(pages.metadata)
        assert len(pages) == 2 and pages.axes == "TCYX"
    assert metadata.pop("source")["datasets"][0]["path"] == "0"
    assert metadata == {"pixel_size": (0.2, 0.1), "time_step": 2.0, "channels": ["TRITC"]}
    done = process(jobs_of(path, tmp_path / "out"), lambda y, index: {"images": y})
    assert done.images == 2 and (tmp_path / "out" / "a.ome.tif").is_file()


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("was-unpickled"),)


def test_a_codec_that_unpickles_is_never_run(tmp_path, monkeypatch):
    zarr = with_library("zarr")
    monkeypatch.chdir(tmp_path)
    group = zarr.open_group("a.zarr", mode="w", zarr_format=2)
    group.create_array("0", data=DATA[0, 0], chunks=(20, 30), compressors=None)
    header = Path("a.zarr/0/.zarray")
    found = json.loads(header.read_text()) | {"filters": [{"id": "pickle", "protocol": 5}]}
    header.write_text(json.dumps(found))
    next(f for f in Path("a.zarr/0").iterdir() if f.name == "0.0").write_bytes(
        pickle.dumps(Evil())
    )
    with pytest.raises(InputError, match="a.zarr"):
        load_images("a.zarr:0")
    assert not Path("was-unpickled").exists()


@pytest.mark.parametrize("path", ["../b.zarr/0", "/etc", "1"])
def test_paths_of_ome_zarr_stay_inside(path, tmp_path):
    zarr = with_library("zarr")
    for name in ("a.zarr", "b.zarr"):
        group = zarr.open_group(tmp_path / name, mode="w", zarr_format=2)
        group.create_array("0", data=DATA)
    image = IMAGE | {"datasets": [{"path": path}]}
    zarr.open_group(tmp_path / "a.zarr", mode="a").attrs["multiscales"] = [image]
    with pytest.raises(InputError, match=r"a\.zarr.*(inside|no image)"):
        load_images(tmp_path / "a.zarr")


@pytest.mark.parametrize(
    ("name", "library", "extra"),
    [
        ("a.h5", "h5py", "hdf5"),
        ("a.nd2", "nd2", "microscopy"),
        ("a.lif", "liffile", "microscopy"),
        ("a.czi", "pylibCZIrw", "microscopy"),
        ("a.zarr", "zarr", "microscopy"),
    ],
)
def test_a_missing_library_is_named(name, library, extra, tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(module, *args, **kwargs):
        if module.split(".")[0] == library:
            raise ModuleNotFoundError(f"No module named '{library}'")
        return real(module, *args, **kwargs)

    for loaded in [m for m in __import__("sys").modules if m.split(".")[0] == library]:
        monkeypatch.delitem(__import__("sys").modules, loaded)
    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setattr(
        unmurk.io.formats.optional.importlib, "import_module", lambda module: missing(module)
    )
    path = tmp_path / name
    path.mkdir() if name == "a.zarr" else path.write_bytes(b"0" * 100)
    with pytest.raises(InputError) as error:
        load_images(path)
    assert str(error.value) == f"cannot read {path}: pip install 'unmurk[{extra}]'"


def changed(data: bytes, draws: random.Random) -> bytes:
    """A file that is cut short, or has some bytes replaced, most of them near its ends."""
    if draws.random() < 0.3:
        return data[: draws.randrange(len(data))]
    found = bytearray(data)
    for _ in range(draws.randint(1, 20)):
        near = draws.choice([64, 1024, len(found)])
        place = draws.randrange(min(near, len(found)))
        found[place if draws.random() < 0.7 else -1 - place] = draws.randrange(256)
    return bytes(found)


def damaged(path: Path, count: int) -> None:
    """Every damaged copy is read, or refused in one line that names it."""
    draws = random.Random(0)
    whole = path.read_bytes()
    refused = 0
    for _ in range(count):
        path.write_bytes(changed(whole, draws))
        try:
            load_images(path, limit=2)
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > count / 10


def test_damaged_nd2_files(nd2_file):
    damaged(nd2_file, 40)


def test_damaged_czi_files(czi_file):
    damaged(czi_file, 15)


def test_damaged_hdf5_files(tmp_path):
    h5py = with_library("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=DATA[0], chunks=(1, 20, 30), compression="gzip")
    damaged(tmp_path / "a.h5", 150)


def test_damaged_ome_zarr(tmp_path):
    """Its metadata are damaged, its chunks, and what they declare."""
    zarr = with_library("zarr")
    draws = random.Random(1)
    whole = tmp_path / "whole.zarr"
    group = zarr.open_group(whole, mode="w", zarr_format=2)
    group.create_array("0", data=DATA, chunks=(1, 1, 20, 30))
    group.attrs["multiscales"] = [IMAGE]
    refused = 0
    for number in range(25):
        path = tmp_path / f"{number}.zarr"
        shutil.copytree(whole, path)
        file = path / draws.choice([".zattrs", "0/.zarray", "0/0.0.0.0"])
        file.write_bytes(changed(file.read_bytes(), draws))
        try:
            load_images(path)
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 5
    header = json.loads((whole / "0/.zarray").read_text())
    header |= {"shape": [2**20, 3, 2**12, 2**12], "chunks": [1, 1, 2**12, 2**12]}
    (whole / "0/.zarray").write_text(json.dumps(header))
    with pytest.raises(InputError, match="it declares"):
        load_images(whole)


# -- LIF ------------------------------------------------------------------------------------------


def lif_bytes(images: dict[str, np.ndarray]) -> bytes:
    """A minimal LIF file of images (Z, C, Y, X), by the published structure of the format.

    Leica's container (LAS AF "LIF File Format" and the readers after it): the integer 0x70, the
    size of what follows, the byte 0x2A, a number of letters, and XML in UTF-16. Then for each
    memory block 0x70, a size, 0x2A, its length as a 64-bit integer, 0x2A, a number of letters, its
    name, and the pixels. The XML gives every image channels and dimensions with their bytes from
    one step to the next.
    """
    elements, blocks = [], b""
    for number, (name, image) in enumerate(images.items()):
        z, c, y, x = image.shape
        size = image.itemsize
        steps = {1: (x, size), 2: (y, size * x), 3: (z, size * x * y * c)}
        channels = "".join(
            f'<ChannelDescription DataType="0" ChannelTag="0" Resolution="{8 * size}"'
            f' NameOfMeasuredQuantity="" Min="0" Max="{256**size - 1}" Unit="" LUTName="Gray"'
            f' IsLUTInverted="0" BytesInc="{i * size * x * y}" BitInc="0"/>'
            for i in range(c)
        )
        dimensions = "".join(
            f'<DimensionDescription DimID="{i}" NumberOfElements="{n}" Origin="0" Unit="m"'
            f' Length="{(n - 1) * 2e-7}" BytesInc="{step}" BitInc="0"/>'
            for i, (n, step) in steps.items()
        )
        block = f"MemBlock_{number}"
        elements.append(
            f'<Element Name="{name}" Visibility="1"><Data><Image><ImageDescription><Channels>'
            f"{channels}</Channels><Dimensions>{dimensions}</Dimensions></ImageDescription>"
            f'</Image></Data><Memory Size="{image.nbytes}" MemoryBlockID="{block}"/></Element>'
        )
        head = struct.pack("<IIBQ", 0x70, 14 + 2 * len(block), 0x2A, image.nbytes)
        head += struct.pack("<BI", 0x2A, len(block))
        blocks += head + block.encode("utf-16-le") + image.tobytes()
    xml = (
        '<LMSDataContainerHeader Version="2"><Element Name="all"><Data><Experiment/></Data>'
        f"<Children>{''.join(elements)}</Children></Element></LMSDataContainerHeader>"
    )
    head = struct.pack("<IIBI", 0x70, 2 * len(xml) + 5, 0x2A, len(xml))
    return head + xml.encode("utf-16-le") + blocks


def test_a_lif_file_written_by_the_format(tmp_path):
    """Series of several images, channels and focal planes; sizes of a pixel; one line if cut."""
    with_library("liffile")
    draw = np.random.default_rng(4)
    one = draw.integers(0, 60000, (3, 2, 20, 30)).astype("<u2")
    other = draw.integers(0, 200, (1, 1, 16, 24)).astype("u1")
    file = tmp_path / "cells.lif"
    file.write_bytes(lif_bytes({"Series001": one, "Series002": other}))
    with pytest.raises(InputError, match=r"Series001"):
        load_images(file)  # they differ, and none is chosen
    found = load_images(f"{file}:Series001")
    expected = torch.from_numpy(one.astype("f4") / 65535)
    torch.testing.assert_close(found.images, expected, rtol=0, atol=1e-7)
    assert torch.equal(load_images(f"{file}:Series001", channel="1").images, found.images[:, 1:])
    small = load_images(f"{file}:Series002").images
    torch.testing.assert_close(small[0, 0], torch.from_numpy(other[0, 0] / 255).float())
    with open_pages(file, Selection(member="Series001")) as pages:
        assert pages.metadata["pixel_size"] == pytest.approx((0.2, 0.2))
        assert pages.metadata["z_step"] == pytest.approx(0.2)
    data = file.read_bytes()
    file.write_bytes(data[:-400])
    with pytest.raises(InputError) as caught:
        load_images(f"{file}:Series002")
    assert "\n" not in str(caught.value)
