"""Results come back in the format, type, range, axes and metadata that their files came in."""

import errno
import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms, PngImagePlugin

from tests.cli.calls import unmurk as command
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.io import formats
from unmurk.io.axes import Selection
from unmurk.io.formats import registry, tiff_writer
from unmurk.io.formats.tiff import Stack
from unmurk.io.formats.writing import TiffWriter
from unmurk.io.images import load_images
from unmurk.io.job_list import jobs_of, scene_jobs
from unmurk.io.jobs import process
from unmurk.io.streams import NpyWriter

rng = np.random.default_rng(0)


def through(source: Path, out: Path, grow: int = 1) -> None:
    """An engine that changes nothing, or that repeats every pixel."""

    def engine(y, numbers):
        y = y.repeat_interleave(grow, 2).repeat_interleave(grow, 3)
        return {"images": y, "std": y / 4}

    process(jobs_of(source, out), engine, history="a line")


# -- TIFF -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["lzw", "zlib", "zstd", "packbits", "lzma"])
def test_the_compression_is_kept(how, tmp_path):
    data = rng.integers(0, 65536, (2, 33, 40), np.uint16)
    predictor = how in ("lzw", "zlib", "zstd")
    tifffile.imwrite(
        tmp_path / "a.tif", data, compression=how, predictor=predictor, photometric="minisblack"
    )
    through(tmp_path / "a.tif", tmp_path / "out")
    with (
        tifffile.TiffFile(tmp_path / "a.tif") as old,
        tifffile.TiffFile(tmp_path / "out" / "a.tif") as new,
    ):
        np.testing.assert_array_equal(new.asarray(), data)
        assert new.pages[0].compression == old.pages[0].compression
        assert new.pages[0].predictor == old.pages[0].predictor


def ome(path: Path) -> np.ndarray:
    data = rng.integers(0, 4095, (2, 3, 12, 16)).astype("uint16")
    about = {"axes": "ZCYX", "PhysicalSizeX": 0.2, "PhysicalSizeXUnit": "µm"}
    about |= {"PhysicalSizeY": 0.3, "PhysicalSizeYUnit": "µm", "SignificantBits": 12}
    tifffile.imwrite(path, data, ome=True, metadata=about, photometric="minisblack")
    return data


def imagej(path: Path) -> np.ndarray:
    data = rng.integers(0, 4095, (2, 3, 12, 16)).astype("uint16")
    about = {"axes": "ZCYX", "spacing": 0.5, "unit": "um", "min": 3.0, "max": 99.0}
    about |= {"Ranges": (3.0, 99.0, 5.0, 80.0, 1.0, 9.0), "Info": "a stain"}
    tifffile.imwrite(path, data, imagej=True, resolution=(5, 10 / 3), metadata=about)
    return data


def pixel_size(file: Path) -> tuple[float, float]:
    """Height and width of a pixel, as tifffile finds them."""
    with tifffile.TiffFile(file) as found:
        if found.is_ome:
            pixels = tifffile.xml2dict(found.ome_metadata)["OME"]["Image"]["Pixels"]
            assert (pixels["SizeY"], pixels["SizeX"]) == found.pages[0].shape
            return pixels["PhysicalSizeY"], pixels["PhysicalSizeX"]
        values = [found.pages[0].tags[f"{axis}Resolution"].value for axis in "YX"]
        return tuple(bottom / top for top, bottom in values)


@pytest.mark.parametrize("make", [ome, imagej])
def test_finer_pixels_and_floats_beside(make, tmp_path):
    """Axes and the size of a pixel hold for images of twice the side and for float32."""
    data = make(tmp_path / "a.tif")
    through(tmp_path / "a.tif", tmp_path / "out", grow=2)
    with tifffile.TiffFile(tmp_path / "out" / "a.tif") as found:
        assert found.series[0].axes == "ZCYX" and found.series[0].shape == (2, 3, 24, 32)
        np.testing.assert_array_equal(found.asarray(), data.repeat(2, 2).repeat(2, 3))
    with tifffile.TiffFile(tmp_path / "out" / "a-std.tif") as found:
        assert found.series[0].axes == "ZCYX" and found.series[0].dtype == np.float32
        np.testing.assert_allclose(found.asarray()[..., ::2, ::2], data / 4, rtol=1e-6)
        assert "max=" not in found.pages[0].description
        about = found.imagej_metadata or {}  # no limits of a display of other numbers
        assert "Ranges" not in about and about.get("Info") == ("a stain" if about else None)
    if make is imagej:
        with tifffile.TiffFile(tmp_path / "out" / "a.tif") as found:
            assert found.imagej_metadata["Ranges"] == (3.0, 99.0, 5.0, 80.0, 1.0, 9.0)
    for name in ("a.tif", "a-std.tif"):
        assert pixel_size(tmp_path / "out" / name) == pytest.approx((0.15, 0.1))
    assert pixel_size(tmp_path / "a.tif") == pytest.approx((0.3, 0.2))


