"""NIfTI and DICOM files written by nibabel and pydicom: read exactly, and results compared."""

import gzip
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from tests.cli.calls import unmurk as command
from tests.io.formats.copies import through
from unmurk.errors import InputError
from unmurk.io.formats.pictures import open_pages
from unmurk.io.images import load_images
from unmurk.io.jobs import jobs_of, process

rng = np.random.default_rng(0)
AFFINE = np.array([[-2.0, 0, 0.1, 10], [0, 2.5, 0, -5], [0, 0.2, 3, 7], [0, 0, 0, 1]])


# -- NIfTI ----------------------------------------------------------------------------------------


@pytest.fixture
def nib():
    return pytest.importorskip("nibabel")


def volume(nib, path: Path, dtype: str, version: int = 1, scaled: bool = False) -> np.ndarray:
    data = (rng.normal(0, 50, (7, 9, 4, 2)) + 100).astype("float64" if scaled else dtype)
    image = (nib.Nifti1Image if version == 1 else nib.Nifti2Image)(data, AFFINE)
    image.set_data_dtype(dtype)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = "a scan"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"before"))
    nib.save(image, path)
    return np.asarray(nib.load(path).dataobj)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
def test_a_volume_comes_back(nib, dtype, version, suffix, tmp_path):
    """Slices of every time; numbers bit for bit; affine maps, units, texts and extensions."""
    source, out = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    data = volume(nib, source, dtype, version)
    with open_pages(source) as pages:
        assert (len(pages), pages.shape, pages.dtype) == (8, (9, 7, 1), dtype)
        assert pages.axes == "TZYX"
        assert pages.metadata["pixel_size"] == pytest.approx((1e3 * np.hypot(2.5, 0.2), 2e3))
        np.testing.assert_array_equal(pages.read(5)[..., 0], data[:, :, 1, 1].T)
    through(source, out)
    old, new = nib.load(source), nib.load(out)
    assert type(new) is type(old) and new.get_data_dtype() == old.get_data_dtype()
    np.testing.assert_array_equal(np.asarray(new.dataobj), data)
    np.testing.assert_array_equal(new.affine, old.affine)
    assert new.header.get_xyzt_units() == ("mm", "sec")
    assert bytes(new.header["descrip"]).startswith(b"a scan")
    assert [bytes(e.text, "ascii") for e in new.header.extensions] == [b"before", b"a line"]


def test_a_scaled_volume(nib, tmp_path):
    """slope n + inter: floats, written with the same scaling and the same n."""
    data = volume(nib, tmp_path / "a.nii", "int16", scaled=True)
    with open_pages(tmp_path / "a.nii") as pages:
        assert pages.dtype == "float32"
        np.testing.assert_allclose(pages.read(0)[..., 0], data[:, :, 0, 0].T, rtol=1e-6)
    through(tmp_path / "a.nii", tmp_path / "b.nii")
    old, new = (nib.load(tmp_path / f"{name}.nii").dataobj for name in "ab")
    np.testing.assert_array_equal(new.get_unscaled(), old.get_unscaled())
    assert (new.slope, new.inter) == (old.slope, old.inter)


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_finer_voxels_and_floats(nib, dtype, tmp_path):
    """Of 2 x 2 voxels for one, the centers lie where the one was, in both affine maps."""
    volume(nib, tmp_path / "a.nii", dtype)
    image = nib.load(tmp_path / "a.nii")
    rigid = np.diag([-2.0, 2.5, 3.0, 1.0])  # a qform holds no shear
    image = nib.Nifti1Image(np.asarray(image.dataobj), rigid)
    image.set_qform(rigid, code=1)
    nib.save(image, tmp_path / "a.nii")
    images = through(tmp_path / "a.nii", tmp_path / "b.nii", floats=True, grow=2)
    new = nib.load(tmp_path / "b.nii")
    assert new.get_data_dtype() == np.float32 and new.shape == (14, 18, 4, 2)
    np.testing.assert_array_equal(np.asarray(new.dataobj)[::2, ::2, 0, 0].T, images[0][..., 0])
    for affine in (new.get_sform(), new.get_qform()):
        np.testing.assert_allclose(affine @ [6.5, 4.5, 2, 1], rigid @ [3, 2, 2, 1], atol=1e-5)
    assert new.header.get_zooms()[:3] == (1, 1.25, 3)


