"""Files that declare, or inflate to, more than there is: refused before memory is taken."""

import io
import json
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

from unmurk.errors import InputError
from unmurk.io import limits
from unmurk.io.datasets import open_source
from unmurk.io.images import load_images
from unmurk.io.limits import check_free_memory

BLOCK = 2**24
# the file meta information of a DICOM file whose data set is deflated
UID = b"1.2.840.10008.1.2.1.99"
DEFLATED = b"\2\0\0\0UL\4\0" + struct.pack("<I", 8 + len(UID))
DEFLATED += b"\2\0\x10\0UI" + struct.pack("<H", len(UID)) + UID


def zeros(blocks: int, kind: int) -> bytes:
    """`blocks` times 16 MiB of zeros, deflated; kind 31: as gzip, 15: as zlib. Without an end, so
    that it takes no time to make."""
    head = zlib.compressobj(9, zlib.DEFLATED, kind).flush(zlib.Z_SYNC_FLUSH)
    raw = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = raw.compress(bytes(BLOCK)) + raw.flush(zlib.Z_FULL_FLUSH)
    return head + body * blocks


def png(side: int, bits: int, data: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, bits, 0, 0, 0, 0)
    found = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b"")):
        check = struct.pack(">I", zlib.crc32(name + content))
        found += struct.pack(">I", len(content)) + name + content + check
    return found


def npy(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text.encode()


def idx(*shape: int) -> bytes:
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)


def gz(head: bytes, blocks: int) -> bytes:
    first = zlib.compressobj(9, zlib.DEFLATED, 31)
    start = first.compress(head) + first.flush(zlib.Z_FULL_FLUSH)
    return start + zeros(blocks, -15)