def pyramid(path: Path, planar: bool = False) -> np.ndarray:
    """An OME-TIFF with two smaller copies of each page, in tiles; colors or three channels."""
    data = rng.integers(0, 4095, (64, 96, 3) if planar else (3, 64, 96)).astype("uint16")
    about = {"photometric": "rgb" if planar else "minisblack", "tile": (32, 16)}
    with tifffile.TiffWriter(path, ome=True) as writer:
        for step in (1, 2, 4):
            part = data[::step, ::step] if planar else data[:, ::step, ::step]
            kind = {"subifds": 2} if step == 1 else {"subfiletype": 1}
            kind |= {"metadata": {"axes": "YXS" if planar else "CYX"}} if step == 1 else {}
            writer.write(part, compression="zlib", **about, **kind)
    return data


@pytest.mark.parametrize("planar", [False, True])
def test_tiles_and_the_smaller_copies_of_a_pyramid_come_back(planar, tmp_path):
    """The copies are means of the results, also at twice the size and beside as deviations."""
    data = pyramid(tmp_path / "a.ome.tif", planar)
    for grow in (1, 2):
        out = tmp_path / str(grow)
        through(tmp_path / "a.ome.tif", out, grow=grow)
        for name, scale in (("a.ome.tif", 1), ("a.ome-std.tif", 0.25)):
            with tifffile.TiffFile(out / name) as found:
                assert found.pages[0].tile == (32, 16) and len(found.series) == 1
                levels = found.series[0].levels
                assert [level.axes for level in levels] == ["YXS" if planar else "CYX"] * 3
                wanted = data if planar else np.moveaxis(data, 0, -1)
                wanted = wanted.repeat(grow, 0).repeat(grow, 1) * scale
                for level in levels:
                    pixels = level.asarray() if planar else np.moveaxis(level.asarray(), 0, -1)
                    h, w = len(wanted) // len(pixels), wanted.shape[1] // pixels.shape[1]
                    means = wanted.reshape(len(pixels), h, pixels.shape[1], w, 3).mean((1, 3))
                    assert h == w and np.abs(pixels - means).max() <= (0.5 if scale == 1 else 1e-3)
                assert [len(wanted) // level.keyframe.shape[0] for level in levels] == [1, 2, 4]
        assert load_images(out / "a.ome.tif").images.shape == (1, 3, 64 * grow, 96 * grow)


@pytest.mark.parametrize("kind", ["gray", "stack", "rgb", "planar", "palette", "float", "white"])
def test_results_of_tifffile_s_own_series_are_read_again(kind, tmp_path, caplog):
    """The description of a series that tifffile writes fits what was written."""
    shape = {"stack": (3, 33, 49), "rgb": (33, 49, 3), "planar": (3, 33, 49)}.get(kind, (33, 49))
    data = rng.integers(0, 255, shape).astype("float32" if kind == "float" else "uint8")
    about = {"photometric": "minisblack"}
    if kind in ("rgb", "planar"):
        about = {"photometric": "rgb", "planarconfig": "contig" if kind == "rgb" else "separate"}
    if kind == "palette":
        colors = np.arange(256, dtype=np.uint16) * 257
        about = {"photometric": "palette", "colormap": np.stack([colors] * 3)}
    if kind == "white":
        about = {"photometric": "miniswhite"}
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        if kind in ("palette", "stack"):  # without smaller copies
            writer.write(data, **about)
        else:
            writer.write(data, subifds=1, tile=(16, 32), **about)
            part = (slice(None, None, 2), slice(None, None, 2))
            small = data[:, *part] if kind == "planar" else data[part]
            writer.write(small, subfiletype=1, tile=(16, 32), **about)
    first = load_images(tmp_path / "a.tif").images
    through(tmp_path / "a.tif", tmp_path / "once")
    through(tmp_path / "once" / "a.tif", tmp_path / "twice")
    for name in ("once/a.tif", "twice/a.tif", "once/a-std.tif"):
        scale = 0.25 if "std" in name else 1
        again = load_images(tmp_path / name, span=(0, 255 if scale < 1 and kind != "float" else 1))
        with tifffile.TiffFile(tmp_path / name) as found:
            assert len(found.series[0].levels) == (1 if kind in ("palette", "stack") else 2)
        if scale == 1:
            same = load_images(tmp_path / name).images
            assert torch.equal(same, first)
        assert again.images.shape == first.shape
    assert not caplog.records  # tifffile's complaints


@pytest.mark.parametrize(
    "sides",
    [[(20_000, 20_000)], [(64, 96)] * 50, [(63, 96), (62, 96)], [(32, 48), (32, 48)], [(128, 8)]],
    ids=["larger", "many", "hardly smaller", "repeated", "longer"],
)
def test_what_is_no_pyramid_is_not_copied(sides, tmp_path):
    """Sizes of SubIFDs are those of the file: together they cannot ask for more than two pages."""
    with tifffile.TiffWriter(tmp_path / "a.tif", ome=True) as writer:
        page, how = np.full((64, 96), 9, np.uint8), {"photometric": "minisblack"}
        writer.write(page, subifds=len(sides), metadata={"axes": "YX"}, **how)
        for side in sides:
            part = np.broadcast_to(np.uint8(1), side)
            writer.write(part, subfiletype=1, compression="zlib", **how)
    with Stack(tmp_path / "a.tif") as stack:
        assert stack.levels() == []
    through(tmp_path / "a.tif", tmp_path / "out")
    with tifffile.TiffFile(tmp_path / "out" / "a.tif") as found:
        assert not found.pages[0].subifds
        assert (found.asarray() == 9).all()


def test_a_tile_far_larger_than_its_page_becomes_strips(tmp_path):
    page = np.full((64, 96), 9, np.uint8)
    for side, kept in ((1024, (1024, 1024)), (2048, None)):
        file = tmp_path / f"{side}.tif"
        tifffile.imwrite(file, page, tile=(side, side), compression="zlib")
        with Stack(file) as stack:
            assert stack.tile() == kept


def test_means_of_large_integers_do_not_overflow():
    for dtype in ("uint64", "int64", "uint8"):
        white = np.full((4, 4, 1), np.iinfo(dtype).max, dtype)
        assert (tiff_writer._smaller(white, (2, 2)) == np.iinfo(dtype).max).all()


# -- PNG and photographs --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_texts_of_a_png_come_back(dtype, tmp_path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Title", "a cell")
    texts.add_itxt("Comment", "größer", zip=True)
    data = rng.integers(0, np.iinfo(dtype).max, (12, 16)).astype(dtype)
    Image.fromarray(data).save(tmp_path / "a.png", pnginfo=texts, dpi=(300, 150))
    through(tmp_path / "a.png", tmp_path / "out", grow=2)
    with Image.open(tmp_path / "out" / "a.png") as found:
        np.testing.assert_array_equal(np.asarray(found), data.repeat(2, 0).repeat(2, 1))
        assert found.text == {"Title": "a cell", "Comment": "größer"}
        assert found.info["dpi"] == pytest.approx((600, 300), abs=0.05)
    with tifffile.TiffFile(tmp_path / "out" / "a-std.tif") as found:
        np.testing.assert_allclose(found.asarray()[::2, ::2], data / 4, rtol=1e-6)


def test_a_photograph_becomes_png(tmp_path, capsys):
    """Exif without the orientation, as the pixels are turned; resolution, profile, comment."""
    exif = Image.Exif()
    exif[271], exif[274] = "a camera", 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = Image.fromarray(rng.integers(0, 255, (16, 24, 3), np.uint8))
    picture.save(
        tmp_path / "a.jpg", exif=exif, icc_profile=profile, dpi=(300, 150), comment=b"by me"
    )
    picture.convert("L").save(tmp_path / "b.jpg", icc_profile=profile)
    picture.save(tmp_path / "c.bmp", dpi=(100, 100))
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "b.jpg", "c.bmp"):
        (tmp_path / name).rename(tmp_path / "in" / name)
    assert command("corrupt", tmp_path / "in", "--out", tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert said.count("results of .jpg files are written as PNG files") == 1
    assert said.count("results of .bmp files are written as PNG files") == 1
    with Image.open(tmp_path / "out" / "a.png") as found, Image.open(tmp_path / "in/a.jpg") as old:
        assert found.size == (16, 24) and dict(found.getexif()) == {271: "a camera"}
        turned = old.transpose(Image.Transpose.ROTATE_270)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(turned))
        assert found.info["icc_profile"] == profile and found.text == {"Comment": "by me"}
        assert found.info["dpi"] == pytest.approx((150, 300), abs=0.05)
    with Image.open(tmp_path / "out" / "b.png") as found:
        assert "icc_profile" not in found.info  # one of color does not fit gray pixels
    with Image.open(tmp_path / "out" / "c.png") as found:
        assert found.info["dpi"] == pytest.approx((100, 100), abs=0.05)


