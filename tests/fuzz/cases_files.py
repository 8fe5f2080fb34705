"""Image files of every format, damaged at random or by structure, through every reader.

`prepare` makes small valid files once. A case damages one, puts it beside two others of its kind,
and reads the file alone and the folder, whole and as a stream.
"""

import functools
import gzip
import io
import os
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from PIL import Image

from unmurk.errors import InputError
from unmurk.io.datasets import Source, as_source, large, open_source
from unmurk.io.images import ImageSet, load_images, load_measurements
from unmurk.io.jobs import jobs_of, process

from .judge import Mishandled
from .mutate import mutated, structured

SIDE = 16
PICTURES = (".png", ".jpg", ".bmp", ".tif")
NUMBERS = 2**28  # of one set that was read: more is a bomb that went off

Seeds = dict[str, list[bytes]]
"""Valid files by name, as three variants with other pixels."""


def prepare() -> None:
    """Make the valid files once, before workers are forked."""
    seeds()
    bombs()


@functools.cache
def seeds() -> Seeds:
    """Three valid files of each kind, by a name that tells the kind."""
    made: Seeds = {}
    for variant in range(3):
        draws = np.random.default_rng(variant)
        for name, data in {**pictures(draws), **tiffs(draws), **arrays(draws)}.items():
            made.setdefault(name, []).append(data)
    return made


def pictures(draws: np.random.Generator) -> dict[str, bytes]:
    """PNG, JPEG and BMP files of each mode."""
    grey = draws.integers(0, 256, (SIDE, SIDE), np.uint8)
    colour = draws.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    images = {
        "grey": Image.fromarray(grey),
        "rgb": Image.fromarray(colour),
        "deep": Image.fromarray(grey.astype(np.uint16) * 257),
        "palette": Image.fromarray(colour).quantize(8),
        "bit": Image.fromarray(grey > 127),
        "alpha": Image.fromarray(np.dstack([colour, np.full_like(grey, 255)])),
    }
    made = {}
    for name, image in images.items():
        for form in ("png", "bmp", "jpg"):
            if (form == "bmp" and name == "deep") or (
                form == "jpg" and name not in ("grey", "rgb")
            ):
                continue
            stream = io.BytesIO()
            exif = Image.Exif()
            exif[0x112] = 6
            more: dict[str, Any] = {"exif": exif} if form != "bmp" and name == "rgb" else {}
            image.save(stream, "jpeg" if form == "jpg" else form, **more)
            made[f"{name}.{form}"] = stream.getvalue()
    return made


def tiffs(draws: np.random.Generator) -> dict[str, bytes]:
    """TIFF files of each number type, layout and compression."""

    def tif(array: np.ndarray, **options: Any) -> bytes:
        stream = io.BytesIO()
        tifffile.imwrite(stream, array, **options)
        return stream.getvalue()

    grey = draws.integers(0, 256, (SIDE, SIDE), np.uint8)
    stack = draws.integers(0, 256, (3, SIDE, SIDE), np.uint8)
    colour = np.moveaxis(stack, 0, -1).copy()
    types = ("u1", "u2", "u4", "i2", "i4", "f2", "f4", "f8")
    made = {f"{t}.tif": tif((grey / 256).astype(t) if "f" in t else grey.astype(t)) for t in types}
    for method in ("zlib", "lzw", "packbits", "zstd", "lzma", "jpeg"):
        made[f"{method}.tif"] = tif(grey, compression=method)
    made |= {
        "rgb.tif": tif(colour, photometric="rgb"),
        "rgb16.tif": tif(colour.astype(np.uint16) * 257, photometric="rgb"),
        "planes.tif": tif(stack, photometric="rgb", planarconfig="separate"),
        "pages.tif": tif(stack, photometric="minisblack"),
        "floats.tif": tif(stack.astype(np.float32) / 255, photometric="minisblack"),
        "big.tif": tif(grey, bigtiff=True),
        "motorola.tif": tif(stack.astype(np.uint16), byteorder=">", photometric="minisblack"),
        "tiles.tif": tif(grey, tile=(16, 16)),
        "predictor.tif": tif(grey, compression="zlib", predictor=True),
        "imagej.tif": tif(stack.astype(np.uint16), imagej=True, metadata={"axes": "TYX"}),
        "ome.tif": tif(stack, ome=True, metadata={"axes": "TYX"}),
        "white.tif": tif(grey, photometric="miniswhite"),
        "bit.tif": tif(grey > 127),
        "channels.tif": tif(stack[:2], metadata={"axes": "CYX"}, photometric="minisblack"),
    }
    return made


