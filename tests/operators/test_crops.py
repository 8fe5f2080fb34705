"""Operators on crops against the same operators on the images that the crops are cut out of."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmurk.errors import InputError
from unmurk.missing import Missing
from unmurk.operators import Compose, Matrix, Weighted, as_operator, parse
from unmurk.operators.base import conjugate_gradient
from unmurk.operators.crops import Crop, PackedMasks, cut, turn, unturn
from unmurk.problem import Problem

MASKS = [
    "inpaint:random,keep=0.4,seed=3",
    "inpaint:box,size=9x5,seed=1",
    "inpaint:box,size=20",
    "inpaint:freeform,strokes=2,width=3",
]
LINEAR = [
    "identity",
    *MASKS,
    "blur:gaussian,sigma=1",
    "blur:gaussian,sigma=0.01,size=5",
    "blur:uniform,size=3x7",
    "blur:anisotropic,sigma=1.5,ratio=0.3,angle=30",
    "blur:motion,length=5,angle=-30",
    "blur:gaussian,sigma=1,pad=circular",
    "sr:average,factor=4",
    "sr:bicubic,factor=1",
    "sr:bicubic,factor=3",
    "colour:grey",
    "blur:gaussian,sigma=1|sr:average,factor=2",
    "inpaint:random,keep=0.5,seed=1|blur:uniform,size=3",
    "sr:bicubic,factor=2|inpaint:random,keep=0.5,seed=1",
    "colour:grey|sr:average,factor=2|inpaint:random,keep=0.9",
    "blur:uniform,size=3|blur:uniform,size=3",
]
NONLINEAR = [
    "hdr:clip,factor=2",
    "quantise,bits=2",
    "jpeg,quality=10",
    "jpeg,quality=30,chroma=4:4:4",
    "blur:nonlinear,length=4,seed=0",
    "blur:gaussian,sigma=1|jpeg,quality=50",
]
GLOBAL = ["cs:structured,ratio=0.25", "mri:cartesian,acceleration=4", "ct:parallel,angles=8"]
SIDE = 48


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def cut_all(images, crops, side, scale=1):
    """The crops of images (N, C, H, W), turned."""
    return torch.stack(
        [
            turn(cut(images[i], (c.top // scale, c.left // scale), (side // scale,) * 2), c.turn)
            for i, c in enumerate(crops)
        ]
    )


def some_crops(op, count, shape, seed, side=SIDE):
    """Crops anywhere on the grid, those in the first and last corners among them."""
    rng = np.random.default_rng(seed)
    rooms = [(n - side) // op.crop_grid for n in shape[-2:]]
    crops = []
    for k in range(count):
        steps = [0, 0] if k == 0 else rooms if k == 1 else [rng.integers(r + 1) for r in rooms]
        first = [int(s) * op.crop_grid for s in steps]
        k = int(rng.integers(8)) if op.turnable else 0
        crops.append(Crop(int(rng.integers(1000)), *first, *shape[-2:], k))
    return crops


# -- the crop of the measurement is the measurement of the crop -----------------------------------


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(LINEAR + NONLINEAR),
    more=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    seed=st.integers(0, 10_000),
    color=st.booleans(),
)
def test_measurements_of_crops_are_crops_of_measurements(form, more, seed, color):
    """Wherever the crop determines y; and what it does not determine is hidden."""
    op = parse(form)
    if "colour" in form:
        color = True
    shape = (3 if color else 1, *(96 + 48 * m for m in more))
    crops = some_crops(op, 3, shape, seed)
    numbers = [c.number for c in crops]
    x = draw(3, *shape, seed=seed)
    y = op.bind(numbers, shape).A(x)
    scale = shape[-1] // y.shape[-1]
    wanted = cut_all(y, crops, SIDE, scale)
    for channels in (shape[0], None):  # without the number of channels, JPEG hides more
        cropped = op.on_crops(crops, SIDE, channels=channels)
        found = cropped.A(cut_all(x, crops, SIDE))
        assert found.shape == wanted.shape
        assert cropped.apply_mask(found - wanted).abs().max() < 2e-6
        alone = cropped.index_select([2]).A(cut_all(x, crops, SIDE)[2:])
        assert (alone - found[2:]).abs().max() < 1e-6
    other = draw(3, *shape, seed=seed + 1)  # pixels outside of the crops are other ones
    for image, crop in zip(other, crops, strict=True):
        inside = image[:, crop.top : crop.top + SIDE, crop.left : crop.left + SIDE]
        inside.copy_(x[crops.index(crop)][:, crop.top : crop.top + SIDE, crop.left :][..., :SIDE])
    changed = cut_all(op.bind(numbers, shape).A(other), crops, SIDE, scale)
    assert cropped.apply_mask(changed - wanted).abs().max() < 2e-6


@pytest.mark.parametrize(
    "form, left_out",
    [
        ("identity", 0),
        ("sr:average,factor=4", 0),
        ("sr:bicubic,factor=3", 2),  # of 16 small pixels: the kernel spans 2 f to both sides
        ("blur:uniform,size=7", 3),
        ("blur:gaussian,sigma=1", 3),
        ("blur:gaussian,sigma=0.01,size=5", 0),  # its weights off the center are 0
        ("blur:uniform,size=3|sr:average,factor=2", 1),
        ("jpeg,quality=50", 0),
        ("blur:nonlinear,length=4,seed=0", 3),
    ],
)
def test_margin_is_as_wide_as_the_filter_and_only_inside(form, left_out):
    """In the middle the margin is hidden on all sides; at the border of the image it is not."""
    op = parse(form)
    size = 3 * SIDE
    middle, corner = Crop(0, SIDE, SIDE, size, size), Crop(0, 0, 2 * SIDE, size, size)
    y = torch.ones(2, 1, *op.y_shape((1, SIDE, SIDE))[1:])
    n = y.shape[-1]
    masks = op.on_crops([middle, corner], SIDE, channels=1).apply_mask(y)[:, 0]
    inner = torch.zeros(n, n)
    inner[left_out : n - left_out, left_out : n - left_out] = 1
    assert torch.equal(masks[0], inner)
    outer = torch.zeros(n, n)  # the upper right corner
    outer[: n - left_out, left_out:] = 1
    assert torch.equal(masks[1], outer)
    count = op.on_crops([middle, corner], SIDE, channels=1).count(y)
    assert count.tolist() == [(n - 2 * left_out) ** 2, (n - left_out) ** 2]


def test_color_jpeg_loses_the_pixel_that_interpolation_reaches():
    middle = Crop(0, 48, 48, 144, 144)
    for form, channels, lost in [
        ("jpeg,quality=50", 3, 1),
        ("jpeg,quality=50", None, 1),
        ("jpeg,quality=50,chroma=4:4:4", 3, 0),
    ]:
        op = parse(form).on_crops([middle], 48, channels=channels)
        assert op.count(torch.ones(1, 1, 48, 48)).item() == (48 - 2 * lost) ** 2


def test_jpeg_hides_blocks_that_padding_enters():
    op = parse("jpeg,quality=50")
    mask = op.on_crops([Crop(0, 0, 0, 20, 40)], 48, channels=1).mask[0, 0]
    wanted = torch.zeros(48, 48)
    wanted[:16, :40] = 1  # rows 16 to 19 share their blocks with padding
    assert torch.equal(mask, wanted)


# -- loss and gradient ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", [f for f in LINEAR + NONLINEAR if "colour" not in f])
def test_loss_and_gradient_are_those_of_the_same_pixels_of_the_image(form):
    """The misfit of a crop, and its gradient, against the misfit of the image restricted to the
    measurements that the crop determines. Both gradients vanish outside of the crop."""
    op = parse(form)
    shape = (1, 96, 144)
    crops = some_crops(op, 4, shape, 5)
    numbers = [c.number for c in crops]
    x = draw(4, *shape).requires_grad_()
    y = draw(4, *op.y_shape(shape), seed=1)
    problem = Problem(op, 0.1).bind(numbers, shape)
    scale = shape[-1] // y.shape[-1]
    cropped = op.on_crops(crops, SIDE, channels=1)
    small = Problem(cropped, 0.1)
    residual = small.residual(cut_all(x, crops, SIDE), cut_all(y, crops, SIDE, scale))
    loss = residual.square().sum()
    measured = cropped.apply_mask(torch.ones_like(residual))
    full = problem.residual(x, y)
    both = (measured * cut_all(full, crops, SIDE, scale)).square().sum()
    assert loss.item() == pytest.approx(both.item(), rel=1e-5)
    one, other = (torch.autograd.grad(value, x, retain_graph=True)[0] for value in (loss, both))
    assert (one - other).abs().max() < 1e-5 * other.abs().max()
    outside = torch.ones(4, 1, *shape[-2:])
    for i, c in enumerate(crops):
        outside[i, :, c.top : c.top + SIDE, c.left : c.left + SIDE] = 0
    assert (outside * other).abs().max() < 1e-6 * other.abs().max()


@pytest.mark.parametrize("form", LINEAR)
def test_adjoint_pseudo_inverse_and_prox_on_crops(form):
    """The adjoint by the inner product, A^+ and the prox by dense algebra, one matrix a crop."""
    side = 12
    op = parse(form)
    shape = (3 if "colour" in form else 1, 36, 36)
    crops = some_crops(op, 3, shape, 7, side)
    cropped = op.on_crops(crops, side, channels=shape[0])
    x = draw(3, shape[0], side, side, seed=1).double() - 0.5
    y = draw(3, *op.y_shape((shape[0], side, side)), seed=2).double() - 0.5
    left = (cropped.A(x) * y).flatten(1).sum(1)
    right = (x * cropped.A_adjoint(y)).flatten(1).sum(1)
    assert torch.allclose(left, right, atol=1e-12)
    matrices = cropped.matrix(x.shape[1:], x).expand(3, -1, -1)
    gamma = torch.tensor([0.5, 3.0, 40.0], dtype=torch.float64)
    z = x + 0.1
    found = cropped.prox_l2(z, y, gamma)
    for i, m in enumerate(matrices):
        normal = torch.eye(m.shape[1]).double() + gamma[i] * m.T @ m
        wanted = torch.linalg.solve(normal, z[i].flatten() + gamma[i] * m.T @ y[i].flatten())
        assert (found[i].flatten() - wanted).abs().max() < 2e-4
        if cropped.orthogonal_rows:
            inverse = torch.linalg.pinv(m) @ y[i].flatten()
            assert (cropped.A_dagger(y)[i].flatten() - inverse).abs().max() < 1e-9
    alone = cropped.index_select([1])
    same = alone.prox_l2(z[1:2], y[1:2], gamma[1:2])
    assert torch.allclose(same, found[1:2], rtol=0, atol=1e-12)


def test_prox_of_a_masked_blur_is_preconditioned():
    """At weight 10,000 the map that the blur knows divides the residual by ten at least."""
    op = parse("blur:gaussian,sigma=1.5").on_crops([Crop(0, 64, 64, 192, 192)], 64, channels=1)
    z = draw(1, 1, 64, 64).double()
    y, gamma = op.A(draw(1, 1, 64, 64, seed=1).double()), 1e4
    right = gamma * op.A_adjoint(y - op.A(z))

    def residual(x):
        step = x - z
        return (step + gamma * op.A_adjoint(op.A(step)) - right).norm() / right.norm()

    plain = conjugate_gradient(lambda x: x + gamma * op.A_adjoint(op.A(x)), right)
    assert residual(op.prox_l2(z, y, gamma)) < 0.1 * residual(z + plain)


# -- masks of the images --------------------------------------------------------------------------


def test_masks_of_a_thousand_crops_stay_in_register():
    """Each crop of a mask is the crop of the mask of the whole image, whatever its turn."""
    rng = np.random.default_rng(0)
    sizes = [(40, 57), (33, 64), (50, 50), (20, 45)]  # the last one is lower than the crop
    done = 0
    for form in [*MASKS[:2], MASKS[3], "inpaint:random,keep=0.7"]:
        op = parse(form)
        for _ in range(10):
            crops, wanted = [], []
            for _ in range(25):
                number = int(rng.integers(12))
                height, width = sizes[number % 4]
                first = [int(rng.integers(max(n - 32, 0) + 1)) for n in (height, width)]
                if height < 32:
                    first[0] = -int(rng.integers(32 - height + 1))
                crop = Crop(number, *first, height, width, int(rng.integers(8)))
                mask = op.bind([number], (1, height, width)).mask[0]
                crops.append(crop)
                wanted.append(turn(cut(mask, (crop.top, crop.left), (32, 32)), crop.turn))
                done += 1
            assert torch.equal(op.on_crops(crops, 32).mask, torch.stack(wanted))
    assert done == 1000


def test_masks_from_a_file(tmp_path):
    masks = (np.random.default_rng(1).random((3, 40, 50)) < 0.5).astype(np.uint8)
    np.save(tmp_path / "masks.npy", masks)
    op = parse(f"inpaint:file,path={tmp_path / 'masks.npy'}")
    crops = [Crop(2, 5, 7, 40, 50, 3), Crop(0, 8, 18, 40, 50, 6)]
    wanted = [turn(torch.from_numpy(masks[2, 5:37, 7:39]), 3)]
    wanted.append(turn(torch.from_numpy(masks[0, 8:40, 18:50]), 6))
    assert torch.equal(op.on_crops(crops, 32).mask[:, 0], torch.stack(wanted).float())
    np.save(tmp_path / "masks.npy", 1 - masks)  # a changed file is read again
    assert torch.equal(op.on_crops(crops, 32).mask[:, 0], 1 - torch.stack(wanted).float())


def test_missing_pixels_are_cropped_with_their_image():
    """Alone, and on top of another mask."""
    pixels = {3: torch.tensor([0, 5 * 40 + 6, 39 * 40 + 39]), 4: torch.arange(40)}
    for base in (None, parse("inpaint:random,keep=0.5")):
        op = Missing(pixels, base)
        crops = [Crop(3, 2, 4, 40, 40, 5), Crop(4, 0, 8, 40, 40), Crop(5, 8, 8, 40, 40)]
        full = op.bind([3, 4, 5], (1, 40, 40)).mask
        assert torch.equal(op.on_crops(crops, 32).mask, cut_all(full, crops, 32))


def test_kernels_from_a_file_belong_to_the_images(tmp_path):
    """Each image has its own kernel; the margin is that of the file's arrays."""
    kernels = np.random.default_rng(1).random((4, 3, 5))
    np.save(tmp_path / "kernels.npy", kernels)
    op = parse(f"blur:file,path={tmp_path / 'kernels.npy'}")
    assert not op.turnable
    crops = [Crop(3, 8, 8, 40, 40), Crop(1, 4, 2, 40, 40)]
    x = draw(2, 1, 40, 40)
    cropped = op.on_crops(crops, 24, channels=1)
    wanted = cut_all(op.bind([3, 1], (1, 40, 40)).A(x), crops, 24)
    found = cropped.A(cut_all(x, crops, 24))
    assert cropped.apply_mask(found - wanted).abs().max() < 1e-6
    assert cropped.count(wanted).tolist() == [22 * 20] * 2
    np.save(tmp_path / "even.npy", np.outer([1, 2, 1], [1, 2, 1]))
    assert parse(f"blur:file,path={tmp_path / 'even.npy'}").turnable


