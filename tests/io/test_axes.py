"""Axes and channels: every order of axes, in arrays, TIFF and HDF5 files, and in commands."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import unmurk
from unmurk.cli import main as cli
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.io.axes import Selection
from unmurk.io.datasets import as_source, open_source
from unmurk.io.formats.pictures import open_pages
from unmurk.io.images import load_images
from unmurk.io.saving import save_images

SIZES = {"T": 2, "Z": 3, "C": 2, "Y": 5, "X": 4}
STACK = np.random.default_rng(0).integers(0, 65535, tuple(SIZES.values())).astype("uint16")
ORDERS = ["".join(order) for order in itertools.permutations("TZCYX")]


def in_order(axes: str) -> np.ndarray:
    """The stack with its axes in another order; those that are left out have their entry 0."""
    index = tuple(slice(None) if a in axes else 0 for a in SIZES)
    kept = [a for a in SIZES if a in axes]
    return np.ascontiguousarray(STACK[index].transpose([kept.index(a) for a in axes]))


def expected(axes: str, channels: list[int] | None = None) -> np.ndarray:
    """(N, C, H, W), derived from the definition, one number after another."""
    numbered = [a for a in axes if a not in "CYX"]
    wanted = channels if channels is not None else list(range(2 if "C" in axes else 1))
    array, images = in_order(axes), []
    for places in itertools.product(*(range(SIZES[a]) for a in numbered)):
        where = dict(zip(numbered, places, strict=True))
        image = np.empty((len(wanted), 5, 4), array.dtype)
        for c, y, x in np.ndindex(image.shape):
            every = where | {"C": wanted[c], "Y": y, "X": x}
            image[c, y, x] = array[tuple(every[a] for a in axes)]
        images.append(image)
    return np.stack(images)


def numbers(images: torch.Tensor) -> np.ndarray:
    return (images.double() * 65535).round().numpy().astype("uint16")


@pytest.mark.parametrize("axes", ORDERS)
def test_every_order_of_five_axes(axes, tmp_path):
    """As an array, in memory and read from the disk, and as pages of a TIFF file without names."""
    truth = expected(axes)
    np.save(tmp_path / "a.npy", in_order(axes))
    found = load_images(tmp_path / "a.npy", axes=axes)
    np.testing.assert_array_equal(numbers(found.images), truth)
    source = open_source(tmp_path / "a.npy", select=Selection(axes, ("1",)))
    np.testing.assert_array_equal(numbers(source[:]), truth[:, 1:])
    tifffile.imwrite(tmp_path / "a.tif", in_order(axes), photometric="minisblack")
    found = load_images(tmp_path / "a.tif", axes=axes.lower(), channel=(1, 0))
    np.testing.assert_array_equal(numbers(found.images), truth[:, ::-1])


FEWER = [a for n in (2, 3, 4) for a in map("".join, itertools.permutations("TCYX", n))]
FEWER = [a for a in FEWER if {"Y", "X"} <= set(a)]


@pytest.mark.parametrize("axes", FEWER)
def test_every_order_of_fewer_axes(axes, tmp_path):
    np.savez(tmp_path / "a.npz", other=in_order(axes), images=np.zeros(3))
    found = load_images(f"{tmp_path / 'a.npz'}:other", axes=axes)
    np.testing.assert_array_equal(numbers(found.images), expected(axes))
    tifffile.imwrite(tmp_path / "a.tif", in_order(axes), photometric="minisblack")
    found = load_images(tmp_path / "a.tif", axes=axes)
    np.testing.assert_array_equal(numbers(found.images), expected(axes))


@pytest.mark.parametrize("axes", ORDERS[::7])
def test_every_order_in_hdf5(axes, tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("stack", data=in_order(axes), chunks=True, compression="gzip")
    found = load_images(tmp_path / "a.h5", axes=axes, channel=1)
    np.testing.assert_array_equal(numbers(found.images), expected(axes, [1]))
    with h5py.File(tmp_path / "a.h5", "r+") as file:  # the labels of dimensions name them too
        for place, letter in enumerate(axes):
            file["stack"].dims[place].label = letter.lower()
    np.testing.assert_array_equal(numbers(load_images(tmp_path / "a.h5").images), expected(axes))


NAMES = ["DAPI", "Alexa 488", "TRITC"]


def ome(path: Path, axes: str = "TZCYX") -> np.ndarray:
    data = np.arange(2 * 2 * 3 * 8 * 6, dtype="uint16").reshape(2, 2, 3, 8, 6)
    about = {"axes": axes, "Channel": {"Name": NAMES}, "SignificantBits": 12}
    about |= {"PhysicalSizeX": 110, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.12}
    about |= {"PhysicalSizeYUnit": "µm", "PhysicalSizeZ": 0.5, "TimeIncrement": 250}
    about |= {"TimeIncrementUnit": "ms", "Plane": {"ExposureTime": [0.02] * 12}}
    tifffile.imwrite(path, data, ome=True, metadata=about, photometric="minisblack", bigtiff=True)
    return data


@pytest.mark.parametrize("channel", ["alexa 488", 1, "1"])
def test_channels_by_name_and_by_number(channel, tmp_path):
    data = ome(tmp_path / "a.ome.tif")
    with open_pages(tmp_path / "a.ome.tif", Selection(channels=(str(channel),))) as pages:
        assert (len(pages), pages.shape, pages.axes) == (4, (8, 6, 1), "TZCYX")
        np.testing.assert_array_equal(pages.read(2)[..., 0], data[1, 0, 1])
        about = dict(pages.metadata)
    assert "<OME" in about.pop("source")
    assert about == {
        "pixel_size": (0.12, 0.11),
        "z_step": 0.5,
        "time_step": 0.25,
        "exposure": 0.02,
        "channels": ["Alexa 488"],
    }


def test_metadata_of_imagej_and_of_plain_tags(tmp_path):
    data = np.zeros((2, 8, 6), "uint16")
    about = {"axes": "ZYX", "spacing": 0.5, "unit": "um", "finterval": 2.5}
    tifffile.imwrite(tmp_path / "j.tif", data, imagej=True, resolution=(10, 8), metadata=about)
    with open_pages(tmp_path / "j.tif") as pages:
        found = dict(pages.metadata)
    assert found.pop("source").startswith("ImageJ=")
    assert found == {"pixel_size": (0.125, 0.1), "z_step": 0.5, "time_step": 2.5}
    tifffile.imwrite(
        tmp_path / "p.tif", data[0], resolution=(2e4, 1e4), resolutionunit=3, metadata=None
    )
    with open_pages(tmp_path / "p.tif") as pages:
        assert pages.metadata["pixel_size"] == (1.0, 0.5)
    tifffile.imwrite(
        tmp_path / "n.tif", data[0], resolution=(72, 72), resolutionunit=2, metadata=None
    )
    with open_pages(tmp_path / "n.tif") as pages:
        assert "pixel_size" not in pages.metadata  # the resolution of a print


def test_channels_of_pictures_and_samples(tmp_path):
    color = np.random.default_rng(1).integers(0, 255, (6, 5, 3)).astype("uint8")
    for name in ("a.png", "a.bmp", "a.webp"):
        Image.fromarray(color).save(tmp_path / name, lossless=True)
        found = load_images(tmp_path / name, channel=(2, 0), axes="YXC" if name[2] == "p" else "")
        assert torch.equal(found.images[0], torch.from_numpy(color).permute(2, 0, 1)[[2, 0]] / 255)
    tifffile.imwrite(tmp_path / "a.tif", np.stack([color] * 2), photometric="rgb")
    found = load_images(tmp_path / "a.tif", channel=1)
    assert found.images.shape == (2, 1, 6, 5)
    assert torch.equal(found.images[1, 0], torch.from_numpy(color[..., 1]) / 255)
    with pytest.raises(InputError, match="3 channels, numbered from 0, and none is '3'"):
        load_images(tmp_path / "a.png", channel=3)
    with pytest.raises(InputError, match="--axes cannot change"):
        load_images(tmp_path / "a.png", axes="XYC")


REFUSED = [
    ({"axes": "TYX"}, "name each axis of the file"),
    ({"axes": "TZCY"}, "name each axis once"),
    ({"axes": "TTCYX"}, "name each axis once"),
    ({"axes": "T?CYX"}, "name each axis once"),
    ({"channel": "GFP"}, "called DAPI, Alexa 488, TRITC"),
    ({"channel": "7"}, "none is '7'"),
    ({"channel": ("1", "1")}, "give each channel once"),
    ({"axes": "TZSYX", "channel": "9"}, "none is '9'"),
]


@pytest.mark.parametrize(("given", "part"), REFUSED)
def test_what_does_not_fit_is_one_line(given, part, tmp_path):
    ome(tmp_path / "a.ome.tif")
    with pytest.raises(InputError, match=part) as error:
        load_images(tmp_path / "a.ome.tif", **given)
    assert "\n" not in str(error.value)


def test_more_than_16_channels_are_chosen_from(tmp_path):
    data = np.arange(20 * 64, dtype="float32").reshape(20, 8, 8) / 2000
    about = {"axes": "CYX"}
    tifffile.imwrite(tmp_path / "a.tif", data, ome=True, metadata=about, photometric="minisblack")
    np.save(tmp_path / "a.npy", data)
    for path, axes in ((tmp_path / "a.tif", ""), (tmp_path / "a.npy", "CYX")):
        with pytest.raises(InputError, match="at most 16"):
            load_images(path, axes=axes)
        found = load_images(path, axes=axes, channel=(19, 3)).images
        assert torch.equal(found[0], torch.from_numpy(data[[19, 3]]))
        assert load_images(path, axes="ZYX").images.shape == (20, 1, 8, 8)


@pytest.mark.slow
def test_a_run_keeps_axes_and_channels(tmp_path, capsys):
    """`learn` writes them down, and `solve` with the run needs none of them again."""
    data = np.random.default_rng(2).random((3, 2, 32, 32)).astype("float32").transpose(1, 2, 3, 0)
    np.save(tmp_path / "a.npy", np.ascontiguousarray(data))  # C Y X T
    problem = unmurk.Problem("identity", 0.1)
    options = {"method": "noisy", "kimg": 0.002, "batch": 2, "precision": "fp32", "quiet": True}
    path = tmp_path / "a.npy"
    unmurk.learn(path, problem, out=tmp_path / "r", axes="CYXT", channel=1, **options)
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert (config["axes"], config["channels"]) == ("CYXT", ["1"])
    assert config["data"]["shape"] == [3, 1, 32, 32]
    argv = ["solve", tmp_path / "a.npy", "--prior", tmp_path / "r", "--operator", "identity"]
    argv += ["--noise", "0.001", "--steps", "1", "--method", "diffpir", "--out"]
    assert cli.main([str(a) for a in [*argv, tmp_path / "x.npy"]]) == 0
    capsys.readouterr()
    found = np.load(tmp_path / "x.npy").reshape(3, 32, 32)
    assert np.abs(found - data[1].transpose(2, 0, 1)).max() < 0.05  # the noise is small
    # a single picture has other axes and one channel: it is read by its own
    save_images(torch.full((1, 1, 32, 32), 0.5), tmp_path / "one.png")
    argv[1] = tmp_path / "one.png"
    assert cli.main([str(a) for a in [*argv, tmp_path / "o.png"]]) == 0
    argv = ["evaluate", tmp_path / "x.npy", tmp_path / "a.npy", "--axes", "CYXT"]
    capsys.readouterr()
    assert cli.main([str(a) for a in [*argv, "--channel", "1", "--json"]]) == 0
    assert json.loads(capsys.readouterr().out)["psnr"] > 26


def test_commands_restore_chosen_channels_of_a_stack(tmp_path, capsys):
    """The pages of the result are the images; the tags of other channels are not copied."""
    data = ome(tmp_path / "a.ome.tif").astype("float64") / 4095
    torch.manual_seed(0)
    Prior.create("tiny", (1, 4, 4)).save(tmp_path / "prior")
    argv = ["corrupt", tmp_path / "a.ome.tif", "--channel", "TRITC", "--out", tmp_path / "y.npy"]
    assert cli.main([str(a) for a in argv]) == 0
    np.testing.assert_allclose(
        np.load(tmp_path / "y.npy"), data[:, :, 2].reshape(4, 1, 8, 6), atol=1e-6
    )
    argv = ["solve", tmp_path / "a.ome.tif", "--channel", "2", "--prior", tmp_path / "prior"]
    argv += ["--operator", "identity", "--noise", "0.001", "--steps", "1", "--method", "diffpir"]
    assert cli.main([str(a) for a in [*argv, "--out", tmp_path / "x", "--json"]]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 4
    written = tifffile.imread(tmp_path / "x" / "a.ome.tif")
    assert written.shape == (2, 2, 8, 6) and written.dtype == "uint16"


def test_arrays_in_python_have_axes_too():
    source = as_source(STACK, select=Selection("TZCYX", ("0",)))
    np.testing.assert_array_equal(numbers(source[:]), expected("TZCYX", [0]))
    assert unmurk.io.axes.Selection("tyx").axes == "TYX"


COMPRESSIONS = {  # what tifffile writes of it, and the largest error of a number
    **dict.fromkeys(("zlib", "lzw", "packbits", "lzma", "zstd", "png", "lerc"), "uint16"),
    **dict.fromkeys(("jpeg2000", "jpegxl", "jpegxr"), "uint16"),
    **dict.fromkeys(("webp", "jpeg"), "uint8"),
    "deflate": "float32",
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("tiled", [False, True])
def test_every_compression(compression, tiled, tmp_path):
    """Lossless ones exactly; JPEG as tifffile decodes it."""
    kind = np.dtype(COMPRESSIONS[compression])
    color = compression in ("webp", "jpeg")
    data = np.random.default_rng(4).random((2, 32, 48, 3) if color else (2, 32, 48))
    data = (data * (1 if kind.kind == "f" else np.iinfo(kind).max)).astype(kind)
    arguments = {"level": 100} if compression == "jpegxr" else {}
    arguments = {"lossless": True} if compression == "webp" else arguments
    tifffile.imwrite(
        tmp_path / "a.tif",
        data,
        compression=compression,
        compressionargs=arguments or None,
        predictor=compression in ("zlib", "lzw", "zstd", "deflate"),
        tile=(16, 16) if tiled else None,
        photometric="rgb" if color else "minisblack",
    )
    found = load_images(tmp_path / "a.tif", span=(0, 1)).images.permute(0, 2, 3, 1).numpy()
    truth = data if compression not in ("jpeg", "jpegxr") else tifffile.imread(tmp_path / "a.tif")
    np.testing.assert_array_equal(found, truth.reshape(found.shape))


@pytest.mark.parametrize("axes", ["", "ZYX"])
def test_three_planes_of_tifffile(axes, tmp_path, capsys):
    """tifffile writes (3, H, W) as one color image. Where it names the axes they count; else a
    line says what is read, and --axes reads the planes as images, also with a run."""
    data = np.random.default_rng(0).integers(0, 255, (3, 24, 16), np.uint8)
    metadata = {"axes": axes} if axes else None
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="rgb", metadata=metadata or {})
    with open_pages(tmp_path / "a.tif") as pages:
        assert (len(pages), pages.shape) == ((3, (24, 16, 1)) if axes else (1, (24, 16, 3)))
        assert ("--axes NYX" in pages.note) == (not axes)
    with open_pages(tmp_path / "a.tif", Selection("NYX")) as pages:
        assert len(pages) == 3 and not pages.note
        np.testing.assert_array_equal(pages.read(2)[..., 0], data[2])
    argv = ["corrupt", str(tmp_path / "a.tif"), "--out", str(tmp_path / "out")]
    assert cli.main([*argv, "--axes", "NYX"]) == 0
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out" / "a.tif"), data)
    capsys.readouterr()
    assert cli.main(["noise", str(tmp_path / "a.tif")]) == 2  # too few patches
    assert ("--axes NYX reads each as an image" in capsys.readouterr().err) == (not axes)
