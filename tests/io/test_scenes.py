"""Scenes of repeated captures in one file come back in its format, with axes and coordinates."""

from pathlib import Path

import numpy as np
import pytest
import tifffile

from tests.io.formats.test_medical import scan, stored
from unmurk.errors import InputError
from unmurk.io.axes import Selection
from unmurk.io.captures import open_captures
from unmurk.io.images import load_images, read_images
from unmurk.io.job_list import jobs_of, scene_jobs
from unmurk.io.jobs import process

rng = np.random.default_rng(0)


def averaged(source: Path, out: Path, repeats: int) -> None:
    """Write the mean of the captures of each scene, and a quarter of it as std."""

    def engine(y, numbers):
        return {"images": y.mean(1), "std": y.mean(1) / 4}

    jobs = scene_jobs(jobs_of(source, out, select=Selection(repeats=repeats)), repeats)
    process(jobs, engine, arrays=["std"], history="a line")


@pytest.mark.parametrize("suffix", [".fits", ".fits.gz", ".fits.fz"])
@pytest.mark.parametrize(("lead", "repeats", "scenes"), [((6,), 3, (2,)), ((4, 3), 6, (2, 1))])
def test_scenes_of_a_fits_cube(suffix, lead, repeats, scenes, tmp_path):
    """One file of the same axes; each scene lies at the mean of the places of its captures."""
    fits = pytest.importorskip("astropy.io.fits")
    wcs = pytest.importorskip("astropy.wcs").WCS
    cube = rng.normal(100, 30, (*lead, 8, 12)).astype("float32")
    cards = {"CTYPE3": "TIME", "CUNIT3": "s", "CRVAL3": 40.0, "CDELT3": 0.5, "CRPIX3": 2.0}
    cards |= {"BUNIT": "adu", "OBJECT": "M31", "CRVAL4": 7.0, "CTYPE4": "FREQ"}
    header = fits.Header(cards)
    kind = fits.CompImageHDU if suffix.endswith("fz") else fits.PrimaryHDU
    more = {"compression_type": "GZIP_2", "quantize_level": 0} if suffix.endswith("fz") else {}
    unit = kind(cube, header if len(lead) > 1 else header[:-2], **more)
    first = [fits.PrimaryHDU()] if suffix.endswith("fz") else []
    fits.HDUList([*first, unit]).writeto(tmp_path / f"a{suffix}")
    averaged(tmp_path / f"a{suffix}", tmp_path / "out", repeats)
    place, number = tmp_path / "out" / f"a{suffix}", len(first)
    found, new = fits.getdata(place, number), fits.getheader(place, number)
    groups = cube.reshape(-1, repeats, 8, 12)
    assert found.shape == (*scenes, 8, 12) and found.dtype.name == "float32"
    np.testing.assert_allclose(found.reshape(-1, 8, 12), groups.mean(1), rtol=1e-6)
    std = fits.getdata(tmp_path / "out" / f"a-std{suffix}", number)
    np.testing.assert_allclose(std, found / 4, rtol=1e-6)
    assert (new["BUNIT"], new["OBJECT"], str(new["HISTORY"])) == ("adu", "M31", "a line")
    old = fits.getheader(tmp_path / f"a{suffix}", number)
    before, after = (wcs(h).all_pix2world for h in (old, new))
    places = [np.unravel_index(n, lead)[::-1] for n in range(int(np.prod(lead)))]
    worlds = before(np.array([(0, 0, *p) for p in places]), 0)
    wanted = worlds.reshape(-1, repeats, worlds.shape[1]).mean(1)
    results = [np.unravel_index(n, scenes)[::-1] for n in range(int(np.prod(scenes)))]
    np.testing.assert_allclose(
        after(np.array([(0, 0, *p) for p in results]), 0), wanted, rtol=1e-9
    )


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize(
    ("sides", "repeats", "scenes"), [((4, 6), 12, (1, 2)), ((6,), 2, (3,)), ((1, 6), 3, (1, 2))]
)
def test_scenes_of_a_nifti_volume(name, sides, repeats, scenes, tmp_path):
    """Slices, times: the affine map sends a scene to the mean place of its slices, and its time is
    the mean of theirs."""
    nib = pytest.importorskip("nibabel")
    volume = rng.normal(100, 30, (7, 9, *sides)).astype("float32")
    affine = np.array([[-2.0, 0, 0.1, 10], [0, 2.5, 0, -5], [0, 0.2, 3, 7], [0, 0, 0, 1]])
    image = nib.Nifti1Image(volume, affine)
    image.header.set_xyzt_units("mm", "sec")
    image.header["toffset"] = 5.0
    if len(sides) > 1:
        image.header["pixdim"][4] = 1.5
    nib.save(image, tmp_path / name)
    averaged(tmp_path / name, tmp_path / "out", repeats)
    new = nib.load(tmp_path / "out" / name)
    pages = np.moveaxis(volume.reshape(7, 9, -1, order="F"), -1, 0)
    wanted = pages.reshape(-1, repeats, 7, 9).mean(1)
    assert new.shape == (7, 9, *scenes) and new.get_data_dtype() == np.float32
    got = np.moveaxis(np.asarray(new.dataobj).reshape(7, 9, -1, order="F"), -1, 0)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    std = nib.load(tmp_path / "out" / name.replace("a", "a-std", 1))
    np.testing.assert_allclose(np.asarray(std.dataobj), np.asarray(new.dataobj) / 4, rtol=1e-6)
    merged = sides[0] // scenes[0]
    for scene in range(scenes[0]):
        old = [affine @ [3, 2, scene * merged + k, 1] for k in range(merged)]
        np.testing.assert_allclose(new.affine @ [3, 2, scene, 1], np.mean(old, 0), atol=1e-5)
    if len(sides) > 1:
        step = sides[1] // scenes[1]
        start, length = float(new.header["toffset"]), float(new.header["pixdim"][4])
        for scene in range(scenes[1]):
            times = [5 + 1.5 * (scene * step + k) for k in range(step)]
            assert start + length * scene == pytest.approx(np.mean(times))