def test_weights_belong_to_the_images():
    """Loss of a crop with weights; they are turned too, and compose with blurs."""
    weights = draw(5, 1, 40, 40, seed=3) + 0.5
    for inner in (parse("identity"), parse("blur:gaussian,sigma=1")):
        op = Weighted(inner, weights)
        crops = [Crop(4, 3, 8, 40, 40, 6), Crop(2, 16, 0, 40, 40, 1)]
        x = draw(2, 1, 40, 40)
        full = weights[[4, 2]] * inner.A(x)
        cropped = op.on_crops(crops, 24, channels=1)
        error = cropped.A(cut_all(x, crops, 24)) - cut_all(full, crops, 24)
        assert cropped.apply_mask(error).abs().max() < 1e-6
        chain = Compose(op, parse("sr:average,factor=2")).on_crops([crops[1]], 24, channels=1)
        half = torch.nn.functional.avg_pool2d(full[1:], 2)
        error = chain.A(cut_all(x[1:], crops[1:], 24)) - cut_all(half, crops[1:], 24, 2)
        assert chain.apply_mask(error).abs().max() < 1e-6
    with pytest.raises(InputError, match="crops of image 7"):
        op.on_crops([Crop(7, 0, 0, 40, 40)], 24)
    with pytest.raises(InputError, match="weights of 40x40"):
        op.on_crops([Crop(1, 0, 0, 48, 40)], 24)