def test_damaged_volumes(nib, tmp_path):
    volume(nib, tmp_path / "a.nii", "int16")
    data, bad = (tmp_path / "a.nii").read_bytes(), tmp_path / "bad.nii"

    def field(start: int, value: np.generic) -> bytes:
        return data[:start] + value.tobytes() + data[start + value.nbytes :]

    cases = [
        (b"no NIfTI file at all", "it is no NIfTI file, or damaged"),
        (data[:-10], "bytes of numbers and is cut short"),
        (field(42, np.int16(-7)), "declares the shape"),
        (field(42, np.int16(32767)), "is cut short"),
        (field(108, np.float32(1e9)), "its pixels begin at byte 1000000000"),
        (field(344, np.frombuffer(b"ni1\0", "S4")[0:1][0]), "pixels in another file"),
        (field(70, np.int16(32)), "holds complex64: save real numbers"),
        (field(70, np.int16(9999)), "data code 9999 not"),
        (gzip.compress(data)[:200], "ended before the end-of-stream marker"),
    ]
    for content, part in cases:
        bad.write_bytes(content)
        with pytest.raises(InputError, match=re.escape(part)) as error:
            load_images(bad)
        assert "\n" not in str(error.value) and str(bad) in str(error.value)


# -- DICOM ----------------------------------------------------------------------------------------


@pytest.fixture
def pydicom():
    return pytest.importorskip("pydicom")


def scan(pydicom, path: Path, pixels: np.ndarray, **values: object) -> object:
    """Write pixels (N, H, W) or (N, H, W, 3) as pydicom does."""
    uid = pydicom.uid
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = uid.CTImageStorage, uid.generate_uid()
    data.StudyInstanceUID, data.SeriesInstanceUID = uid.generate_uid(), uid.generate_uid()
    data.PatientName, data.PatientID, data.Modality = "Doe^J", "7", "CT"
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.PixelSpacing, data.SliceThickness = [0.5, 0.75], 2
    data.ImagePositionPatient, data.ImageOrientationPatient = [10, 20, 30], [1, 0, 0, 0, 1, 0]
    data.Rows, data.Columns = pixels.shape[1:3]
    data.SamplesPerPixel = 1 if pixels.ndim == 3 else 3
    data.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 3 else "RGB"
    if pixels.ndim == 4:
        data.PlanarConfiguration = 0
    if len(pixels) > 1:
        data.NumberOfFrames = len(pixels)
    data.BitsAllocated = 8 * pixels.dtype.itemsize
    data.BitsStored = data.BitsAllocated
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelData = pixels.tobytes()
    data["PixelData"].VR = "OB" if data.BitsAllocated == 8 else "OW"
    packed = values.pop("packed", False)
    for name, value in values.items():
        setattr(data, name, value)
    data.HighBit = data.BitsStored - 1
    if packed:
        data.compress(uid.RLELossless)
    data.save_as(path, enforce_file_format=True)
    return data


def stored(bits: int, *shape: int, signed: bool = False) -> np.ndarray:
    low = -(2 ** (bits - 1)) if signed else 0
    dtype = ("int" if signed else "uint") + ("8" if bits <= 8 else "16")
    return rng.integers(low, low + 2**bits, shape).astype(dtype)