# -- formats of one's own -------------------------------------------------------------------------


@pytest.fixture
def cube(tmp_path, monkeypatch):
    """A format of a microscope: three slices of two channels."""
    monkeypatch.setattr(registry, "_readers", dict(registry._readers))
    data = rng.integers(0, 4095, (3, 12, 16, 2)).astype("uint16")

    class Cube(formats.Pages):
        def __init__(self, file: Path) -> None:
            self.file, self.shape, self.dtype = file, (12, 16, 2), "uint16"
            self.bits, self.axes = 12, "ZYXC"
            self.metadata = {"pixel_size": (0.3, 0.2), "z_step": 0.5, "channels": ["DAPI", "GFP"]}

        def __len__(self) -> int:
            return 3

        def read(self, page: int) -> np.ndarray:
            return data[page]

    (tmp_path / "in").mkdir()
    for name in ("a.cube", "b.cube"):
        (tmp_path / "in" / name).write_bytes(b"x")
    return Cube, data


def test_a_format_that_is_not_written_becomes_ome_tiff(cube, tmp_path, capsys):
    """Size of a pixel, distance of slices and names of channels, read by tifffile; said once."""
    formats.register("cube", (".cube",))(cube[0])
    assert command("corrupt", tmp_path / "in", "--out", tmp_path / "out") == 0
    said = "results of .cube files are written as TIFF files"
    assert capsys.readouterr().err.count(said) == 1
    with tifffile.TiffFile(tmp_path / "out" / "b.tif") as found:
        assert found.series[0].axes == "ZCYX"
        np.testing.assert_array_equal(found.asarray(), np.moveaxis(cube[1], -1, 1))
        pixels = tifffile.xml2dict(found.ome_metadata)["OME"]["Image"]["Pixels"]
        assert (pixels["PhysicalSizeX"], pixels["PhysicalSizeY"]) == (0.2, 0.3)
        assert (pixels["PhysicalSizeZ"], pixels["PhysicalSizeZUnit"]) == (0.5, "µm")
        assert [channel["Name"] for channel in pixels["Channel"]] == ["DAPI", "GFP"]


