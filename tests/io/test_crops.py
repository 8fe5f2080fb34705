"""Random crops: in register with their masks, drawn by area, the same for ever."""

import math

import pytest
import torch

from unmurk.errors import InputError
from unmurk.io.captures import as_captures, simulated_captures
from unmurk.io.crops import COUNT, Crops, crop_side, croppable, cut_by_default, tiles
from unmurk.noise_estimation import estimate_noise
from unmurk.operators import parse
from unmurk.operators.crops import turn
from unmurk.problem import Problem

SIZES = [(51, 33), (40, 71), (37, 37)]


def images(channels=1, sizes=SIZES):
    g = torch.Generator().manual_seed(0)
    return [torch.rand(channels, *size, generator=g) for size in sizes]


OPERATORS = [
    ("inpaint:random,keep=0.5", 1, 16, SIZES),
    ("inpaint:box,size=9,seed=0", 3, 16, SIZES),
    ("inpaint:freeform,strokes=2,width=3", 5, 16, SIZES),
    ("blur:gaussian,sigma=1.2", 1, 32, SIZES),
    ("sr:average,factor=2", 3, 16, [(52, 34), (40, 72), (38, 38)]),
    ("blur:uniform,size=3|inpaint:random,keep=0.7", 1, 16, SIZES),
]


@pytest.mark.parametrize("spec, channels, side, sizes", OPERATORS)
def test_a_thousand_crops_are_in_register(spec, channels, side, sizes):
    """A of the crop of x is the crop of A x, wherever the crop determines it, for every turn."""
    clean = as_captures(images(channels, sizes))
    clean.numbers = [4, 0, 9]  # masks go by the number in the folder
    problem = Problem(spec, 0.0)
    crops = Crops(simulated_captures(clean, problem, 0), problem.operator, side)
    numbers = list(range(1000 if spec == "inpaint:random,keep=0.5" else 40))
    bound = crops.problem(problem).bind(numbers, (channels, side, side))
    x = torch.stack([_cut(clean, crops.place(n), side) for n in numbers])
    y = crops[torch.tensor(numbers)]
    assert {crops.place(n).turn for n in numbers} == set(range(8))
    assert {crops.place(n).number for n in numbers} == {0, 4, 9}
    torch.testing.assert_close(
        bound.operator.apply_mask(bound.A(x)), bound.operator.apply_mask(y), rtol=0, atol=2e-6
    )
    kept = bound.measurements(y) / y[0].numel()
    assert 0.1 < float(kept.mean()) <= 1


def _cut(captures, crop, side):
    position = captures.numbers.index(crop.number)
    return turn(captures.region(position, crop.top, crop.left, side, side), crop.turn)


def test_places_depend_on_seed_and_number_alone():
    captures = as_captures(images())
    a, b = (Crops(captures, parse("identity"), 16, seed=0) for _ in range(2))
    backward = [b.place(n) for n in range(99, -1, -1)]
    assert [a.place(n) for n in range(100)] == backward[::-1]
    other = Crops(captures, parse("identity"), 16, seed=1)
    assert sum(a.place(n) == other.place(n) for n in range(100)) < 5
    many = torch.tensor([5, COUNT - 1, 70])
    assert torch.equal(a[many], torch.cat([b[many[i : i + 1]] for i in range(3)]))


def test_captures_are_drawn_by_area_and_positions_uniformly():
    """2,000 crops: counts within four standard deviations."""
    captures = as_captures(images())
    crops = Crops(captures, parse("identity"), 30)
    found = [crops.place(n) for n in range(2000)]
    total = sum(map(math.prod, SIZES))
    for number, size in enumerate(SIZES):
        share = math.prod(size) / total
        count = sum(place.number == number for place in found)
        assert abs(count - 2000 * share) < 4 * math.sqrt(2000 * share * (1 - share))
    tops = [place.top for place in found if place.number == 0]  # 0 to 21
    for row in range(22):
        mean = len(tops) / 22
        assert abs(tops.count(row) - mean) < 4 * math.sqrt(mean)
    turns = [place.turn for place in found]
    assert all(abs(turns.count(k) - 250) < 4 * math.sqrt(250 * 7 / 8) for k in range(8))