def arrays(draws: np.random.Generator) -> dict[str, bytes]:
    """Array files: .npy and .npz of each type and layout, idx, and idx.gz."""

    def npy(array: np.ndarray) -> bytes:
        stream = io.BytesIO()
        np.save(stream, array)
        return stream.getvalue()

    def npz(save: Callable[..., Any], **named: np.ndarray) -> bytes:
        stream = io.BytesIO()
        save(stream, **named)
        return stream.getvalue()

    u1 = draws.integers(0, 256, (3, SIDE, SIDE), np.uint8)
    floats = draws.random((3, SIDE, SIDE))
    made = {f"{t}.npy": npy((floats * 100).astype(t)) for t in ("u1", "u2", "i4", "i8", "u8", "?")}
    made |= {f"{t}.npy": npy(floats.astype(t)) for t in ("f2", "f4", "f8", ">f4")}
    made |= {
        "fortran.npy": npy(np.asfortranarray(floats)),
        "rgb.npy": npy(draws.random((3, SIDE, SIDE, 3))),
        "planes.npy": npy(draws.random((3, 3, SIDE, SIDE), np.float32)),
        "two.npy": npy(draws.random((3, 2, SIDE, SIDE), np.float32)),
        "one.npy": npy(u1[0]),
        "packed.npz": npz(np.savez_compressed, images=u1),
        "stored.npz": npz(np.savez, images=floats),
        "several.npz": npz(np.savez, images=u1, more=floats),
    }
    raw = bytes([0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, SIDE, 0, 0, 0, SIDE]) + u1.tobytes()
    return {**made, "t-idx3-ubyte": raw, "t-idx3-ubyte.gz": gzip.compress(raw, mtime=0)}


@functools.cache
def bombs() -> dict[str, bytes]:
    """Small files that hold gigabytes, or say so."""
    from struct import pack

    def squeezed(bits: int) -> bytes:  # 3 GiB of zeros: one packed piece, many times
        packer = zlib.compressobj(9, wbits=bits)
        zeros = bytes(2**24)
        first = packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH)
        piece = packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH)
        return first + piece * 191 + packer.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return pack(">I", len(content)) + kind + content + pack(">I", zlib.crc32(kind + content))

    def png(width: int, height: int, bits: int, content: bytes) -> bytes:
        head = chunk(b"IHDR", pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", content) + chunk(b"IEND", b"")

    def header(shape: tuple[int, ...]) -> bytes:
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            stream, {"descr": "<f4", "fortran_order": False, "shape": shape}
        )
        return stream.getvalue()

    zeros = squeezed(15)
    return {
        "small8.png": png(8, 8, 8, zeros),
        "small16.png": png(8, 8, 16, zeros),
        "wide8.png": png(40000, 40000, 8, zeros),
        "wide16.png": png(30000, 30000, 16, zeros),
        "bomb-idx3-ubyte.gz": squeezed(31),
        "terabytes.npy": header((10**6, 2**14, 2**14)) + bytes(4096),
        "thin.npy": header((2**40, 0, 16)),
        "row.npy": header((2**31, 1, 1)) + bytes(64),
    }


# -- one case ----------------------------------------------------------------------------------


def run(draws: random.Random, folder: Path) -> None:
    """Damage a file and read it in every way."""
    name, data, others = damaged(draws)
    set_ = folder / "set"
    set_.mkdir()
    file = set_ / f"1{name}"
    file.write_bytes(data)
    if draws.random() < 0.01:
        other_than_a_file(draws, file)
    single = refused_or(lambda: check_set(load_images(file)))
    refused_or(lambda: check_set(load_images(file, skip_bad=True)))
    if file.suffix in PICTURES:
        for i, content in enumerate(others):
            (set_ / f"{2 * i}{name}").write_bytes(content)
        if not refused_or(lambda: check_set(load_images(set_))) and single:
            raise Mishandled("a folder is read whole though a file in it is refused")
        read_folder(set_, name, others)
    else:
        refused_or(lambda: check_set(load_measurements(file)))
        refused_or(lambda: stream(open_source(file)))
        refused_or(lambda: stream(open_source(file, skip_bad=True)))
        refused_or(lambda: stream(as_source(file)))
        refused_or(lambda: large(file))


