"""TIFF stacks: pixels and what stands beside them come back, and memory holds one page."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from unmurk.errors import InputError
from unmurk.flows.posterior import Config, Posterior
from unmurk.io.axes import Selection
from unmurk.io.formats import tiff_copy
from unmurk.io.formats.tiff import Stack
from unmurk.io.formats.tiff_writer import StackWriter
from unmurk.io.images import load_images
from unmurk.io.jobs import jobs_of, process
from unmurk.io.scale import Scale

rng = np.random.default_rng(0)


def numbers(*shape, dtype="uint16"):
    if np.dtype(dtype).kind == "f":
        return rng.normal(500, 300, shape).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype, endpoint=True)


def same(y, index):
    """An engine that restores nothing."""
    return {"images": y}


def through(source: Path, out: Path, engine=same):
    return process(jobs_of(source, out), engine)


def facts(path: Path) -> dict:
    """What a reader of TIFF knows of a file but its pixels."""
    with tifffile.TiffFile(path) as found:
        page = found.pages[0]
        return {
            "axes": [(s.axes, s.shape, str(s.dtype)) for s in found.series],
            "kind": (found.is_ome, found.is_imagej, found.byteorder, found.is_bigtiff),
            "text": [p.aspage().description for p in found.pages],
            "imagej": repr(found.imagej_metadata),
            "tags": {
                code: page.tags[code].value
                for code in (296, 305, 306, 315, 285)
                if code in page.tags
            },
            # rationals: older versions of tifffile reduce them
            "sides": [Fraction(*page.tags[c].value) for c in (282, 283) if c in page.tags],
            "size": (page.resolution, int(page.planarconfig), int(page.photometric)),
        }


def ome(path):
    data = numbers(2, 3, 33, 40)
    about = {"axes": "TCYX", "PhysicalSizeX": 0.11, "PhysicalSizeXUnit": "µm"}
    tifffile.imwrite(path, data, ome=True, metadata=about, photometric="minisblack")
    return data


def imagej(path):
    data = numbers(2, 3, 2, 33, 40)
    about = {"axes": "TZCYX", "spacing": 0.5, "unit": "um", "Info": "a line\nanother: é"}
    tifffile.imwrite(path, data, imagej=True, resolution=(9.1, 9.2), metadata=about)
    return data


def named(path):
    """Tags of its own on every page, deflated, resolution in centimetres."""
    data = numbers(3, 33, 40)
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for i, page in enumerate(data):
            writer.write(
                page,
                description=f"position {i}",
                resolution=(120000, 130000),
                resolutionunit="CENTIMETER",
                software="a camera",
                datetime="2024:05:06 07:08:09",
                extratags=[(315, "s", 0, "someone", True), (285, "s", 0, f"page {i}", True)],
                metadata=None,
                compression="zlib",
                photometric="minisblack",
            )
    return data


def colour(path, planar="contig", dtype="uint8"):
    data = numbers(2, 33, 40, 3, dtype=dtype)
    pages = np.moveaxis(data, -1, 1) if planar == "separate" else data
    tifffile.imwrite(path, pages, photometric="rgb", planarconfig=planar)
    return pages


def planes(path):
    return colour(path, "separate", "uint16")


@pytest.mark.parametrize("make", [ome, imagej, named, colour, planes])
def test_everything_comes_back(make, tmp_path):
    """Pixels bit for bit; axes, descriptions, resolution, byte order, ImageJ's own tags."""
    source, out = tmp_path / "in.tif", tmp_path / "out.tif"
    data = make(source)
    done = through(source, out)
    with Stack(source) as stack:
        assert done.images == len(stack)
    assert np.array_equal(tifffile.imread(out), data)
    assert facts(out) == facts(source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.tif", "out.tif"]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "float32"])
def test_types_and_ranges(dtype, tmp_path):
    """One scale for all pages: 1 is the largest number of the type, floats are what they are."""
    data = numbers(3, 33, 40, dtype=dtype)
    tifffile.imwrite(tmp_path / "in.tif", data, photometric="minisblack")
    seen = []

    def engine(y, index):
        seen.append((y, index))
        return {"images": y}

    through(tmp_path / "in.tif", tmp_path / "out.tif", engine)
    ((y, index),) = seen
    white = 1.0 if dtype == "float32" else float(np.iinfo(dtype).max)
    assert index == [0, 1, 2]
    assert np.allclose(y[:, 0], data / np.float64(white), rtol=1e-6, atol=0)
    again = tifffile.imread(tmp_path / "out.tif")
    assert again.dtype == data.dtype
    atol = 128 if dtype == "uint32" else 0  # 24 of 32 bits in float32
    assert np.abs(again.astype(float) - data.astype(float)).max() <= atol


def test_a_stack_is_read_as_images(tmp_path):
    data = numbers(3, 33, 40)
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="minisblack")
    tifffile.imwrite(tmp_path / "b.tif", data[0], photometric="minisblack")
    found = load_images(tmp_path)
    assert found.names == ["a-00000.tif", "a-00001.tif", "a-00002.tif", "b.tif"]
    assert found.numbers == [0, 1, 2, 3]
    assert np.allclose(found.images[:3, 0], data / 65535, atol=1e-7)
    assert load_images(tmp_path, limit=2).names == ["a-00000.tif", "a-00001.tif"]
    tifffile.imwrite(tmp_path / "c.tif", data.astype(np.float32), photometric="minisblack")
    assert load_images(tmp_path / "c.tif").scale == Scale(0.0, 1.0, "float32", "tif")


