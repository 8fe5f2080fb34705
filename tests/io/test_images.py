"""Files to tensors and back: nothing lost, nothing half-written, one line when it goes wrong."""

import gzip
import os
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import unmurk
from unmurk.errors import InputError
from unmurk.io.formats.pictures import encode_picture, open_pages
from unmurk.io.formats.png import CHANNELS, SIGNATURE
from unmurk.io.images import load_images, read_idx
from unmurk.io.saving import save_images
from unmurk.io.scale import Scale

ASSETS = Path(unmurk.__file__).parent / "assets"
rng = np.random.default_rng(0)


def pixels(*shape, dtype="uint8"):
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def write_png(path, array):
    if array.dtype == np.uint16 and array.ndim == 3:
        path.write_bytes(encode_picture(array))
    else:
        Image.fromarray(array).save(path)


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and text
    return text


# -- round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("colour", [(), (3,)])
def test_a_folder_of_png_comes_back_bit_for_bit(tmp_path, dtype, colour):
    arrays = {f"{name}.png": pixels(7, 5, *colour, dtype=dtype) for name in ("b", "a", "c")}
    source = tmp_path / "in"
    source.mkdir()
    for name, array in arrays.items():
        write_png(source / name, array)
    (source / "notes.txt").write_text("not a picture")
    found = load_images(source)
    assert found.names == ["a.png", "b.png", "c.png"] and len(found) == 3
    assert found.images.shape == (3, 3 if colour else 1, 7, 5)
    assert found.images.dtype == torch.float32
    expected = arrays["a.png"].reshape(7, 5, -1) / np.iinfo(dtype).max
    assert np.allclose(found.images[0].permute(1, 2, 0), expected, atol=1e-7)

    written = save_images(found.images, tmp_path / "out", found.names, found.scale)
    assert [path.name for path in written] == found.names
    again = load_images(tmp_path / "out")
    assert torch.equal(again.images, found.images) and again.scale == found.scale
    for name, array in arrays.items():
        if dtype == "uint8" or not colour:  # Pillow does not know 16-bit colour
            assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / name)), array)


@pytest.mark.parametrize("ending", [".npy", ".npz"])
@pytest.mark.parametrize(
    ("shape", "channels"),
    [((4, 6, 5), 1), ((4, 6, 5, 3), 3), ((4, 3, 6, 5), 3), ((6, 5), 1), ((6, 5, 3), 3)],
)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "int32"])
def test_arrays_come_back_with_layout_and_type(tmp_path, ending, shape, channels, dtype):
    array = pixels(*shape, dtype="uint8").astype(dtype)
    if dtype == "float32":
        array = array * np.float32(40) - np.float32(1000)
    source, out = tmp_path / f"in{ending}", tmp_path / f"out{ending}"
    if ending == ".npy":
        np.save(source, array)
    else:
        np.savez(source, stack=array)
    found = load_images(source)
    count = shape[0] if len(shape) == 4 or shape[-1] == 5 and len(shape) == 3 else 1
    assert found.images.shape == (count, channels, 6, 5)
    white = 1 if dtype == "float32" else 2**10 - 1 if dtype == "uint16" else np.iinfo(dtype).max
    white = 2**10 - 1 if dtype == "int32" else white
    assert found.scale.gain == white and not found.scale.offset
    assert found.images.sum() == pytest.approx(array.sum(dtype=float) / white, rel=1e-5)
    assert save_images(found.images, out, found.names, found.scale) == [out]
    loaded = np.load(out)
    again = loaded if ending == ".npy" else loaded["stack"]
    assert again.shape == array.shape and again.dtype == array.dtype
    assert np.array_equal(again, array)


