"""FITS files written by astropy: read exactly, and results compared by astropy."""

import gzip
import re
import sys

import numpy as np
import pytest

from tests.cli.calls import unmurk as command
from tests.io.formats.copies import through
from unmurk.errors import InputError
from unmurk.io.formats.pictures import open_pages
from unmurk.io.images import load_images

fits = pytest.importorskip("astropy.io.fits")
from astropy.wcs import WCS  # noqa: E402

rng = np.random.default_rng(0)
TYPES = ["uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
TYPES += ["float32", "float64"]
HEADER = {"OBJECT": "M31", "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRPIX1": 3.5}
HEADER |= {"CRPIX2": 2.0, "CRVAL1": 10.7, "CRVAL2": 41.3, "CDELT1": -0.01, "CDELT2": 0.01}
HEADER |= {"BUNIT": "adu", "DATAMAX": 1.0}


def numbers(dtype: str, *shape: int) -> np.ndarray:
    """Random numbers that reach both ends of a type."""
    if dtype.startswith("float"):
        return rng.normal(100, 30, shape).astype(dtype)
    ends = np.iinfo(dtype)
    found = rng.integers(ends.min, ends.max, shape, dtype=dtype, endpoint=True)
    found.flat[0], found.flat[-1] = ends.min, ends.max
    return found


@pytest.mark.parametrize("suffix", [".fits", ".fits.gz", ".fits.fz"])
@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_comes_back(dtype, suffix, tmp_path):
    """A cube of three images: pixels bit for bit, the header, one more line HISTORY."""
    if suffix == ".fits.fz" and dtype.endswith("int64"):
        pytest.skip("tile compression of 64-bit integers is not in the standard")
    source, out = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    data, header = numbers(dtype, 3, 8, 12), fits.Header(HEADER)
    if suffix == ".fits.fz":
        unit = fits.CompImageHDU(data, header, name="SCI", quantize_level=0.0)
        if dtype.startswith("float"):
            unit = fits.CompImageHDU(
                data, header, name="SCI", compression_type="GZIP_1", quantize_level=0.0
            )
        fits.HDUList([fits.PrimaryHDU(), unit]).writeto(source)
    else:
        fits.PrimaryHDU(data, header).writeto(source, checksum=True)
    with open_pages(source) as pages:
        assert (len(pages), pages.shape, pages.dtype) == (3, (8, 12, 1), dtype)
        assert pages.axes == "ZYX" and pages.metadata["units"] == "adu"
        np.testing.assert_array_equal(np.stack([pages.read(n)[..., 0] for n in range(3)]), data)
    through(source, out)
    number = int(suffix == ".fits.fz")
    with fits.open(out) as found, fits.open(source) as given:
        found.verify("exception")
        np.testing.assert_array_equal(found[number].data, data)
        assert found[number].data.dtype == given[number].data.dtype
        new, old = found[number].header, given[number].header
        assert {k: new[k] for k in HEADER if k != "DATAMAX"} == {
            k: v for k, v in HEADER.items() if k != "DATAMAX"
        }
        assert "DATAMAX" not in new and "CHECKSUM" not in new
        assert str(new["HISTORY"]) == "a line"
        assert {k for k in old if k not in ("CHECKSUM", "DATASUM", "DATAMAX")} <= set(new)


@pytest.mark.parametrize("suffix", [".fits", ".fits.fz"])
def test_scaled_integers(suffix, tmp_path):
    """Physical numbers 0.25 n + 100 are floats; a result has the same scaling and the same n."""
    raw = numbers("int16", 2, 8, 12)
    kind = fits.PrimaryHDU if suffix == ".fits" else fits.CompImageHDU
    unit = kind(data=raw * 0.25 + 100)
    unit.scale("int16", bscale=0.25, bzero=100)
    units = [unit] if suffix == ".fits" else [fits.PrimaryHDU(), unit]
    fits.HDUList(units).writeto(tmp_path / f"a{suffix}")
    with open_pages(tmp_path / f"a{suffix}") as pages:
        assert pages.dtype == "float32"
        np.testing.assert_array_equal(pages.read(1)[..., 0], raw[1] * 0.25 + 100)
    through(tmp_path / f"a{suffix}", tmp_path / f"b{suffix}")
    through(tmp_path / f"a{suffix}", tmp_path / f"c{suffix}", floats=True)
    with fits.open(tmp_path / f"b{suffix}", do_not_scale_image_data=True) as found:
        assert (found[-1].header["BSCALE"], found[-1].header["BZERO"]) == (0.25, 100)
        np.testing.assert_array_equal(found[-1].data, raw)
    with fits.open(tmp_path / f"c{suffix}") as found:
        assert found[-1].header["BITPIX"] == -32 and "BSCALE" not in found[-1].header
        np.testing.assert_array_equal(found[-1].data, raw * 0.25 + 100)


@pytest.fixture
def exposure(tmp_path):
    """Two chips with errors and flags, as space telescopes write them."""
    parts = [fits.PrimaryHDU(header=fits.Header({"TELESCOP": "HST"}))]
    flags = np.zeros((8, 12), np.int16)
    flags[2, 3], flags[4, 5] = 1, 4
    for chip in (1, 2):
        sky = numbers("float32", 8, 12) / 200
        parts.append(fits.ImageHDU(sky, fits.Header(HEADER), name="SCI", ver=chip))
        parts.append(fits.ImageHDU(np.ones((8, 12), np.float32), name="ERR", ver=chip))
        parts.append(fits.ImageHDU(flags * chip, name="DQ", ver=chip))
    (tmp_path / "night").mkdir()
    fits.HDUList(parts).writeto(tmp_path / "night" / "a.fits")
    return tmp_path / "night" / "a.fits", [part.data for part in parts]


def test_extensions(exposure, tmp_path):
    """By name and version, by number; the others are listed; the primary header is kept."""
    file, data = exposure
    for text, number in {"": 1, "[SCI]": 1, "[sci,2]": 4, "[4]": 4, "[ERR]": 2}.items():
        found = load_images(f"{file}{text}")
        assert found.scale.dtype == "float32"
        np.testing.assert_array_equal(found.images[0, 0], data[number])
    folder = load_images(f"{file.parent}[SCI,2]")
    np.testing.assert_array_equal(folder.images[0, 0], data[4])
    for text, part in {
        "[FOO]": "1: SCI 8x12; 2: ERR 8x12; 3: DQ 8x12; 4: SCI,2 8x12",
        "[SCI,bits=3]": "write an extension as",
        "[SCI,dq=ERR]": "no flags of images",
        "[PRIMARY]": "no image [PRIMARY]",
    }.items():
        with pytest.raises(InputError) as error:
            load_images(f"{file}{text}")
        assert part in str(error.value) and "\n" not in str(error.value)
    assert command("corrupt", f"{file}[SCI,2]", "--out", tmp_path / "out") == 0
    with fits.open(tmp_path / "out" / "a.fits") as found:
        assert [unit.name for unit in found] == ["PRIMARY", "SCI"] and found[1].ver == 2
        assert found[0].header["TELESCOP"] == "HST"
        np.testing.assert_array_equal(found[1].data, data[4])
        assert "corrupt, operator identity, noise 0" in str(found[1].header["HISTORY"])


def test_flagged_pixels_are_hidden(exposure):
    file, _ = exposure
    with pytest.raises(InputError, match="marks 2 pixels as bad.*--nan mask"):
        load_images(f"{file}[SCI,dq=DQ]")
    hidden = load_images(f"{file}[SCI,dq=DQ]", nan="mask").images[0, 0].isnan()
    assert hidden.nonzero().tolist() == [[2, 3], [4, 5]]
    hidden = load_images(f"{file}[SCI,dq=DQ,bits=1]", nan="mask").images[0, 0].isnan()
    assert hidden.nonzero().tolist() == [[2, 3]]


def test_blank_integers_are_hidden(tmp_path):
    data = np.full((6, 8), 100, np.int16)
    data[1, 2] = -999
    fits.PrimaryHDU(data, fits.Header({"BLANK": -999})).writeto(tmp_path / "a.fits")
    found = load_images(tmp_path / "a.fits", nan="mask", span=(0, 200)).images[0, 0]
    assert found.isnan().nonzero().tolist() == [[1, 2]] and float(found[0, 0]) == 0.5


@pytest.mark.parametrize("form", ["CDELT", "CD", "PC"])
def test_world_coordinates_of_finer_pixels(form, tmp_path):
    """The sky position of the center of each old pixel is the same, by astropy."""
    header = fits.Header(HEADER)
    if form == "CD":
        del header["CDELT1"], header["CDELT2"]
        header.update({"CD1_1": -0.01, "CD1_2": 0.002, "CD2_1": 0.003, "CD2_2": 0.01})
    elif form == "PC":
        header.update({"PC1_1": 0.9, "PC1_2": -0.2, "PC2_1": 0.2, "PC2_2": 0.9})
    fits.PrimaryHDU(numbers("float32", 8, 12), header).writeto(tmp_path / "a.fits")
    through(tmp_path / "a.fits", tmp_path / "b.fits", grow=3)
    old, new = (WCS(fits.getheader(tmp_path / f"{name}.fits")) for name in "ab")
    x, y = np.meshgrid(np.arange(12), np.arange(8))
    before, after = (
        old.pixel_to_world_values(x, y),
        new.pixel_to_world_values(3 * x + 1, 3 * y + 1),
    )
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-12 * 360)