def damaged(draws: random.Random) -> tuple[str, bytes, list[bytes]]:
    """Name and bytes of a damaged file, and two sound files of its kind."""
    name = draws.choice(list(seeds()))
    one, *others = seeds()[name]
    chance = draws.random()
    if chance < 0.01:
        name = draws.choice(list(bombs()))
        kind = {".png": "grey.png", ".npy": "f4.npy", ".gz": "t-idx3-ubyte.gz"}[Path(name).suffix]
        return name, bombs()[name], seeds()[kind][:2]
    if chance < 0.03:  # another kind of file under this name
        return name, draws.choice(list(seeds().values()))[0], others
    if chance < 0.04:
        return name, one, others
    if chance < 0.55:
        return name, structured(draws, name, one), others
    other = draws.choice([others[0], draws.choice(list(seeds().values()))[0]])
    return name, mutated(draws, one, other), others


def other_than_a_file(draws: random.Random, file: Path) -> None:
    """Put a link, a folder or a pipe in the place of a file."""
    file.unlink()
    what = draws.choice(["dangling", "loop", "folder", "pipe", "zero"])
    if what == "folder":
        file.mkdir()
    elif what == "pipe":
        os.mkfifo(file)
    else:
        os.symlink({"dangling": "nowhere", "loop": file.name, "zero": "/dev/zero"}[what], file)


def read_folder(folder: Path, name: str, others: list[bytes]) -> None:
    """Read a folder with sound files in it, the others left out, in every way."""
    for way, read in WAYS.items():
        if sound(way, name, folder.parent / f"sound-{way}", others):
            try:
                read(folder, True)
            except InputError as error:
                raise Mishandled(f"{way} with skip_bad refuses a folder: {error}") from None
        refused_or(lambda read=read: read(folder, False))  # type: ignore[misc]
    refused_or(lambda: large(folder))


KNOWN: dict[tuple[str, str], bool] = {}


def sound(way: str, name: str, folder: Path, files: list[bytes]) -> bool:
    """Whether a way to read takes the undamaged files of a kind."""
    if (way, name) not in KNOWN:
        folder.mkdir()
        for i, content in enumerate(files):
            (folder / f"{i}{name}").write_bytes(content)
        KNOWN[way, name] = not refused_or(lambda: WAYS[way](folder, False))
    return KNOWN[way, name]


def restored(folder: Path, skip_bad: bool) -> None:
    """Work a folder off as `restore` does, the images as they are."""
    out = folder.parent / f"out-{skip_bad}"
    jobs = jobs_of(folder, out, skip_bad=skip_bad)
    try:
        done = process(jobs, lambda y, numbers: {"images": y}, skip_bad=skip_bad)
    finally:
        left = [path.name for path in out.rglob("*.part*")] if out.exists() else []
        if left:
            raise Mishandled(f"left behind: {left[0]}")
    if done.images == 0:
        raise InputError("nothing was read")
    shutil.rmtree(out, ignore_errors=True)


def refused_or(read: Callable[[], None]) -> bool:
    """Whether reading is refused as it should be; a wrong message raises."""
    from .judge import check_message

    try:
        read()
    except InputError as error:
        check_message(str(error))
        return True
    return False


def check_set(found: ImageSet) -> None:
    """What was read is a set of finite images."""
    check_images(found.images)
    if not len(found.images) == len(found.names) == len(found.numbers):
        raise Mishandled(f"{len(found.images)} images, {len(found.names)} names")
    if len(set(found.names)) < len(found.names):
        raise Mishandled("two images have one name")


def check_images(images: torch.Tensor) -> None:
    """Images are float32 (N, C, H, W), finite, and not too many."""
    if images.ndim != 4 or images.dtype != torch.float32 or not images.numel():
        raise Mishandled(f"images {tuple(images.shape)} {images.dtype}")
    if images.numel() > NUMBERS:
        raise Mishandled(f"{images.numel()} numbers were read")
    if not bool(images.isfinite().all()):
        raise Mishandled("images that are not finite were read")


def stream(source: Source | torch.Tensor) -> None:
    """Read a source row by row, as learning does."""
    if len(source) == 0:
        raise Mishandled("a source of no images")
    check_images(source[torch.arange(min(len(source), 8))])
    if isinstance(source, Source):
        source.fingerprint()


WAYS: dict[str, Callable[[Path, bool], None]] = {
    "load_images": lambda folder, skip: check_set(load_images(folder, skip_bad=skip)),
    "open_source": lambda folder, skip: stream(open_source(folder, skip_bad=skip)),
    "process": restored,
}
"""Ways to read a folder, with bad files left out or not."""