CASES = {
    "12 bits": ({"BitsStored": 12}, stored(12, 1, 9, 7)),
    "CT": ({"BitsStored": 12, "RescaleSlope": 1, "RescaleIntercept": -1024}, stored(12, 1, 9, 7)),
    "PET": ({"RescaleSlope": 0.3712, "RescaleIntercept": 0}, stored(16, 1, 9, 7)),
    "signed": (
        {"BitsStored": 12, "RescaleSlope": 2, "RescaleIntercept": 5},
        stored(12, 1, 9, 7, signed=True),
    ),
    "white is zero": (
        {"BitsStored": 12, "PhotometricInterpretation": "MONOCHROME1"},
        stored(12, 1, 9, 7),
    ),
    "frames": ({}, stored(16, 3, 9, 7)),
    "run lengths": ({"packed": True}, stored(16, 2, 9, 7)),
    "color": ({}, stored(8, 1, 9, 7, 3)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_scan_comes_back(pydicom, case, tmp_path):
    """Stored numbers bit for bit; a derived image with a UID of its own; all else is kept."""
    values, pixels = CASES[case]
    source, out = tmp_path / "IM0001", tmp_path / "OUT"
    given = scan(pydicom, source, pixels, **values)
    slope, inter = values.get("RescaleSlope", 1), values.get("RescaleIntercept", 0)
    expected = pixels.astype(np.float64) * slope + inter
    if case == "white is zero":
        expected = 4095 - expected
    with open_pages(source) as pages:
        assert (len(pages), pages.shape[:2]) == (len(pixels), (9, 7))
        assert pages.metadata["pixel_size"] == (500, 750) and pages.metadata["z_step"] == 2000
        assert pages.dtype == ("float32" if "RescaleSlope" in values else pixels.dtype.name)
    images = np.stack(through(source, out))
    np.testing.assert_allclose(images.reshape(pixels.shape), expected, rtol=1e-6)
    new = pydicom.dcmread(out)
    np.testing.assert_array_equal(new.pixel_array.reshape(pixels.shape), pixels)
    assert new.ImageType == ["DERIVED", "PRIMARY", "AXIAL"]
    assert new.SOPInstanceUID not in ("", given.SOPInstanceUID)
    assert new.file_meta.MediaStorageSOPInstanceUID == new.SOPInstanceUID
    assert new.SeriesInstanceUID != given.SeriesInstanceUID
    assert new.SourceImageSequence[0].ReferencedSOPInstanceUID == given.SOPInstanceUID
    assert new.DerivationDescription == "a line"
    same = ("PatientName", "StudyInstanceUID", "PixelSpacing", "BitsStored", "RescaleSlope")
    same += ("RescaleIntercept", "PhotometricInterpretation", "ImagePositionPatient")
    assert all(new.get(name) == given.get(name) for name in same)
    first = out.read_bytes()
    through(source, out)
    assert out.read_bytes() == first  # the UIDs follow from the source


def test_black_and_white_of_a_scan(pydicom, tmp_path):
    """0 and 1 are the ends of the stored bits, in Hounsfield units; of a set, those of all."""
    (tmp_path / "in").mkdir()
    pixels = stored(12, 1, 16, 16)
    scan(pydicom, tmp_path / "in" / "1.2.840.1", pixels, **CASES["CT"][0])
    found = load_images(tmp_path / "in")
    assert (found.scale.offset, found.scale.gain) == (-1024, 4095)
    np.testing.assert_allclose(found.images[0, 0], pixels[0] / 4095, atol=1e-6)
    scan(pydicom, tmp_path / "in" / "2", pixels, **CASES["CT"][0] | {"RescaleIntercept": -2000})
    found = load_images(tmp_path / "in")
    assert (found.scale.offset, found.scale.gain) == (-2000, 5071)
    assert found.names == ["1.2.840.1", "2"]
    found = load_images(tmp_path / "in" / "2", span=(-2000, 0))
    np.testing.assert_allclose(found.images[0, 0], pixels[0] / 2000, rtol=1e-6)


def test_a_folder_of_scans_through_a_command(pydicom, tmp_path, capsys):
    """Names without a suffix come back, beside notes that are no scans; nothing is lost."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes").write_text("no scan " * 40)
    pixels = stored(12, 2, 16, 16)
    for number in range(2):
        scan(pydicom, tmp_path / "in" / f"IM{number}", pixels[number : number + 1],
             **CASES["CT"][0])  # fmt: skip
    assert command("corrupt", tmp_path / "in", "--out", tmp_path / "out") == 0
    capsys.readouterr()
    for number in range(2):
        found = pydicom.dcmread(tmp_path / "out" / f"IM{number}")
        np.testing.assert_array_equal(found.pixel_array, pixels[number])
    process(jobs_of(tmp_path / "in", tmp_path / "std"), lambda y, n: {"images": y, "std": y / 4})
    assert sorted(p.name for p in (tmp_path / "std").iterdir()) == [
        "IM0", "IM0-std.tif", "IM1", "IM1-std.tif"
    ]  # fmt: skip
    with tifffile.TiffFile(tmp_path / "std" / "IM1-std.tif") as std:
        np.testing.assert_allclose(std.asarray().squeeze(), pixels[1] / 4, rtol=1e-5)
        assert 'PhysicalSizeX="750.0"' in std.ome_metadata


def test_finer_pixels_of_a_scan(pydicom, tmp_path):
    """The spacing is a third, and the center of the first old pixel stays where it was."""
    scan(pydicom, tmp_path / "a.dcm", stored(12, 1, 9, 7))
    through(tmp_path / "a.dcm", tmp_path / "b.dcm", grow=3)
    found = pydicom.dcmread(tmp_path / "b.dcm")
    assert (found.Rows, found.Columns) == (27, 21)
    np.testing.assert_allclose(found.PixelSpacing, [0.5 / 3, 0.25])
    np.testing.assert_allclose(found.ImagePositionPatient, [10 - 0.25, 20 - 0.5 / 3, 30])


def test_damaged_scans(pydicom, tmp_path):
    bad = tmp_path / "bad.dcm"
    cases = [
        ({"Rows": 60000, "Columns": 60000}, "the limit is"),
        ({"Rows": 900}, "bytes of pixels and is cut short"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "save it as gray or RGB"),
        ({"BitsAllocated": 1}, "declares 1 frames of 1 bits"),
        ({"NumberOfFrames": 10**6}, "is cut short"),
        ({"RescaleSlope": 0}, "its RescaleSlope is 0"),
        ({"Rows": None}, "it holds no image (Rows is missing)"),
    ]
    for values, part in cases:
        scan(pydicom, bad, stored(16, 1, 9, 7), **values)
        with pytest.raises(InputError, match=re.escape(part)) as error:
            load_images(bad)
        assert "\n" not in str(error.value) and str(bad) in str(error.value)
    for content in (b"no DICOM file", b"\0" * 128 + b"DICM", b"\0" * 128 + b"DICM" + b"\xff" * 99):
        bad.write_bytes(content)
        with pytest.raises(InputError) as error:
            load_images(bad)
        assert "\n" not in str(error.value) and str(bad) in str(error.value)


@pytest.mark.parametrize(("module", "name"), [("nibabel", "a.nii"), ("pydicom", "a.dcm")])
def test_a_missing_library_is_one_line(module, name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(InputError, match=re.escape("pip install 'unmurk[medical]'")) as error:
        load_images(tmp_path / name)
    assert "\n" not in str(error.value)


def test_the_numbers_of_a_volume_are_images(nib, tmp_path):
    """Every slice of a volume is one image in units of its type."""
    data = volume(nib, tmp_path / "a.nii.gz", "uint8")
    found = load_images(tmp_path / "a.nii.gz")
    expected = torch.from_numpy(data.transpose(3, 2, 1, 0).reshape(8, 1, 9, 7) / np.float32(255))
    assert torch.equal(found.images, expected) and found.names[1] == "a-00001.nii.gz"