def test_damaged_files(tmp_path):
    """Cut short, without an end, with huge or impossible sizes, a bomb: one line each."""
    good, bad = tmp_path / "good.fits", tmp_path / "bad.fits"
    fits.PrimaryHDU(numbers("float32", 8, 12)).writeto(good)
    data = good.read_bytes()

    def card(name: str, value: str) -> bytes:
        start = data.index(f"{name:<8}=".encode())
        return data[:start] + f"{name:<8}= {value:>20}".encode() + data[start + 30 :]

    cases = [
        (b"no FITS file at all", "it is no FITS file, or damaged"),
        (data[:3000], "declares 384 bytes of data and is cut short"),
        (data[:80] + b" " * 2800, "a header has no end"),
        (card("NAXIS1", "12000000000"), "is cut short"),
        (card("BITPIX", "17"), "BITPIX = 17"),
        (card("NAXIS1", "-4"), "axes of length -4"),
        (card("NAXIS1", "'a'"), "NAXIS1 = 'a'"),
        (card("NAXIS", "0"), "it holds no image"),
        (gzip.compress(card("NAXIS1", "12000000000")), "of compressed numbers, the limit is"),
        (gzip.compress(data)[:200], "ended before the end-of-stream marker"),
        (gzip.compress(data[:3000]), "declares 384 bytes of data and is cut short"),
    ]
    for content, part in cases:
        bad.write_bytes(content)
        with pytest.raises(InputError, match=re.escape(part)) as error:
            load_images(bad)
        assert "\n" not in str(error.value) and str(bad) in str(error.value)


def test_a_missing_library_is_one_line(tmp_path, monkeypatch, capsys):
    fits.PrimaryHDU(numbers("float32", 8, 12)).writeto(tmp_path / "a.fits")
    monkeypatch.setitem(sys.modules, "astropy.io.fits", None)
    assert command("corrupt", tmp_path / "a.fits", "--out", tmp_path / "out") == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "pip install 'unmurk[astro]'" in text
    assert not (tmp_path / "out").exists()
