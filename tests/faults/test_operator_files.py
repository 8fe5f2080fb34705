"""Mask and kernel files: a file that is not clearly one of these is refused with advice."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from unmurk.errors import InputError
from unmurk.operators import parse

HOLE = np.ones((6, 5), bool)
HOLE[2:4, 1:3] = False
KERNEL = np.outer([1, 2, 1], [1, 4, 1]).astype(float)


def use(form, path, index=(0,), shape=(1, 6, 5)):
    return parse(f"{form},path={path}").bind(index, shape)


def picture(path, pixels, mode=None, **how):
    Image.fromarray(pixels, mode).save(path, **how)
    return path


def array(path, values):
    np.save(path, values, allow_pickle=True)
    return path


def pages(path, stack):
    first, *others = (Image.fromarray(page) for page in stack)
    first.save(path, save_all=True, append_images=others)
    return path


MASKS = {
    "bool": lambda p: array(p / "m.npy", HOLE),
    "0 and 1": lambda p: array(p / "m.npy", HOLE.astype(np.int64)),
    "0 and 1 as uint8": lambda p: array(p / "m.npy", HOLE.astype(np.uint8)),
    "0 and 255": lambda p: array(p / "m.npy", HOLE.astype(np.uint8) * 255),
    "0 and 65535": lambda p: array(p / "m.npy", HOLE.astype(np.uint16) * 65535),
    "0.0 and 1.0": lambda p: array(p / "m.npy", HOLE.astype(np.float32)),
    "grey PNG": lambda p: picture(p / "m.png", HOLE.astype(np.uint8) * 255),
    "black and white PNG": lambda p: picture(p / "m.png", HOLE),
    "RGB PNG of grey": lambda p: picture(
        p / "m.png", np.stack([HOLE.astype(np.uint8) * 255] * 3, 2)
    ),
    "grey BMP": lambda p: picture(p / "m.bmp", HOLE.astype(np.uint8) * 255),
    "a channel of one, last": lambda p: array(p / "m.npy", HOLE[:, :, None]),
    "a channel of one, first": lambda p: array(p / "m.npy", HOLE[None]),
    "batch and channel of one": lambda p: array(p / "m.npy", HOLE[None, None]),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_that_are_plain(name, tmp_path):
    mask = use("inpaint:file", MASKS[name](tmp_path), (0, 7)).mask
    assert torch.equal(mask, torch.from_numpy(HOLE).float()[None, None])


def test_a_mask_for_every_image_in_pages(tmp_path):
    stack = np.stack([HOLE, HOLE[::-1], HOLE[:, ::-1]]).astype(np.uint8) * 255
    for path in (pages(tmp_path / "m.tif", stack), array(tmp_path / "m.npy", stack[:, None])):
        mask = use("inpaint:file", path, (2, 0)).mask
        assert torch.equal(mask, torch.from_numpy(stack[[2, 0]] // 255).float()[:, None])
        with pytest.raises(InputError, match="3 arrays, so there is none for image 3"):
            use("inpaint:file", path, (3,))


def grey_jpeg(path):
    soft = np.linspace(0, 255, 30).reshape(6, 5).astype(np.uint8)
    return picture(path / "m.jpg", soft)


def hole_in_alpha(path):
    pixels = np.full((6, 5, 4), 255, np.uint8)
    pixels[..., 3] *= HOLE
    return picture(path / "m.png", pixels)


BAD_MASKS = {
    "-1 and 1": (lambda p: array(p / "m.npy", np.where(HOLE, 1, -1)), "holds -1 beside 0"),
    "-1.0 and 1.0": (lambda p: array(p / "m.npy", np.where(HOLE, 1.0, -1.0)), "holds -1.0"),
    "0 and 7": (lambda p: array(p / "m.npy", HOLE * 7), "holds 7 beside 0"),
    "0 and 0.5": (lambda p: array(p / "m.npy", HOLE * 0.5), "holds 0.5 beside 0"),
    "0, 1 and 255": (
        lambda p: array(p / "m.npy", np.where(HOLE, 255, np.eye(6, 5)).astype(np.uint8)),
        "holds 1 ",
    ),
    "JPEG of greys": (grey_jpeg, "only black (hidden) and white (measured)"),
    "alpha": (hole_in_alpha, "m.png"),
    "colours": (
        lambda p: picture(p / "m.png", np.eye(30, 3).reshape(6, 5, 3).astype(np.uint8) * 255),
        "color picture",
    ),
    "all seen": (lambda p: array(p / "m.npy", np.ones((6, 5))), "hides no pixel"),
    "all seen, white": (
        lambda p: picture(p / "m.png", np.full((6, 5), 255, np.uint8)),
        "hides no pixel",
    ),
    "all hidden": (lambda p: array(p / "m.npy", np.zeros((6, 5))), "hides every pixel"),
    "one of three all hidden": (
        lambda p: array(p / "m.npy", HOLE * np.array([1, 0, 1])[:, None, None]),
        "number 1 hides every",
    ),
    "not finite": (lambda p: array(p / "m.npy", np.where(HOLE, 1, np.nan)), "m.npy"),
    "complex": (lambda p: array(p / "m.npy", HOLE + 0j), "complex"),
    "text": (lambda p: array(p / "m.npy", np.array(["a", "b"])), "m.npy"),
    "objects": (lambda p: array(p / "m.npy", np.array([{}], object)), "m.npy"),
    "another size": (lambda p: array(p / "m.npy", HOLE.T), "5x6 but the image is 6x5"),
    "another size, channels last": (
        lambda p: array(p / "m.npy", np.dstack([HOLE] * 3)),
        "5x3 but the image is 6x5",
    ),
    "five axes": (
        lambda p: array(p / "m.npy", np.dstack([HOLE] * 4).reshape(2, 3, 5, 2, 2)),
        "shape (2, 3, 5, 2, 2)",
    ),
    "empty": (lambda p: array(p / "m.npy", np.zeros((0, 5))), "m.npy"),
    "a line": (lambda p: array(p / "m.npy", np.eye(1, 30)[0]), "shape (30,)"),
    "a folder": (lambda p: p, "there is no file"),
    "nothing there": (lambda p: p / "none.png", "there is no file"),
    "a name of 300 letters": (lambda p: p / ("x" * 300 + ".png"), "there is no file"),
}


def refused(form, path, part):
    with pytest.raises(InputError) as error:
        use(form, path)
    text = str(error.value)
    assert part in text and "\n" not in text and text.startswith(form)


@pytest.mark.parametrize("name", BAD_MASKS)
def test_what_is_no_mask_is_refused(name, tmp_path):
    make, part = BAD_MASKS[name]
    refused("inpaint:file", make(tmp_path), part)


def test_a_pipe_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "m.png")
    refused("inpaint:file", tmp_path / "m.png", "there is no file")


KERNELS = {
    "as it is": lambda p: array(p / "k.npy", KERNEL),
    "9x9x1": lambda p: array(p / "k.npy", KERNEL[:, :, None]),
    "1x9x9": lambda p: array(p / "k.npy", KERNEL[None]),
    "1x1x9x9": lambda p: array(p / "k.npy", KERNEL[None, None]),
    "whole numbers": lambda p: array(p / "k.npy", KERNEL.astype(np.int16)),
    "huge numbers": lambda p: array(p / "k.npy", KERNEL / 16 * 1e308),
    "tiny numbers": lambda p: array(p / "k.npy", KERNEL * 1e-300),
    "a picture": lambda p: picture(p / "k.png", KERNEL.astype(np.uint8)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_one_kernel_divided_by_its_sum(name, tmp_path):
    kernel = use("blur:file", KERNELS[name](tmp_path)).kernel
    assert kernel.shape == (1, 1, 3, 3)
    assert torch.allclose(kernel[0, 0].double(), torch.from_numpy(KERNEL / 24), atol=1e-7)


def test_the_centre_of_a_kernel_is_its_middle_pixel(tmp_path):
    """A kernel with one entry in the middle is the identity; one beside it shifts the image."""
    x = torch.rand(1, 1, 6, 5, generator=torch.Generator().manual_seed(0))
    for at, shift in {(1, 1): (0, 0), (0, 1): (-1, 0), (1, 2): (0, 1)}.items():
        kernel = np.zeros((3, 3))
        kernel[at] = 5
        op = parse(f"blur:file,path={array(tmp_path / 'k.npy', kernel)},pad=circular")
        assert torch.allclose(op.A(x), x.roll(shift, (-2, -1)), atol=1e-6)


BAD_KERNELS = {
    "even": (np.ones((4, 4)), "an even side has no pixel in the middle"),
    "even in one axis": (np.ones((3, 2)), "3x2"),
    "larger than the image": (np.ones((7, 5)), "7x5 but the image is only 6x5"),
    "NaN": (np.where(np.eye(3), np.nan, 1), "k.npy"),
    "infinite": (np.where(np.eye(3), np.inf, 1), "k.npy"),
    "zero": (np.zeros((3, 3)), "positive sum"),
    "negative": (-np.ones((3, 3)), "positive sum"),
    "a difference": (np.array([[1.0, 0.0, -1.0]]), "positive sum"),
    "a difference, but for rounding": (np.array([[1.0, 1e-9, -1.0]]), "positive sum"),
    "colours": (np.ones((5, 5, 3)), "color picture"),
    "four axes": (np.ones((3, 2, 3, 3)), "shape (3, 2, 3, 3)"),
    "text": (np.array([["a"]]), "k.npy"),
}


@pytest.mark.parametrize("name", BAD_KERNELS)
def test_what_is_no_kernel_is_refused(name, tmp_path):
    values, part = BAD_KERNELS[name]
    refused("blur:file", array(tmp_path / "k.npy", values), part)


def test_a_box_never_hides_everything():
    for form in (
        "inpaint:box,size=6x5",
        "inpaint:box,size=6x5,seed=1",
        "inpaint:box,size=6x5,top=0,left=0",
    ):
        with pytest.raises(InputError, match="6x5 hides the whole image"):
            parse(form).bind([0], (1, 6, 5))
    assert parse("inpaint:box,size=6x4").bind([0], (1, 6, 5)).mask.sum() == 6