def test_what_lies_beyond_a_small_image_is_hidden():
    """The hidden pixels of each turned crop are those that no pixel of the image fills."""
    small = [torch.rand(2, 9, 20) + 1, torch.rand(2, 30, 30) + 1]
    crops = Crops(as_captures(small), parse("identity"), 16)
    assert crops.masked and crops.padded
    problem = crops.problem(Problem("identity", 0.1))
    y, numbers = crops[:200], list(range(200))
    masks = problem.bind(numbers, (2, 16, 16)).mask
    assert torch.equal(masks, (y[:, :1] > 0).float())
    padded = [n for n in numbers if crops.place(n).number == 0]
    assert len(padded) > 10 and all(int(masks[n].sum()) == 9 * 16 for n in padded)
    whole = Crops(as_captures(small[1:]), parse("identity"), 16)
    assert whole.problem(Problem("identity", 0.1)).operator.spec == "identity"


def test_pixels_that_are_not_finite_are_hidden_in_every_turn():
    y = [image + 1 for image in images(3)]
    y[0][1, 10:20, 5:9] = torch.nan
    crops = Crops(as_captures(y, nan="mask"), parse("inpaint:random,keep=0.5"), 16)
    problem = crops.problem(Problem("inpaint:random,keep=0.5", 0.1))
    masks = problem.bind(range(300), (3, 16, 16)).mask
    found = crops[:300]
    lost = found[:, 1:2] == 0
    assert lost.any() and not masks[lost].any()
    plain = Crops(as_captures(images(3)), parse("inpaint:random,keep=0.5"), 16)
    others = plain.problem(Problem("inpaint:random,keep=0.5", 0.1)).bind(range(300), (3, 16, 16))
    assert torch.equal(masks[~lost], others.mask[~lost])


def test_sizes_and_operators_that_do_not_fit():
    captures = as_captures(images())
    for spec in ("cs:structured,ratio=0.5", "mri:cartesian,acceleration=2", "phase:fourier"):
        assert not croppable(parse(spec))
        with pytest.raises(InputError, match="does not work on crops, because"):
            Crops(captures, parse(spec), 16)
    with pytest.raises(InputError, match="multiple of 3"):
        Crops(as_captures(torch.rand(1, 1, 30, 30)), parse("sr:average,factor=3"), 16)
    with pytest.raises(InputError, match="augment off"):
        Crops(captures, parse("blur:motion,length=5,angle=30"), 16, augment=True)
    assert not Crops(captures, parse("blur:motion,length=5,angle=30"), 16).augment
    assert Crops(captures, parse("identity"), 16).augment
    off = Crops(captures, parse("identity"), 16, augment=False)
    assert {off.place(n).turn for n in range(50)} == {0}


@pytest.mark.parametrize(
    "sizes, spec, side",
    [
        ([(100, 130)], "identity", 64),
        ([(100, 130), (50, 90)], "identity", 48),
        ([(100, 130), (20, 90)], "identity", 64),
        ([(34, 34)], "sr:average,factor=3", 48),
    ],
)
def test_default_side(sizes, spec, side):
    operator = parse(spec)
    captures = as_captures(images(1, sizes))
    assert crop_side(captures, operator) == side


def test_when_crops_are_the_default():
    assert cut_by_default([(97, 20)]) and not cut_by_default([(96, 96)])
    assert cut_by_default([(40, 40), (41, 40)]) and not cut_by_default([(8, 8), (9, 8)])
    assert cut_by_default([(40, 42)]) and not cut_by_default([(28, 30)])
    assert not cut_by_default([])


def test_noise_is_estimated_from_the_captures_through_tiles():
    """Tiles of mixed sizes give the sigma of the noise to 3 %, with and without a mask."""
    g = torch.Generator().manual_seed(0)
    smooth = [torch.linspace(0.2, 0.8, w).expand(1, h, w) for h, w in [(150, 201), (99, 130)]]
    y = [x + 0.05 * torch.randn(x.shape, generator=g) for x in smooth]
    for spec in ("identity", "inpaint:random,keep=0.95"):
        found, operator = tiles(as_captures(y), parse(spec))
        assert found.shape[0] == 3 * 2 + 2 * 1 and found.shape[-1] == 64
        assert abs(estimate_noise(found, operator).sigma / 0.05 - 1) < 0.03