# -- padding and hidden pixels --------------------------------------------------------------------


def test_padding_and_hidden_pixels_do_not_count():
    hidden = torch.zeros(2, 1, 16, 16)
    hidden[0, 0, 2, 3] = 1
    crops = [Crop(0, 0, 0, 10, 30, 0), Crop(1, -3, 0, 10, 40, 1)]
    op = parse("identity").on_crops(crops, 16, hidden)
    wanted = torch.zeros(2, 1, 16, 16)
    wanted[0, 0, :10], wanted[1, 0, 3:13] = 1, 1
    wanted[1] = turn(wanted[1], 1)
    wanted[0, 0, 2, 3] = 0
    assert torch.equal(op.mask, wanted)
    y = torch.full((2, 1, 16, 16), math.nan)
    assert op.apply_mask(torch.where(wanted > 0, 1.0, y)).sum() == 159 + 160
    assert parse("identity").on_crops([Crop(0, 4, 4, 30, 30)], 16).spec == "identity"
    blur = parse("blur:uniform,size=3").on_crops([Crop(0, 0, 0, 10, 30)], 16, channels=1)
    assert torch.equal(blur.mask[0, 0].sum(1), torch.tensor([15.0] * 9 + [0.0] * 7))
    with pytest.raises(InputError, match="one mask for each crop"):
        parse("identity").on_crops(crops, 16, hidden[:1])


