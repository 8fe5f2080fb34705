"""TIFF files whose directories or tags are damaged: refused at once, or left out, and named."""

import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile

from unmurk.errors import InputError
from unmurk.io.formats.directories import check_chain
from unmurk.io.formats.tiff import Stack
from unmurk.io.images import load_images
from unmurk.io.jobs import jobs_of, process

rng = np.random.default_rng(0)


def same(y, numbers):
    return {"images": y}


def stack(path: Path, pages: int, **options: object) -> bytearray:
    """The bytes of a valid stack, which is at the path."""
    pixels = rng.integers(0, 256, (pages, 8, 8), np.uint8)
    tifffile.imwrite(path, pixels, photometric="minisblack", metadata=None, **options)
    return bytearray(path.read_bytes())


def directories(data: bytes, big: bool) -> list[tuple[int, int]]:
    """Where each directory begins, and where it says what the next one is."""
    offset, number, tag = ("<Q", "<Q", 20) if big else ("<I", "<H", 12)
    found = []
    at = struct.unpack_from(offset, data, 8 if big else 4)[0]
    while at:
        count = struct.unpack_from(number, data, at)[0]
        after = at + struct.calcsize(number) + count * tag
        found.append((at, after))
        at = struct.unpack_from(offset, data, after)[0]
    return found


# -- the chain of pages ---------------------------------------------------------------------------


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize(
    ("pages", "last", "back"), [(3, 2, 0), (3, 2, 2), (3, 0, 0), (150, 149, 120)]
)
def test_chains_that_lead_back_are_refused(pages, last, back, big, tmp_path):
    """Whatever page it is that leads back, and whichever it leads to."""
    data = stack(tmp_path / "a.tif", pages, bigtiff=big)
    found = directories(data, big)
    assert len(found) == pages
    struct.pack_into("<Q" if big else "<I", data, found[last][1], found[back][0])
    (tmp_path / "a.tif").write_bytes(data)
    with pytest.raises(InputError, match=f"after page {last} comes page {back} again") as error:
        load_images(tmp_path / "a.tif")
    assert "a.tif" in str(error.value)


def test_directories_without_tags_or_without_room_are_refused(tmp_path):
    path = tmp_path / "a.tif"
    data = stack(path, 2)
    (_, _), (second, _) = directories(data, False)
    struct.pack_into("<H", data, second, 0)
    path.write_bytes(data)
    with pytest.raises(InputError, match="page 1 has no tags"):
        load_images(path)
    below(path, {}, 2)
    with tifffile.TiffFile(path) as tiff:
        at = tiff.pages[0].tags[330].offset
    many = bytearray(path.read_bytes())
    struct.pack_into("<I", many, at + 4, 2**31)
    path.write_bytes(many)
    with pytest.raises(InputError, match="more directories than bytes"):
        load_images(path)


def below(path: Path, layout: dict[str, object], count: int) -> np.ndarray:
    """Writes pages with so many directories below each. Returns their pixels."""
    pixels = rng.integers(0, 256, (20, 4, 4), np.uint8)
    with tifffile.TiffWriter(path, **layout) as writer:
        for page in pixels:
            writer.write(page, photometric="minisblack", metadata=None, subifds=count)
            for _ in range(count):
                writer.write(page, photometric="minisblack", metadata=None, subfiletype=1)
    return pixels


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("layout", [{}, {"bigtiff": True}, {"byteorder": ">"}])
def test_sound_chains_pass(layout, count, tmp_path):
    path = tmp_path / "a.tif"
    pixels = below(path, layout, count)
    with tifffile.TiffFile(path) as found:
        check_chain(path, found)
    with Stack(path) as images:
        assert np.array_equal(images.read(7 * (1 + count))[..., 0], pixels[7])


# -- tags that are copied -------------------------------------------------------------------------


def damaged(folder: Path, page: int) -> Path:
    """Three stacks of two pages, of which the second has a page of a resolution of 121/0."""
    folder.mkdir()
    for i in range(3):
        stack(folder / f"{i}.tif", 2, resolution=(300, 300))
    path = folder / "1.tif"
    with tifffile.TiffFile(path) as tiff:
        found = tiff.pages[page]
        tags = found.aspage().tags if page else found.tags
    at = tags[282].valueoffset
    data = bytearray(path.read_bytes())
    struct.pack_into("<II", data, at, 121, 0)
    path.write_bytes(data)
    return folder


@pytest.mark.parametrize("page", [0, 1])
def test_files_whose_tags_cannot_be_copied_are_named_or_left_out(page, tmp_path):
    folder, out, calls = damaged(tmp_path / "in", page), tmp_path / "out", []

    def engine(y, numbers):
        calls.append(numbers)
        return {"images": y}

    with pytest.raises(InputError, match="cannot copy the tags of .*1.tif"):
        process(jobs_of(folder, out), engine)
    assert calls == []  # it is known before the work
    done = process(jobs_of(folder, out, skip_bad=True), same, skip_bad=True)
    assert list(done.skipped) == ["1.tif"] and "cannot copy the tags" in done.skipped["1.tif"]
    assert done.images == 4 and sorted(p.name for p in out.iterdir()) == ["0.tif", "2.tif"]
    for name in ("0.tif", "2.tif"):
        assert np.array_equal(tifffile.imread(out / name), tifffile.imread(folder / name))


def test_pixels_are_read_whatever_the_tags(tmp_path):
    """Learning, and results in other files, copy none."""
    folder = damaged(tmp_path / "in", 0)
    assert len(load_images(folder).images) == 6
    single = tmp_path / "one.tif"
    tifffile.imwrite(single, rng.integers(0, 256, (8, 8), np.uint8), resolution=(300, 300))
    with tifffile.TiffFile(single) as tiff:
        at = tiff.pages[0].tags[282].valueoffset
    data = bytearray(single.read_bytes())
    struct.pack_into("<II", data, at, 121, 0)
    single.write_bytes(data)
    assert process(jobs_of(single, tmp_path / "one.png"), same).images == 1


COUNTS, TYPES, CODES = (0, 2, 3), (1, 2, 4, 5, 11, 12), (317, 274, 284, 339)


@pytest.mark.parametrize("compression", ["zlib", "jpeg"])
def test_entries_of_another_code_type_or_count_are_refused_or_read(compression, tmp_path):
    """A value that should be one number may be a text, a fraction, or several numbers."""
    file, results = tmp_path / "a.tif", []
    more = {"predictor": True} if compression == "zlib" else {}
    good = stack(file, 1, compression=compression, resolution=(300, 300), software="s", **more)
    ((at, after),) = directories(good, False)
    changes = [
        *(("<H", 0, code) for code in CODES),
        *(("<H", 2, kind) for kind in TYPES),
        *(("<I", 4, count) for count in COUNTS),
    ]
    for entry in range(at + 2, after, 12):
        for form, place, value in changes:
            data = bytearray(good)
            struct.pack_into(form, data, entry + place, value)
            file.write_bytes(data)
            out = tmp_path / f"{len(results)}.tif"
            try:
                results.append(process(jobs_of(file, out), same).images)
            except InputError as error:
                assert "a.tif" in str(error)
                results.append(0)
    assert set(results) == {0, 1} and len(results) > 150