def npz(declared: int, content: bytes) -> bytes:
    """An archive of one array whose length is declared wrongly."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", content)
    data = stream.getvalue()
    return data.replace(struct.pack("<I", len(content)), struct.pack("<I", declared))


def tiff(width: int, height: int, compression: str | None) -> bytes:
    """A TIFF of a few hundred bytes that declares another size."""
    stream = io.BytesIO()
    tifffile.imwrite(stream, np.zeros((8, 8), np.uint8), compression=compression, metadata=None)
    data = bytearray(stream.getvalue())
    (place,) = struct.unpack("<I", data[4:8])
    for at in range(
        place + 2, place + 2 + 12 * struct.unpack("<H", data[place : place + 2])[0], 12
    ):
        (tag,) = struct.unpack("<H", data[at : at + 2])
        if tag in (256, 257, 278):
            data[at + 2 : at + 12] = struct.pack("<HII", 4, 1, width if tag == 256 else height)
    return bytes(data)


def bmp(side: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "BMP")
    data = bytearray(stream.getvalue())
    data[18:26] = struct.pack("<ii", side, side)
    return bytes(data)


def jpeg(side: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "JPEG")
    return stream.getvalue().replace(struct.pack(">HH", 8, 8), struct.pack(">HH", side, side), 1)


def hdf5(shape: tuple[int, ...], chunks: tuple[int, ...], written: int) -> bytes:
    """A data set of which only the first chunks of zeros are stored, compressed."""
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        kind = {"chunks": chunks, "compression": "gzip"}
        file.create_dataset("x", shape, "u1", **kind)[:written] = 0
    return stream.getvalue()


def deflated_chunk(blocks: int) -> bytes:
    """A data set whose only chunk inflates to more than it declares."""
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        made = file.create_dataset("x", (4, 64, 64), "u1", chunks=(4, 64, 64), compression="gzip")
        made.id.write_direct_chunk((0, 0, 0), zeros(blocks, 15))
    return stream.getvalue()


def fits(*cards: str) -> bytes:
    return "".join(f"{card:<80}" for card in (*cards, "END")).encode().ljust(2880)


def image(bits: int, side: int) -> bytes:
    size = [f"NAXIS{n}  = {side}" for n in (1, 2)]
    return fits("SIMPLE  = T", f"BITPIX  = {bits}", "NAXIS   = 2", *size)


def tiles(side: int, tile: int) -> bytes:
    """A FITS file of one compressed image."""
    table = ["XTENSION= 'BINTABLE'", "BITPIX  = 8", "NAXIS   = 2", "NAXIS1  = 8", "NAXIS2  = 8"]
    table += ["PCOUNT  = 0", "GCOUNT  = 1", "TFIELDS = 1", "TFORM1  = '1PB(0)'"]
    table += ["TTYPE1  = 'COMPRESSED_DATA'", "ZIMAGE  = T", "ZCMPTYPE= 'RICE_1'", "ZBITPIX = 16"]
    table += ["ZNAXIS  = 2", *(f"ZNAXIS{n} = {side}" for n in (1, 2))]
    table += [f"ZTILE{n}  = {tile}" for n in (1, 2)]
    first = fits("SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 0")
    return first + fits(*table) + bytes(2880)


def nifti(side: int, start: float) -> bytes:
    """A header of NIfTI-1 for uint8 volumes side x side x side."""
    data = bytearray(352)
    data[0:4] = struct.pack("<i", 348)
    data[40:56] = struct.pack("<8h", 3, side, side, side, 1, 1, 1, 1)
    data[70:74] = struct.pack("<hh", 2, 8)
    data[108:112] = struct.pack("<f", start)
    data[344:348] = b"n+1\0"
    return bytes(data)


BOMBS = {
    "chunk.h5": lambda: deflated_chunk(192),  # 3 GiB
    "late.h5": lambda: hdf5((2**24, 64, 64), (1, 64, 64), 4),  # 64 GiB
    "large.h5": lambda: hdf5((4, 2**14, 2**14), (1, 64, 2**14), 0),
    "inside.mat": lambda: hdf5((2**18, 128, 128), (2**6, 128, 128), 0),
    "header.fits.gz": lambda: gz(b"SIMPLE  =                    T".ljust(80), 192),
    "declared.fits.gz": lambda: gz(image(-64, 2**14), 192),
    "huge.fits": lambda: image(8, 2**30),
    "tiles.fits.fz": lambda: tiles(64, 2**20),
    "wide.fits.fz": lambda: tiles(2**20, 64),
    "declared.nii.gz": lambda: gz(nifti(2**11, 352), 192),
    "start.nii.gz": lambda: gz(nifti(8, 1e9), 192),
    "huge.nii": lambda: nifti(2**15 - 1, 352),
    "deep.png": lambda: png(8, 16, zeros(192, 15)),  # 3 GiB
    "flat.png": lambda: png(8, 8, zeros(192, 15)),
    "wide.png": lambda: png(13000, 8, zeros(11, 15)),
    "huge.png": lambda: png(2**30, 16, b""),
    "wide.jpg": lambda: jpeg(65000),
    "wide.bmp": lambda: bmp(2**20),
    "more.gz": lambda: gz(idx(4, 28, 28), 192),  # inflates to more than it declares
    "declared.gz": lambda: gz(idx(4000, 1000, 1000), 192),
    "long-idx3-ubyte": lambda: idx(2**31, 2**31, 8),
    "declared.npy": lambda: npy((2**40, 28, 28)),
    "header.npy": lambda: npy((4, "9" * 5000)),
    "declared.npz": lambda: npz(2**32 - 2, npy((4, 8, 8))),
    "inside.npz": lambda: npz(len(npy((2**28, 8))), npy((2**28, 8))),
    "plain.tif": lambda: tiff(11000, 11000, None),
    "deflated.tif": lambda: tiff(11000, 11000, "zlib"),
    "deflated.dcm": lambda: bytes(128) + b"DICM" + DEFLATED + zeros(192, -15),
    "huge.tif": lambda: tiff(2**31 - 1, 2**31 - 1, "zlib"),
    "lzw.tif": lambda: tiff(11000, 11000, "lzw"),
}

READ = """
import json, re, sys
from pathlib import Path
from unmurk.errors import InputError
from unmurk.io.images import load_images
found = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        load_images(path)
        said = "taken"
    except InputError as error:
        said = str(error)
    # the peak of this program alone: that of getrusage begins with the parent's
    peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]
    found[path.name] = [said, int(peak) // 1024]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_bombs_are_refused_below_one_gib(tmp_path):
    for name, make in BOMBS.items():
        data = make()
        assert len(data) < 4 * 2**20
        (tmp_path / name).write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert set(found) == set(BOMBS)
    for name, (said, peak) in found.items():
        assert name in said and "\n" not in said, (name, said)
        assert peak < 700, (name, peak)  # MiB; torch alone takes some 300
    for name in ("wide.png", "huge.png", "wide.jpg", "wide.bmp", "declared.gz", "declared.npz"):
        assert "UNMURK_MAX_PIXELS=" in found[name][0]


def test_the_limit_can_be_raised_as_the_message_says(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_PIXELS", 60)
    Image.new("L", (8, 8), 255).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "a.tif", np.full((8, 8), 255, np.uint8))
    np.savez_compressed(tmp_path / "a.npz", images=np.full((20, 8, 8), 255, np.uint8))
    for name in ("a.png", "a.tif", "a.npz"):
        monkeypatch.delenv("UNMURK_MAX_PIXELS", raising=False)
        with pytest.raises(InputError, match="UNMURK_MAX_PIXELS=") as error:
            load_images(tmp_path / name)
        monkeypatch.setenv("UNMURK_MAX_PIXELS", str(error.value).rpartition("=")[2])
        assert load_images(tmp_path / name).images.unique().tolist() == [1]
    for wrong in ("0", "-3", "x", "1e9"):
        monkeypatch.setenv("UNMURK_MAX_PIXELS", wrong)
        with pytest.raises(InputError, match="whole number"):
            load_images(tmp_path / "a.png")


def test_pillow_does_not_warn_of_large_pictures(tmp_path, monkeypatch):
    """Its limit is not ours; warnings are errors here."""
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    assert load_images(tmp_path / "a.png").images.shape == (1, 1, 64, 64)
    assert Image.MAX_IMAGE_PIXELS == 3000


def test_sets_are_held_against_the_free_memory(tmp_path, monkeypatch):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((4, 8, 8), np.float32))
    monkeypatch.setattr(limits, "_available", lambda: 1000)
    with pytest.raises(InputError, match="of memory and"):
        load_images(path)
    assert open_source(path).shape == (4, 1, 8, 8)  # which holds nothing
    monkeypatch.setattr(limits, "_available", lambda: None)  # where the system does not say
    check_free_memory(Path("it"), 2**60)