def stored_as(name: str, data: np.ndarray, folder: Path) -> Path:
    """Write times and planes (T, Z, H, W) in a format, with T as the slower axis."""
    file = folder / name
    if name.endswith("nii"):
        nib = pytest.importorskip("nibabel")
        image = nib.Nifti1Image(data.transpose(3, 2, 1, 0), np.diag([2.0, 2.0, 3.0, 1.0]))
        image.header.set_xyzt_units("mm", "sec")
        image.header["pixdim"][4] = 1.5
        nib.save(image, file)
    elif name.endswith("h5"):
        with pytest.importorskip("h5py").File(file, "w") as opened:
            opened["scan"] = data
    elif name.endswith("npy"):
        np.save(file, data)
    else:
        kind = {"imagej": True, "resolution": (4, 5)} if "ome" not in name else {"ome": True}
        tifffile.imwrite(file, data, **kind, metadata={"axes": "TZYX"})
    return file


@pytest.mark.parametrize("name", ["a.tif", "a.ome.tif", "a.nii", "a.h5", "a.npy"])
def test_captures_along_a_slower_time_axis(name, tmp_path):
    """Scenes are the planes, and captures the times, not the images in a row in the file."""
    data = rng.normal(100, 30, (4, 3, 9, 7)).astype("float32")
    file = stored_as(name, data, tmp_path)
    wanted = data.reshape(2, 2, 3, 9, 7).mean(1)  # two times each of three planes
    select = Selection("TZYX" if name.endswith(("h5", "npy")) else "", repeats=2)
    captures = open_captures(file, select=select, span=(0, 1))
    found = np.stack([captures.region(n, 0, 0, 9, 7)[0].numpy() for n in range(12)])
    np.testing.assert_allclose(found.reshape(2, 3, 2, 9, 7).mean(2), wanted, rtol=1e-6)
    images = read_images(file, select=select, span=(0, 1)).images
    np.testing.assert_array_equal(images[:, 0].numpy(), found)
    plain = load_images(file, axes=select.axes, span=(0, 1)).images  # without scenes
    np.testing.assert_array_equal(plain[:, 0].numpy(), data.reshape(12, 9, 7))
    if name.endswith(("h5", "npy")):
        return
    averaged(file, tmp_path / "out", 2)
    result = tmp_path / "out" / name
    if name.endswith("nii"):
        new = pytest.importorskip("nibabel").load(result)
        assert new.shape == (7, 9, 3, 2) and new.header["pixdim"][4] == 3.0
        assert new.header["toffset"] == 0.75
        got = np.asarray(new.dataobj).transpose(3, 2, 1, 0)
    else:
        with tifffile.TiffFile(result) as opened:
            assert opened.series[0].axes == "TZYX"
            assert "ome" in name or opened.pages[5].resolution == (4, 5)
            got = opened.asarray()
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    for repeats, means in ((12, data.mean((0, 1))[None]), (6, data.reshape(2, 6, 9, 7).mean(1))):
        averaged(file, tmp_path / f"{repeats}", repeats)  # whole blocks of the file
        again = load_images(tmp_path / f"{repeats}" / name, span=(0, 1)).images
        np.testing.assert_allclose(again[:, 0].numpy(), means, rtol=1e-6)
    with pytest.raises(InputError, match="4 times of 3 images each.*no whole number of scenes"):
        jobs_of(file, tmp_path / "no", select=Selection(repeats=8))


def test_scenes_of_dicom_frames(tmp_path):
    """A multi-frame file of scenes; the functional groups are those of their first frames."""
    pydicom = pytest.importorskip("pydicom")
    pixels = stored(12, 6, 9, 7)
    groups = [pydicom.Dataset() for _ in pixels]
    for number, group in enumerate(groups):
        group.FrameComments = str(number)
    times = {"FrameTime": "20", "FrameTimeVector": [0, 10, 20, 30, 40, 50]}
    values = {"BitsStored": 12, "PerFrameFunctionalGroupsSequence": groups, **times}
    scan(pydicom, tmp_path / "a.dcm", pixels, **values)
    averaged(tmp_path / "a.dcm", tmp_path / "out", 2)
    new = pydicom.dcmread(tmp_path / "out" / "a.dcm")
    wanted = np.rint(pixels.reshape(3, 2, 9, 7).mean(1))
    assert new.NumberOfFrames == 3 and np.abs(new.pixel_array - wanted).max() <= 1  # ties
    assert [g.FrameComments for g in new.PerFrameFunctionalGroupsSequence] == ["0", "2", "4"]
    assert new.FrameTime == 40 and list(new.FrameTimeVector) == [0, 30, 70]
