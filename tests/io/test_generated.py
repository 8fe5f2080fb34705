"""Images that come from no file, written batch by batch: as if all were written at once."""

import numpy as np
import pytest
import tifffile
import torch

import unmurk
from unmurk.cli import main as cli
from unmurk.diffusion.prior import Prior
from unmurk.io.generated import GeneratedWriter, numbered
from unmurk.io.images import load_images
from unmurk.io.saving import save_images
from unmurk.io.scale import Scale


def images(count=5, channels=1):
    torch.manual_seed(0)
    return torch.rand(count, channels, 24, 20)


def in_parts(x, out, *more):
    with GeneratedWriter(out, len(x), *more) as writer:
        for part in x.split(2):
            writer.write(part)
        return writer.close()


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x-idx3-ubyte.gz", "x.tif"])
def test_a_file_is_that_of_save_images(name, tmp_path):
    scale = Scale(gain=255.0, dtype="uint8", format="png")
    assert in_parts(images(), tmp_path / name, scale) == ""
    (tmp_path / "whole").mkdir()
    whole = tmp_path / "whole" / name
    save_images(images(), whole, scale=Scale() if ".np" in name else scale)
    assert (tmp_path / name).read_bytes() == whole.read_bytes()
    assert load_images(tmp_path / name).images.shape == (5, 1, 24, 20)


def test_folders_hold_what_the_numbers_need(tmp_path):
    """PNG for 8 and 16 bits, TIFF for more or for images that were TIFF; named alike."""
    in_parts(images(3), tmp_path / "new")
    assert sorted(f.name for f in (tmp_path / "new").iterdir()) == list(numbered(3))
    kinds = {"uint16": ("png", "png"), "int32": ("png", "tif"), "uint8": ("tif", "tif")}
    for dtype, (form, ending) in kinds.items():
        scale = Scale(gain=float(np.iinfo(dtype).max), dtype=dtype, format=form)
        in_parts(images(2), tmp_path / dtype, scale, ["a.png", "b.tif"])
        files = sorted((tmp_path / dtype).iterdir())
        assert [f.name for f in files] == [f"a.{ending}", f"b.{ending}"]
        assert torch.allclose(load_images(tmp_path / dtype).images, images(2), atol=1 / 255)
    assert tifffile.imread(tmp_path / "int32" / "a.tif").dtype == "int32"


def test_what_is_clipped_is_counted_over_all_batches(tmp_path):
    x = torch.zeros(4, 1, 10, 10)
    x[3, 0, :1, :4] = 2.0  # 4 of 400 numbers
    assert in_parts(x, tmp_path / "y").startswith("1 % of the numbers are outside")
    assert in_parts(x, tmp_path / "y.npy") == ""


def test_refusals_leave_no_partial_file(tmp_path):
    for x, out, part in [
        (images(2, 2), tmp_path / "a", "1 or 3 channels"),
        (images(2) / 0, tmp_path / "a.npy", "not finite"),
        (images(2), tmp_path / "a.png", "can hold one image, not 2"),
        (images(2, 3), tmp_path / "a-idx3-ubyte", "gray images"),
    ]:
        with pytest.raises(unmurk.InputError, match=part):
            in_parts(x, out)
        assert not [f for f in tmp_path.rglob("*") if f.is_file()]


def test_commands_write_in_batches(tmp_path, monkeypatch):
    """`sample` and `corrupt` give the numbers of the whole set for any batch."""
    torch.manual_seed(0)
    Prior.create("tiny", (1, 16, 16)).save(tmp_path / "prior")
    monkeypatch.setattr("unmurk.cli.commands.sample.BATCH", 2)
    monkeypatch.setattr("unmurk.cli.commands.corrupt.BATCH", 2)
    out = tmp_path / "new.npy"
    argv = ["sample", "--prior", tmp_path / "prior", "-n", 5, "--steps", 2, "--out", out]
    assert cli.main([str(a) for a in argv]) == 0
    whole = Prior.load(tmp_path / "prior").sample(5, steps=2)
    assert torch.allclose(torch.from_numpy(np.load(out)), whole, rtol=1e-4, atol=1e-3)
    clean = tmp_path / "clean.npy"
    np.save(clean, images().numpy())
    argv = ["corrupt", clean, "--noise", 0.1, "--out", tmp_path / "y.npy"]
    assert cli.main([str(a) for a in argv]) == 0
    y = unmurk.Problem("identity", 0.1).simulate(images())
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), y.numpy())