@pytest.mark.parametrize("k", range(8))
def test_turns(k):
    """The eight orientations are different, and `unturn` inverts each."""
    x = torch.arange(6).reshape(2, 3)
    assert torch.equal(unturn(turn(x, k), k), x)
    assert turn(x, k).shape == ((2, 3) if k % 2 == 0 else (3, 2))
    others = [turn(torch.arange(9).reshape(3, 3), j).flatten().tolist() for j in range(8)]
    assert len({tuple(o) for o in others}) == 8
    wanted = x.flip(1) if k >= 4 else x
    for _ in range(k % 4):  # one quarter turn counter-clockwise: the last column comes first
        wanted = wanted.T.flip(0)
    assert torch.equal(turn(x, k), wanted)


@pytest.mark.parametrize("form", LINEAR + NONLINEAR)
def test_turnable_operators_commute_with_turns(form):
    """And those that are not turnable do not."""
    op = parse(form)
    if isinstance(op, Compose) or "inpaint" in form:
        return  # masks are turned along: see the tests of register
    channels = 3 if "colour" in form else 1
    x = draw(1, channels, 48, 48)
    differ = [(op.A(turn(x, k)) - turn(op.A(x), k)).abs().max().item() for k in range(8)]
    assert (max(differ) < 1e-5) == op.turnable


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [*GLOBAL, "phase:fourier,oversample=2"])
def test_global_operators_are_refused_in_one_line(form):
    crops = [Crop(0, 0, 0, 64, 64)]
    for op in (parse(form), Compose(parse("inpaint:box,size=8"), parse(form))):
        with pytest.raises(InputError, match=r"does not work on crops, because .*--crop 0") as e:
            op.on_crops(crops, 32)
        assert "\n" not in str(e.value)
        assert not op.turnable