@pytest.mark.parametrize(("repeats", "shape"), [(1, (4, 3)), (2, (2, 3)), (12, (1, 1))])
def test_times_and_planes_of_a_chosen_channel_stay_apart(repeats, shape, tmp_path):
    """T, Z, bits, sizes and the time between scenes, as tifffile reads them."""
    data = rng.integers(0, 4095, (4, 3, 2, 12, 16)).astype("uint16")
    about = {"axes": "TZCYX", "PhysicalSizeX": 0.2, "PhysicalSizeY": 0.3, "PhysicalSizeZ": 0.5}
    about |= {"TimeIncrement": 250, "TimeIncrementUnit": "ms", "SignificantBits": 12}
    about |= {"Channel": {"Name": ["DAPI", "GFP"]}}
    tifffile.imwrite(tmp_path / "a.ome.tif", data, metadata=about, photometric="minisblack")
    select = Selection(channels=("GFP",), repeats=repeats)
    jobs = jobs_of(tmp_path / "a.ome.tif", tmp_path / "out", select=select)
    process(scene_jobs(jobs, repeats), lambda y, n: {"images": y.mean(1) if repeats > 1 else y})
    wanted = data[:, :, 1].reshape(shape[0], 4 // shape[0], shape[1], 3 // shape[1], 12, 16)
    with tifffile.TiffFile(tmp_path / "out" / "a.ome.tif") as found:
        (series,) = found.series
        lead = series.shape[: series.axes.index("Y")]
        assert dict(zip(series.axes, lead, strict=False)) == {
            axis: length for axis, length in zip("TZ", shape, strict=True) if length > 1
        }
        got = found.asarray().reshape(*shape, 12, 16)
        assert np.abs(got - wanted.mean((1, 3))).max() <= 0.5
        pixels = tifffile.xml2dict(found.ome_metadata)["OME"]["Image"]["Pixels"]
    assert pixels["SignificantBits"] == 12 and pixels["Channel"]["Name"] == "GFP"
    assert (pixels["SizeT"], pixels["SizeZ"], pixels["PhysicalSizeZ"]) == (*shape, 0.5)
    assert pixels["TimeIncrement"] == pytest.approx(0.25 * 4 / shape[0])


def test_a_writer_of_ones_own(cube, tmp_path, capsys):
    """It gets the file, the source and the line; what it writes has the name of the source."""
    written = []

    class Written(NpyWriter):
        def __init__(self, out: Path, source: Path, history: str, floats: bool) -> None:
            super().__init__(out, (3, 12, 16, 2), "uint16")
            self.place = 0
            written.append((out.name, source.name, history[:7], floats))

        def write(self, pixels: np.ndarray) -> None:
            super().write(self.place, pixels[None])
            self.place += 1

    formats.register("cube", (".cube",), writer=Written)(cube[0])
    assert command("corrupt", tmp_path / "in", "--out", tmp_path / "out") == 0
    assert capsys.readouterr().err == ""
    assert written == [(n, n, "unmurk ", False) for n in ("a.cube", "b.cube")]
    np.testing.assert_array_equal(
        np.load(BytesIO((tmp_path / "out" / "a.cube").read_bytes())), cube[1]
    )


# -- nothing half-written -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tif", "fits", "nii.gz", "dcm", "h5"])
def test_a_writer_that_fails_leaves_nothing(kind, tmp_path, monkeypatch, capsys):
    """The disk is full when the file is finished: one line, and no file of any name."""
    source = tmp_path / f"a.{kind}"
    pixels = rng.integers(0, 255, (16, 16), np.uint8)
    if kind == "tif":
        tifffile.imwrite(source, pixels)
    elif kind == "fits":
        pytest.importorskip("astropy.io.fits").PrimaryHDU(pixels).writeto(source)
    elif kind == "nii.gz":
        nib = pytest.importorskip("nibabel")
        nib.save(nib.Nifti1Image(pixels[..., None], np.eye(4)), source)
    elif kind == "h5":
        with pytest.importorskip("h5py").File(source, "w") as file:
            file["stack"] = pixels
    else:
        pytest.importorskip("pydicom")
        from tests.io.formats.test_medical import scan

        scan(pytest.importorskip("pydicom"), source, pixels[None])

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert command("corrupt", source, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No space left on device" in said
    assert not (tmp_path / "out").exists()


def test_an_exception_inside_a_writer_leaves_nothing(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", rng.integers(0, 255, (5, 16, 16), np.uint8))
    write = TiffWriter.write

    def broken(writer: TiffWriter, pixels: np.ndarray) -> None:
        write(writer, pixels)
        if writer.floats:
            raise KeyboardInterrupt

    monkeypatch.setattr(TiffWriter, "write", broken)
    with pytest.raises(KeyboardInterrupt):
        through(tmp_path / "a.tif", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_name_of_another_format_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", rng.integers(0, 255, (16, 16), np.uint8))
    with pytest.raises(InputError, match="results of TIFF files are written as TIFF or PNG"):
        through(tmp_path / "a.tif", tmp_path / "a.fits")


def test_two_results_never_share_a_name(tmp_path):
    for name in ("a.png", "a.jpg", "a.jpg.png"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / name)
    with pytest.raises(InputError, match="two results would be called a.jpg.png"):
        jobs_of(tmp_path, tmp_path / "out")


# -- sample ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "dtype"), [("tif", "uint16"), ("tif", "float32"), ("png", "uint16")]
)
def test_samples_are_files_like_those_of_the_run(form, dtype, tmp_path):
    """In their format, type and range: 100 .. 4095 of 16 bits, or floats as they are."""
    torch.manual_seed(0)
    Prior.create("tiny", (1, 16, 16)).save(tmp_path / "run" / "prior")
    config = {"problem": {}, "file_type": dtype, "file_format": form}
    if dtype == "uint16":
        config["range"] = [100, 4095]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    argv = ["sample", "--prior", tmp_path / "run", "-n", 1, "--steps", 2]
    assert command(*argv, "--out", tmp_path / "out") == 0
    assert command(*argv, "--out", tmp_path / "x.npy") == 0
    x = np.load(tmp_path / "x.npy").squeeze().astype(np.float64)
    file = tmp_path / "out" / f"00000.{form}"
    found = tifffile.imread(file) if form == "tif" else np.asarray(Image.open(file))
    expected = x if dtype == "float32" else np.rint(100 + 3995 * x).clip(0, 65535)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, atol=1e-6 if dtype == "float32" else 1)
