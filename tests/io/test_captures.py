"""Captures: images of any sizes, wherever their numbers are, and rectangles of them."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from unmurk.errors import InputError
from unmurk.io import captures as module
from unmurk.io import parts
from unmurk.io.captures import as_captures, open_captures, sizes_in
from unmurk.io.captures import simulated_captures as simulated
from unmurk.io.images import load_images
from unmurk.io.parts import InFile, InMemory
from unmurk.io.saving import save_images
from unmurk.io.source import Source
from unmurk.problem import Problem

SIZES = [(17, 33), (40, 21), (29, 29)]


def pixels(dtype="uint16", channels=1, seed=0):
    """Random pixels (H, W, C) of odd and mixed sizes that fill their type."""
    rng = np.random.default_rng(seed)
    most = 2 ** (8 * np.dtype(dtype).itemsize) - 1
    images = [rng.integers(0, most, (*size, channels)).astype(dtype) for size in SIZES]
    images[0].flat[0] = most
    return images


def tiffs(folder, images, **kind):
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(images):
        flat = image[..., 0] if image.shape[-1] == 1 else image
        kind.setdefault("photometric", "rgb" if flat.shape[-1] == 3 and flat.ndim == 3 else None)
        tifffile.imwrite(folder / f"{number}.tif", flat, **kind)
    return folder


def check(found, images, white):
    """Twenty random rectangles of each capture, against the arrays."""
    rng = np.random.default_rng(1)
    assert found.sizes == [image.shape[:2] for image in images]
    for position, image in enumerate(images):
        for _ in range(20):
            height, width = (int(rng.integers(1, n + 1)) for n in image.shape[:2])
            row = int(rng.integers(0, image.shape[0] - height + 1))
            column = int(rng.integers(0, image.shape[1] - width + 1))
            wanted = image[row : row + height, column : column + width].astype(np.float64) / white
            got = found.region(position, row, column, height, width)
            np.testing.assert_allclose(got.permute(1, 2, 0).numpy(), wanted, rtol=2e-7)


@pytest.mark.parametrize("dtype, white", [("uint8", 255), ("uint16", 65535)])
@pytest.mark.parametrize("channels", [1, 3])
def test_files_in_memory_and_on_the_disk_are_the_same(
    tmp_path, monkeypatch, dtype, white, channels
):
    """Uncompressed TIFF files are read in place; other files are decoded once."""
    images = pixels(dtype, channels)
    plain = tiffs(tmp_path / "plain", images)
    packed = tiffs(tmp_path / "packed", images, compression="zlib", predictor=2)
    other = tiffs(tmp_path / "other", images, byteorder=">", rowsperstrip=4)
    png = tmp_path / "png"
    for number, image in enumerate(images):
        values = torch.from_numpy(image.astype(np.float64) / white).permute(2, 0, 1)[None]
        scale = module.Scale.of(dtype)
        save_images(values, png / f"{number}.png", scale=scale)
    for folder in (plain, packed, other, png):
        found = open_captures(folder)
        assert all(isinstance(part, InMemory) for part in found.parts)
        check(found, images, white)
    monkeypatch.setattr(module, "HELD_CAPTURES", 100)
    for folder in (plain, packed, other, png):
        found = open_captures(folder, scratch=tmp_path / "run")
        assert all(isinstance(part, InFile) for part in found.parts)
        direct = folder in (plain, other)
        assert all(isinstance(part.file, parts.Scratch) != direct for part in found.parts)
        check(found, images, white)
    assert not (tmp_path / "run").exists() and len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("shape", [(3, 20, 31), (3, 20, 31, 3), (3, 5, 20, 31)])
def test_array_files(tmp_path, monkeypatch, shape):
    """Gray, with channels last, and with channels first; in memory and in the file."""
    array = np.random.default_rng(0).integers(0, 65535, shape).astype(np.uint16)
    array.flat[0] = 65535
    np.save(tmp_path / "a.npy", array)
    images = array[..., None] if array.ndim == 3 else array
    images = np.moveaxis(images, 1, -1) if shape[1] == 5 else images
    check(open_captures(tmp_path / "a.npy"), list(images), 65535)
    assert sizes_in(tmp_path / "a.npy") == [(20, 31)]
    monkeypatch.setattr(module, "HELD_CAPTURES", 100)
    found = open_captures(tmp_path / "a.npy")
    assert all(isinstance(part, InFile) for part in found.parts)
    check(found, list(images), 65535)


def test_tensors_lists_sets_and_sources(tmp_path):
    y = torch.rand(2, 3, 20, 30)
    check(as_captures(y), list(y.permute(0, 2, 3, 1).numpy()), 1)
    mixed = [y[0], y[1, :, :15]]
    check(as_captures(mixed), [image.permute(1, 2, 0).numpy() for image in mixed], 1)
    (tmp_path / "p").mkdir()
    Image.fromarray(np.arange(200, dtype=np.uint8).reshape(10, 20)).save(tmp_path / "p/0.png")
    images = load_images(tmp_path / "p")
    check(as_captures(images), [images.images[0].permute(1, 2, 0).numpy()], 1)
    assert as_captures(images).units == images.scale

    class Ramp(Source):
        shape = (3, 1, 4, 6)

        def read(self, indices):
            return torch.stack([torch.full((1, 4, 6), float(i)) for i in indices])

        def fingerprint(self):
            return {"ramp": 3}

    check(as_captures(Ramp()), [np.full((4, 6, 1), float(i)) for i in range(3)], 1)


def test_the_scale_is_that_of_the_set(tmp_path):
    """12-bit numbers in 16-bit files of different sizes: one white for all."""
    images = [np.minimum(image, 4095) for image in pixels()]
    images[1][:] //= 8
    found = open_captures(tiffs(tmp_path / "set", images))
    assert found.scale.gain == 4095 and "12 bits" in found.note
    check(found, images, 4095)
    assert open_captures(tmp_path / "set", span=(0, 8190)).scale.gain == 8190


def test_other_types_are_refused_or_left_out(tmp_path):
    folder = tiffs(tmp_path / "set", [*pixels(), pixels("uint8", 1)[0]])
    (folder / "4.tif").write_bytes(b"II*\0 no picture")
    with pytest.raises(InputError, match=r"4\.tif"):
        open_captures(folder)
    found = open_captures(folder, skip_bad=True)
    assert found.numbers == [0, 1, 2] and [name for name, _ in found.skipped] == ["3.tif", "4.tif"]
    (folder / "4.tif").unlink()
    with pytest.raises(InputError, match=r"3\.tif is gray 8-bit"):
        open_captures(folder)
    (folder / "0.tif").unlink()
    assert open_captures(folder, skip_bad=True).numbers == [0, 1]


def test_pixels_that_are_not_finite(tmp_path):
    images = [image.astype(np.float32) / 65535 for image in pixels()]
    images[1][3, 5], images[1][30, 20] = np.nan, np.inf
    folder = tiffs(tmp_path / "set", images)
    with pytest.raises(InputError, match=r"1\.tif has values that are not finite"):
        open_captures(folder)
    assert open_captures(folder, skip_bad=True).numbers == [0, 2]
    found = open_captures(folder, nan="mask")
    assert found.absent(0, 0, 0, 17, 33) is None
    absent = found.absent(1, 2, 4, 38, 17)
    assert np.argwhere(absent).tolist() == [[1, 1], [28, 16]]
    images[1][3, 5] = images[1][30, 20] = 0
    check(found, images, 1)


def test_numbers_of_flagged_pixels_do_not_leak(tmp_path):
    """They are zeros, as pixels are that are not finite: a cosmic ray would set the range."""
    fits = pytest.importorskip("astropy.io.fits")
    image, flags = np.full((6, 8), 900, np.float32), np.zeros((6, 8), np.int16)
    image[2, 3], flags[2, 3], image[4, 4] = 60_000, 4, np.nan
    units = [fits.PrimaryHDU(), fits.ImageHDU(image, name="SCI"), fits.ImageHDU(flags, name="DQ")]
    fits.HDUList(units).writeto(tmp_path / "a.fits")
    found = open_captures(Path(f"{tmp_path}/a.fits[SCI,dq=DQ]"), nan="mask")
    region = found.region(0, 1, 2, 4, 4)
    wanted = torch.full((1, 4, 4), 900.0)
    wanted[0, 1, 1] = wanted[0, 3, 2] = 0
    assert torch.equal(region, wanted)
    assert found.absent(0, 1, 2, 4, 4).nonzero()[0].tolist() == [1, 3]


def test_a_file_that_becomes_shorter_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HELD_CAPTURES", 100)
    folder = tiffs(tmp_path / "set", pixels("uint8"))
    found = open_captures(folder)
    (folder / "1.tif").write_bytes((folder / "1.tif").read_bytes()[:400])
    with pytest.raises(InputError, match=r"1\.tif is cut short"):
        found.region(1, 30, 0, 10, 21)
    (folder / "1.tif").unlink()
    with pytest.raises(InputError, match=r"cannot read .*1\.tif"):
        found.region(1, 30, 0, 10, 21)


def test_a_disk_without_room_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HELD_CAPTURES", 100)
    usage = parts.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(parts.shutil, "disk_usage", lambda path: usage)
    folder = tiffs(tmp_path / "set", pixels(), compression="zlib")
    with pytest.raises(InputError, match="of disk in .* are free"):
        open_captures(folder, scratch=tmp_path)


def test_simulated_captures_have_the_noise_and_the_mask_of_their_numbers(monkeypatch):
    clean = as_captures([torch.rand(1, *size) for size in SIZES])
    clean.numbers = [0, 2, 3]
    problem = Problem("inpaint:random,keep=0.5", 0.1)
    for held in (2**20, 100):
        monkeypatch.setattr(module, "HELD_CAPTURES", held)
        found = simulated(clean, problem, 7)
        for position, (number, size) in enumerate(zip(clean.numbers, SIZES, strict=True)):
            x = clean.region(position, 0, 0, *size)[None]
            y = problem.simulate(x, 7, [number])[0]
            assert torch.equal(found.region(position, 0, 0, *size), y)


def test_fingerprints_tell_sets_from_each_other(tmp_path):
    a, b = tiffs(tmp_path / "a", pixels()), tiffs(tmp_path / "b", pixels(seed=1))
    prints = [open_captures(path).fingerprint() for path in (a, a, b)]
    assert prints[0] == prints[1] != prints[2]
    y = torch.rand(2, 1, 9, 9)
    assert as_captures(y).fingerprint() == as_captures(y.clone()).fingerprint()
    assert as_captures(y).fingerprint() != as_captures(1 - y).fingerprint()