@pytest.mark.parametrize("name", ["set-idx3-ubyte", "set.idx3-ubyte.gz"])
def test_idx_round_trip(tmp_path, name):
    array = pixels(4, 6, 5)
    data = struct.pack(">IIII", 2051, 4, 6, 5) + array.tobytes()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    found = load_images(tmp_path / name)
    assert np.array_equal(found.images[:, 0].mul(255).round(), array)
    save_images(found.images, tmp_path / f"new-{name}", found.names, found.scale)
    assert np.array_equal(read_idx(tmp_path / f"new-{name}"), array)
    assert (tmp_path / f"new-{name}").read_bytes()[:2] == (
        b"\x1f\x8b" if name.endswith("gz") else b"\0\0"
    )


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    colour=st.sampled_from([0, 2, 4, 6]),
    seed=st.integers(0, 1000),
)
def test_16_bit_png_with_every_filter(size, colour, seed):
    # a file made by the letter of the standard: a filter for each row, byte by byte
    draws = np.random.default_rng(seed)
    step = 2 * CHANNELS[colour]
    raw = draws.integers(0, 256, (size[0], size[1] * step)).astype(int)
    if step in (4, 8):  # with an alpha channel, which is opaque
        raw.reshape(*size, step)[..., -2:] = 255
    rows = []
    for i, row in enumerate(raw):
        kind = int(draws.integers(0, 5))
        up = raw[i - 1] if i else np.zeros_like(row)
        coded = bytearray([kind])
        for j, value in enumerate(row):
            a, c = (row[j - step], up[j - step]) if j >= step else (0, 0)
            b, p = up[j], a + up[j] - c
            near = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
            coded.append((value - [0, a, b, (a + b) // 2, near][kind]) % 256)
        rows.append(bytes(coded))
    header = struct.pack(">IIBBBBB", size[1], size[0], 16, colour, 0, 0, 0)
    data = SIGNATURE
    for kind, content in (
        (b"IHDR", header),
        (b"IDAT", zlib.compress(b"".join(rows))),
        (b"IEND", b""),
    ):
        check = struct.pack(">I", zlib.crc32(kind + content))
        data += struct.pack(">I", len(content)) + kind + content + check
    expected = raw.astype(np.uint8).view(np.uint8).tobytes()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.png"
        file.write_bytes(data)
        with open_pages(file) as pages:
            found = pages.read(0)
    values = np.frombuffer(expected, ">u2").reshape(*size, step // 2)
    assert found.dtype == np.uint16
    assert np.array_equal(found, values[..., :-1] if step in (4, 8) else values)


def test_16_bit_grey_agrees_with_pillow(tmp_path):
    array = pixels(9, 4, dtype="uint16")
    (tmp_path / "a.png").write_bytes(encode_picture(array[..., None]))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), array)
    Image.fromarray(array).save(tmp_path / "b.png")
    with open_pages(tmp_path / "b.png") as pages:
        assert np.array_equal(pages.read(0)[..., 0], array)


def test_jpeg_is_written_as_png_and_names_do_not_meet(tmp_path):
    Image.fromarray(pixels(8, 8, 3)).save(tmp_path / "a.jpg")
    Image.fromarray(pixels(8, 8, 3)).save(tmp_path / "a.png")
    Image.fromarray(pixels(8, 8, 3)).save(tmp_path / "b.JPEG")
    found = load_images(tmp_path)
    written = save_images(found.images, tmp_path / "out", found.names, found.scale)
    assert [p.name for p in written] == ["a.jpg.png", "a.png.png", "b.png"]
    assert torch.equal(load_images(tmp_path / "out").images, found.images)


def test_a_single_picture(tmp_path):
    write_png(tmp_path / "a.png", pixels(4, 6))
    found = load_images(tmp_path / "a.png")
    assert found.names == ["a.png"] and found.images.shape == (1, 1, 4, 6)
    assert save_images(found.images, tmp_path / "b.png", None, found.scale) == [tmp_path / "b.png"]
    assert (tmp_path / "b.png").is_file()


# -- intensities ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_writing_clips_and_rounds(tmp_path, dtype):
    top = np.iinfo(dtype).max
    scale = Scale(gain=float(top), dtype=dtype)
    x = torch.tensor([-9.0, 0.0, 0.4 / top, 0.6 / top, 1.0, 9.0]).reshape(1, 1, 2, 3)
    save_images(x, tmp_path / "a.npy", scale=scale)
    low = np.iinfo(dtype).min if dtype == "int16" else 0
    assert np.load(tmp_path / "a.npy").ravel().tolist() == [low, 0, 0, 1, top, top]


def test_tensors_without_a_file(tmp_path):
    x = torch.randn(3, 2, 5, 4, generator=torch.manual_seed(0))
    assert save_images(x, tmp_path / "new" / "x.npy") == [tmp_path / "new" / "x.npy"]
    assert np.array_equal(np.load(tmp_path / "new" / "x.npy"), x.numpy())
    save_images(x, tmp_path / "folder", format="npz")
    assert np.array_equal(np.load(tmp_path / "folder" / "images.npz")["images"], x.numpy())
    save_images(x[:, :1].clamp(0, 1), tmp_path / "png", format="png")
    found = load_images(tmp_path / "png")
    assert found.names == ["00000.png", "00001.png", "00002.png"]
    assert (found.images - x[:, :1].clamp(0, 1)).abs().max() < 0.5 / 255 + 1e-6


def test_other_kinds_of_picture(tmp_path):
    grey = pixels(4, 6)
    Image.fromarray(grey).convert("P").save(tmp_path / "a.png")
    assert load_images(tmp_path / "a.png").images.shape == (1, 3, 4, 6)
    Image.fromarray(np.dstack([grey] * 3 + [np.full_like(grey, 255)])).save(tmp_path / "b.png")
    assert np.array_equal(load_images(tmp_path / "b.png").images[0, 2].mul(255).round(), grey)
    Image.fromarray(pixels(4, 6, dtype="uint16")).save(tmp_path / "c.tif")
    assert load_images(tmp_path / "c.tif").scale.dtype == "uint16"
    turned = Image.fromarray(grey)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "d.jpg", exif=exif)
    assert load_images(tmp_path / "d.jpg").images.shape == (1, 1, 6, 4)
    Image.fromarray(grey > 99).save(tmp_path / "e.png")
    assert load_images(tmp_path / "e.png").images.unique().tolist() == [0, 1]


# -- choosing -------------------------------------------------------------------------------------


def test_limit_and_channels(tmp_path):
    np.save(tmp_path / "a.npy", pixels(9, 6, 5, 3))
    found = load_images(tmp_path / "a.npy", limit=4, channels=3)
    assert len(found) == 4 and found.names == ["00000", "00001", "00002", "00003"]
    with pytest.raises(InputError, match="expected images of 1 channels in .*, got 3"):
        load_images(tmp_path / "a.npy", channels=1)
    with pytest.raises(InputError, match="limit"):
        load_images(tmp_path / "a.npy", limit=0)


def test_a_named_array_of_an_npz(tmp_path):
    np.savez(tmp_path / "a.npz", train=pixels(3, 4, 5), val=pixels(2, 4, 5))
    assert len(load_images(f"{tmp_path / 'a.npz'}:val")) == 2
    for path in (tmp_path / "a.npz", f"{tmp_path / 'a.npz'}:test"):
        with pytest.raises(InputError) as error:
            load_images(path)
        assert "train, val" in one_line(error)


def test_skip_bad(tmp_path):
    for name in "abc":
        write_png(tmp_path / f"{name}.png", pixels(4, 5))
    write_png(tmp_path / "odd.png", pixels(5, 4))
    write_png(tmp_path / "rgb.png", pixels(4, 5, 3))
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    found = load_images(tmp_path, skip_bad=True)
    assert found.names == ["a.png", "b.png", "c.png"]
    assert [name for name, _ in found.skipped] == ["broken.png", "odd.png", "rgb.png"]
    assert all("\n" not in reason for _, reason in found.skipped)
    assert load_images(tmp_path, skip_bad=True, limit=2).names == ["a.png", "b.png"]
    array = np.zeros((3, 4, 5), np.float32)
    array[1, 2, 3] = np.nan
    np.save(tmp_path / "n.npy", array)
    found = load_images(tmp_path / "n.npy", skip_bad=True)
    assert found.names == ["00000", "00002"] and found.skipped == [("00001", "not finite")]


# -- what goes wrong ------------------------------------------------------------------------------


def refused(path, **options):
    with pytest.raises(InputError) as error:
        load_images(path, **options)
    return one_line(error)


def test_bad_folders(tmp_path):
    assert "nothing at" in refused(tmp_path / "none")
    assert "no PNG" in refused(tmp_path)
    write_png(tmp_path / "a.png", pixels(4, 5))
    write_png(tmp_path / "b.png", pixels(5, 4))
    message = refused(tmp_path)
    assert all(part in message for part in ("a.png", "4x5 gray 8-bit", "b.png", "5x4 gray 8-bit"))
    write_png(tmp_path / "b.png", pixels(4, 5, 3))
    assert "4x5 RGB 8-bit" in refused(tmp_path)
    write_png(tmp_path / "b.png", pixels(4, 5, dtype="uint16"))
    assert "4x5 gray 16-bit" in refused(tmp_path)
    (tmp_path / "b.png").write_bytes(b"\x89PNG and then nonsense")
    assert "b.png" in refused(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    assert "none of the 2 pictures" in refused(tmp_path, skip_bad=True)


def test_bad_pictures(tmp_path):
    rgba = np.full((4, 5, 4), 128, np.uint8)
    write_png(tmp_path / "a.png", rgba)
    assert "transparent" in refused(tmp_path / "a.png")
    whole = encode_picture(pixels(6, 6, 3, dtype="uint16"))
    for data in (whole[:-30], whole[:60] + b"xx" + whole[62:], whole[:35]):
        (tmp_path / "b.png").write_bytes(data)
        assert "b.png" in refused(tmp_path / "b.png")


def test_bad_arrays(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.array([{"code": "never run"}], object))
    assert "cannot read" in refused(path)
    for array, part in (
        (np.zeros(5), "shape (5,)"),
        (np.zeros((2, 17, 20, 30)), "at most 16 channels"),
        (np.zeros((2, 5, 6, 7)), "either 5 or 7 may be the channels"),
        (np.zeros((0, 5, 6)), "shape (0, 5, 6)"),
        (np.zeros((2, 5, 6), complex), "complex128"),
        (np.full((2, 5, 6), np.inf), "not finite"),
    ):
        np.save(path, array)
        assert part in refused(path)
    for name in ("b.npy", "b.npz", "b-idx3-ubyte", "b.gz"):
        (tmp_path / name).write_bytes(b"nonsense that is long enough to be looked at")
        assert name in refused(tmp_path / name)
    (tmp_path / "c.gz").write_bytes(gzip.compress(b"\0\0\x08\x03" + bytes(12))[:-9])
    assert "cannot read" in refused(tmp_path / "c.gz")
    (tmp_path / "d-idx3").write_bytes(struct.pack(">IIII", 2051, 4, 6, 5) + bytes(7))
    assert "cut short" in refused(tmp_path / "d-idx3")
    (tmp_path / "e.idx").write_bytes(b"\0\0\x08\x03\0")
    assert "cut short" in refused(tmp_path / "e.idx")
    (tmp_path / "x.csv").write_text("1,2")
    assert "type of file is unknown" in refused(tmp_path / "x.csv")


def test_bad_writing(tmp_path):
    x = torch.zeros(2, 1, 4, 4)
    cases = [
        (dict(images=x, out=tmp_path / "a", format="gif"), "is unknown"),
        (dict(images=x[0], out=tmp_path / "a"), "(N, C, H, W)"),
        (dict(images=x / 0, out=tmp_path / "a"), "not finite"),
        (dict(images=x, out=tmp_path / "a", names=["a"], format="png"), "2 images but 1 names"),
        (dict(images=x, out=tmp_path / "a", names=["a", "../b"], format="png"), "'../b'"),
        (dict(images=x, out=tmp_path / "a", names=["a", "a"], format="png"), "called a"),
        (dict(images=x, out=tmp_path / "a.png"), "one image, not 2"),
        (dict(images=x.expand(-1, 2, -1, -1), out=tmp_path / "a", format="png"), "channels"),
        (dict(images=x.expand(-1, 3, -1, -1), out=tmp_path / "a", format="idx"), "channels"),
    ]
    for arguments, part in cases:
        with pytest.raises(InputError) as error:
            save_images(**arguments)
        assert part in one_line(error)
    assert list(tmp_path.iterdir()) == []


# -- whole or not at all --------------------------------------------------------------------------


def full_disk(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    x = torch.rand(2, 1, 4, 4)
    save_images(x, tmp_path / "a.npy")
    before = (tmp_path / "a.npy").read_bytes()
    monkeypatch.setattr(os, "fsync", full_disk)
    for name in ("a.npy", "b.npz"):
        with pytest.raises(InputError) as error:
            save_images(1 - x, tmp_path / name)
        assert "No space left" in one_line(error)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npy"]
    assert (tmp_path / "a.npy").read_bytes() == before


def test_a_folder_is_whole_or_absent(tmp_path, monkeypatch):
    x = torch.rand(3, 1, 4, 4)
    whole = os.fsync
    written = []

    def second_fails(number):
        written.append(number)
        return full_disk() if len(written) > 1 else whole(number)

    monkeypatch.setattr("unmurk.io.atomic.os.fsync", second_fails)
    with pytest.raises(InputError, match="No space left"):
        save_images(x, tmp_path / "out", format="png")
    assert len(written) == 2 and list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_keeps_its_other_files(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    x = torch.rand(2, 1, 4, 4)
    save_images(x, out, format="png")
    save_images(1 - x, out, format="png")
    assert sorted(p.name for p in out.iterdir()) == ["00000.png", "00001.png", "notes.txt"]
    assert (load_images(out).images - (1 - x)).abs().max() < 0.5 / 255 + 1e-6
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# -- what ships -----------------------------------------------------------------------------------


def test_shipped_digits():
    train = load_images(ASSETS / "digits" / "train.idx3-ubyte.gz")
    test = load_images(ASSETS / "digits" / "test.idx3-ubyte.gz", channels=1)
    assert train.images.shape == (12000, 1, 28, 28) and test.images.shape == (1000, 1, 28, 28)
    assert 0.12 < train.images.mean() < 0.14
    for name, count in (("train", 12000), ("test", 1000)):
        labels = read_idx(ASSETS / "digits" / f"{name}.idx1-ubyte.gz")
        assert labels.shape == (count,) and set(labels) == set(range(10))
    assert read_idx(ASSETS / "digits" / "train.idx1-ubyte.gz")[:5].tolist() == [5, 0, 4, 1, 9]


def test_shipped_nuclei():
    train = load_images(f"{ASSETS / 'nuclei' / 'nuclei.npz'}:train")
    val = load_images(f"{ASSETS / 'nuclei' / 'nuclei.npz'}:val")
    assert train.images.shape == (600, 1, 64, 64) and val.images.shape == (100, 1, 64, 64)
    assert train.images.min() >= 0 and train.images.max() <= 1
    size = sum(
        f.stat().st_size for part in ("digits", "nuclei") for f in (ASSETS / part).iterdir()
    )
    assert size < 5 * 2**20