def test_matrices_and_functions_are_refused():
    crops = [Crop(0, 0, 0, 4, 4)]
    for op in (Matrix(torch.eye(16), (1, 4, 4)), as_operator(lambda x: 2 * x)):
        with pytest.raises(InputError, match="because it"):
            op.on_crops(crops, 2)


def test_crops_that_do_not_fit_are_refused():
    large = Crop(0, 0, 0, 64, 64)
    for op, crops, side, part in [
        ("blur:uniform,size=33", [large], 32, "larger crops"),
        ("sr:bicubic,factor=16", [large], 32, "larger crops"),
        ("sr:average,factor=4", [Crop(0, 2, 0, 64, 64)], 32, "multiples of 4"),
        ("sr:average,factor=4", [large], 30, "does not divide"),
        ("sr:average,factor=4", [Crop(0, 0, 0, 63, 64)], 32, "does not divide"),
        ("jpeg,quality=5", [Crop(0, 8, 0, 64, 64)], 32, "multiples of 16"),
        ("blur:motion,length=5", [Crop(0, 0, 0, 64, 64, 1)], 32, "does not commute"),
        ("identity", [Crop(0, 0, 0, 64, 64, 1)], (16, 32), "turned by 90 degrees"),
        ("identity", [], 32, "0 crops"),
        ("inpaint:box,size=70", [large], 32, "smaller size"),
    ]:
        with pytest.raises(InputError, match=part):
            parse(op).on_crops(crops, side)
    with pytest.raises(InputError, match="bound to images"):
        parse("inpaint:random,keep=0.5").bind([0], (1, 64, 64)).on_crops([large], 32)
    for bad in ((-1, 0, 0, 4, 4), (0, 4, 0, 4, 4), (0, 0, 0, 4, 4, 8)):
        with pytest.raises(InputError, match="a crop"):
            Crop(*bad)


def test_grid_of_chains():
    """Positions fit every member: 2 for the average, times 16 for JPEG of the small image."""
    assert parse("sr:average,factor=2|jpeg,quality=5").crop_grid == 32
    assert parse("jpeg,quality=5|sr:average,factor=3").crop_grid == 48
    assert parse("blur:uniform,size=3|sr:bicubic,factor=4").crop_grid == 4
    assert Weighted(parse("sr:average,factor=2"), torch.ones(1, 1, 4, 4)).crop_grid == 2


# -- masks that are kept --------------------------------------------------------------------------


def test_packed_masks_stay_below_their_limit():
    """The least recently used go first, and each is made once while it is kept."""
    made = []

    def make(key):
        made.append(key)
        return torch.full((1, 16, 16), float(key % 2))

    store = PackedMasks(limit=100)  # three masks of 32 bytes
    for key in (1, 2, 3, 1, 4, 1, 2):
        part = store.cut(key, lambda key=key: make(key), (16, 16), (-2, 12), (5, 6))
        wanted = torch.zeros(5, 6)
        wanted[2:, :4] = key % 2
        assert torch.equal(part[0], wanted)
    assert made == [1, 2, 3, 4, 2]