def test_channels_that_come_last_without_a_name_are_noted(tmp_path, capsys):
    tifffile.imwrite(tmp_path / "a.tif", numbers(40, 50, 2), photometric="minisblack")
    tifffile.imwrite(tmp_path / "b.tif", numbers(40, 50, 60), photometric="minisblack")
    with Stack(tmp_path / "a.tif") as stack:
        assert "read as 40 images of 50x2 pixels: --axes YXC reads one image of 2" in stack.note
    for file, axes in (("a.tif", "YXC"), ("a.tif", "NYX"), ("b.tif", "")):
        with Stack(tmp_path / file, Selection(axes)) as stack:
            assert not stack.note


def test_arrays_that_come_with_a_stack(tmp_path):
    """Page by page into one file: (N, C, H, W), and (S, N, C, H, W) of samples."""
    data = numbers(5, 33, 40)
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="minisblack")

    def engine(y, index):
        return {"images": y, "std": 2 * y, "samples": torch.stack([y, -y])}

    process(jobs_of(tmp_path / "a.tif", tmp_path / "out"), engine)
    y = data[:, None].astype(np.float32) / 65535
    std = tifffile.imread(tmp_path / "out" / "a-std.tif")  # in the numbers of the file
    assert std.dtype == "float32" and np.allclose(std, 2.0 * data, rtol=1e-6)
    samples = np.load(tmp_path / "out" / "a-samples.npy")
    assert np.allclose(samples, np.stack([y, -y]), atol=1e-6)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "a-samples.npy",
        "a-std.tif",
        "a.tif",
    ]


def refused(path: Path) -> str:
    with pytest.raises(InputError) as error, Stack(path) as stack:
        for page in range(len(stack)):
            stack.read(page)
    text = str(error.value)
    assert "\n" not in text and path.name in text
    return text


def test_bad_stacks(tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(b"no TIFF at all, but long enough")
    assert "cannot read" in refused(path)
    tifffile.imwrite(path, numbers(3, 64, 64), photometric="minisblack")
    path.write_bytes(path.read_bytes()[:9000])
    assert "cannot read" in refused(path)
    tifffile.imwrite(path, numbers(33, 40, 4), photometric="rgb", extrasamples=["unassalpha"])
    assert "alpha" in refused(path)
    tifffile.imwrite(path, numbers(33, 40, dtype="int16"), photometric="miniswhite")
    assert "MinIsWhite" in refused(path)
    tifffile.imwrite(path, numbers(3, 33, 40, 3), metadata={"axes": "CYXS"}, photometric="rgb")
    assert "which axis holds the channels" in refused(path)
    tifffile.imwrite(path, numbers(33, 40, 2), metadata={"axes": "YXC"})
    assert "not pages of Y and X" in refused(path)
    with tifffile.TiffWriter(path) as writer:
        for side in (8, 16):
            writer.write(numbers(side, 8), photometric="minisblack", metadata=None)
    assert "8x8 gray uint16, page 1 is 16x8" in refused(path)


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    out = tmp_path / "a.tif"
    out.write_bytes(b"old")
    writer = StackWriter(out)
    writer.write(numbers(33, 40, 1))
    assert out.read_bytes() == b"old"
    writer.abandon()
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"] and out.read_bytes() == b"old"


def test_large_stacks_get_long_offsets(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", numbers(2, 33, 40), photometric="minisblack")
    monkeypatch.setattr(tiff_copy, "LARGE", 100)
    through(tmp_path / "a.tif", tmp_path / "b.tif")
    with tifffile.TiffFile(tmp_path / "b.tif") as found:
        assert found.is_bigtiff and len(found.pages) == 2


# -- memory ---------------------------------------------------------------------------------------

PEAK = """
import re, sys
from pathlib import Path
from unmurk.cli import main as cli
for name in sys.argv[3:]:  # from small to large
    argv = ["restore", name, "--prior", sys.argv[1], "--operator", "identity", "--noise", "0.1"]
    assert cli.main([*argv, "--samples", "2", "--out", sys.argv[2]]) == 0
    # the peak of this program alone: that of getrusage begins with the parent's
    print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.slow
def test_memory_of_a_large_page(tmp_path):
    """32 bytes a pixel beyond what a small page takes: 4096 x 4096 pixels need less than 2 GiB.

    A page of 16 bits is restored with a flow that is small for the sake of time: what grows with
    the page are images.
    """
    config = Config(1, 64, 64, mean=8, context=8, couplings=1, hidden=8)
    Posterior(config).save(tmp_path / "run" / "posterior")
    sides = (128, 2048)
    for side in sides:
        tifffile.imwrite(tmp_path / f"{side}.tif", numbers(side, side), photometric="minisblack")
    argv = [sys.executable, "-c", PEAK, tmp_path / "run", tmp_path / "out"]
    argv += [tmp_path / f"{side}.tif" for side in sides]
    ours = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed images are given back at once
    done = subprocess.run(argv, capture_output=True, text=True, check=True, env=os.environ | ours)
    for side in sides:
        assert tifffile.imread(tmp_path / "out" / f"{side}.tif").shape == (side, side)
    small, large = (int(line) for line in done.stdout.splitlines() if line.isdecimal())
    pixels = 2048**2 - 128**2
    assert large - small < 32 * pixels / 2**20
    assert small + (large - small) * (4096**2 - 128**2) / pixels < 2048
