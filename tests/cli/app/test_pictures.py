"""What the brush paints, and which part of an image is shown."""

import numpy as np
import pytest
import torch

from unmurk.cli.app.pictures import busiest, preview, write_mask
from unmurk.errors import InputError
from unmurk.operators import parse


def layer(height, width, *pixels):
    found = np.zeros((height, width, 4), np.uint8)
    for row, column in pixels:
        found[row, column] = (213, 94, 0, 255)
    return found


def test_the_mask_hides_what_was_painted(tmp_path):
    """It is read by the operator of the command line: an independent reading."""
    layers = [layer(6, 4, (0, 1), (5, 3)), layer(6, 4, (2, 2), (0, 1))]
    assert write_mask(layers, (6, 4), tmp_path / "mask.png") == 3 / 24
    mask = parse(f"inpaint:file,path={tmp_path / 'mask.png'}").bind([7], (1, 6, 4)).mask
    hidden = {(int(r), int(c)) for r, c in (mask[0, 0] == 0).nonzero()}
    assert hidden == {(0, 1), (2, 2), (5, 3)}


@pytest.mark.parametrize(
    "layers, part",
    [
        ([], "nothing is painted"),
        ([layer(6, 4)], "nothing is painted"),
        ([np.full((6, 4, 4), 255, np.uint8)], "all is painted"),
        ([layer(4, 6, (0, 0))], "4x6 pixels and the image 6x4"),
        ([np.zeros((6, 4), np.uint8)], "the image 6x4"),
    ],
)
def test_no_mask_of_nothing_or_of_another_size(tmp_path, layers, part):
    with pytest.raises(InputError, match=part):
        write_mask(layers, (6, 4), tmp_path / "mask.png")
    assert not list(tmp_path.iterdir())


def test_preview_stretches_to_eight_bits():
    ramp = torch.linspace(100, 300, 201).view(1, 1, 201)
    shown = preview(ramp)
    assert shown.shape == (1, 201, 3) and shown.dtype == np.uint8
    assert shown[0, 0].tolist() == [0, 0, 0] and shown[0, -1].tolist() == [255, 255, 255]
    assert abs(int(shown[0, 100, 0]) - 127.5) <= 1
    two = torch.stack([torch.zeros(2, 2), torch.ones(2, 2)])
    assert len(np.unique(preview(two))) == 1  # two channels: their mean
    assert preview(torch.full((1, 2, 2), torch.nan)).max() == 0


def test_the_busiest_part_holds_the_detail():
    image = torch.zeros(1, 100, 80)
    image[0, 70:90, 10:30:2] = 1
    row, column = busiest(image, 40)
    assert row <= 70 and row + 40 >= 90 and column <= 10 and column + 40 >= 30
    assert busiest(torch.zeros(1, 100, 80), 40) == (0, 0)
    assert busiest(image, 500) == (0, 0)
