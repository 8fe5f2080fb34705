"""Nonlinear operators, tested against their definitions, brute force, finite differences and
Pillow's JPEG."""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unmurk.errors import InputError
from unmurk.operators import Compose, as_operator, parse
from unmurk.operators.jpeg import CHROMINANCE, LUMINANCE, table
from unmurk.problem import Problem

SMOOTH = [
    "phase:fourier,oversample=2",
    "phase:fourier,oversample=4",
    "blur:nonlinear,length=3,seed=1",
    "blur:gaussian,sigma=1|phase:fourier,oversample=0",
    "blur:nonlinear,length=2,seed=0|sr:average,factor=2",
]
ROUGH = [
    "hdr:clip,factor=2",
    "hdr:clip,factor=1",
    "quantise,bits=2",
    "jpeg,quality=10,chroma=4:2:0",
    "jpeg,quality=60,chroma=4:4:4",
    "sr:average,factor=2|jpeg,quality=30,chroma=4:2:0",
    "hdr:clip,factor=3|inpaint:random,keep=0.6,seed=1",
    "hdr:clip,factor=2.5|quantise,bits=3",
]
FORMS = SMOOTH + ROUGH


def draw(*shape, seed=0):
    """Images around the range [0, 1] and beyond it."""
    return 0.5 + 0.4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- all of them ----------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    half=st.tuples(st.integers(2, 8), st.integers(2, 8)),
    channels=st.sampled_from([1, 3]),
    index=st.lists(st.integers(0, 1000), min_size=1, max_size=4),
)
def test_every_image_for_itself_and_shapes(form, half, channels, index):
    shape = (channels, 2 * half[0], 2 * half[1])
    op, x = parse(form).bind(index, shape), draw(len(index), *shape)
    y = op.A(x)
    assert y.shape[1:] == op.y_shape(shape) == op.y_shape(x.shape)
    assert op.x_shape(y.shape) == shape == op.x_shape(y.shape[1:])
    for row in range(len(index)):
        alone = parse(form).bind([index[row]], shape).A(x[row : row + 1])
        torch.testing.assert_close(alone, y[row : row + 1], rtol=0, atol=2e-6)
        torch.testing.assert_close(
            op.index_select([row]).A(x[row : row + 1]), alone, rtol=0, atol=2e-6
        )
    wide = op.A(x.double())
    assert wide.dtype == torch.float64
    # a few ties are rounded differently; all other values agree
    assert ((wide - y).abs() > 1e-5).double().mean() < 0.2


@pytest.mark.parametrize("form", FORMS)
def test_text_form_and_what_is_missing(form):
    op, shape = parse(form), (3, 8, 6)
    assert parse(op.spec) == op and hash(parse(form)) == hash(op)
    assert op.spec == form or "blur:gaussian" in form or "inpaint" in form
    assert Problem.from_dict(Problem(op, 0.1).to_dict()) == Problem(op, 0.1)
    assert not op.linear and not Problem(op).linear
    op = op.bind([0], shape).to("cpu")
    x = draw(1, *shape)
    y = op.A(x)
    maps = [op.A_adjoint, op.A_dagger] + [lambda y: op.prox_l2(x, y, 1.0)] * (not op.proximal)
    for use in maps:
        with pytest.raises(InputError, match="is not linear, so it has no") as error:
            use(y)
        assert "\n" not in str(error.value)


@settings(max_examples=40, deadline=None)
@given(
    form=st.one_of(
        st.builds("phase:fourier,oversample={}".format, st.floats(0, 9)),
        st.builds("hdr:clip,factor={}".format, st.floats(1, 9)),
        st.builds(
            "blur:nonlinear,length={},seed={}".format, st.floats(1, 12), st.integers(0, 2**31)
        ),
        st.builds("quantise,bits={}".format, st.integers(1, 12)),
        st.builds(
            "jpeg,quality={},chroma={}".format,
            st.integers(1, 100),
            st.sampled_from(["4:2:0", "4:4:4"]),
        ),
    ),
    shape=st.tuples(st.sampled_from([1, 3]), st.integers(1, 20), st.integers(1, 20)),
)
def test_any_options_and_any_size(form, shape):
    op, x = parse(form), draw(1, *shape).clamp(0, 1)
    assert parse(op.spec) == op
    y = op.A(x)
    assert y.isfinite().all() and op.x_shape(y.shape) == shape
    if not form.startswith("phase"):
        assert y.min() >= -1e-6 and y.max() <= 1 + 1e-6


@pytest.mark.parametrize("form", [*SMOOTH, "hdr:clip,factor=2"])
@pytest.mark.parametrize("shape", [(1, 4, 6), (3, 4, 2)])
def test_gradients_agree_with_finite_differences(form, shape):
    x = draw(2, *shape, seed=3).double()
    x = x + 0.02 * ((x - 0.25).abs() < 0.01) + 0.02 * ((x - 0.75).abs() < 0.01)  # off the kinks
    op = parse(form).bind([0, 1], shape)
    assert torch.autograd.gradcheck(op.A, (x.requires_grad_(),), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("phase:fourier,oversample=-1", "oversample must be a number from 0 to 32"),
        ("phase:fourier,oversample=inf", "oversample must be a number from 0 to 32"),
        ("hdr:clip,factor=0.5", "factor must be a number from 1 to 1000"),
        ("blur:nonlinear,length=0", "length must be a number from 1 to 1024"),
        ("blur:nonlinear,seed=-1", "seed"),
        ("quantise,bits=0", "bits must be a whole number from 1 to 12"),
        ("jpeg", "needs the option quality"),
        ("jpeg,quality=0", "quality must be a whole number from 1 to 100"),
        ("jpeg,quality=50,chroma=4:1:1", "4:2:0, 4:4:4"),
    ],
)
def test_bad_options_are_named(text, words):
    with pytest.raises(InputError, match=words):
        parse(text)


def test_images_that_do_not_fit():
    with pytest.raises(InputError, match="2 channels: give 1 or 3"):
        parse("jpeg,quality=10").A(torch.zeros(1, 2, 8, 8))
    with pytest.raises(InputError, match="2 channels: give 1 or 3"):
        parse("jpeg,quality=10").bind([0], (2, 8, 8))
    with pytest.raises(InputError, match="no image has a measurement of size 5x6"):
        parse("phase:fourier").x_shape((1, 5, 6))


def test_a_chain_counts_what_its_last_member_sees():
    op = parse("hdr:clip|inpaint:random,keep=0.6,seed=1").bind([4], (1, 8, 8))
    assert isinstance(op, Compose) and not op.linear and not op.proximal
    x = draw(1, 1, 8, 8)
    expected = parse("hdr:clip").A(x) * op.mask
    torch.testing.assert_close(op.A(x), expected, rtol=0, atol=0)
    assert op.count(expected).item() == op.mask.sum()
    mixed = Compose(as_operator(lambda x: x**2).bind([0], (1, 8, 8)), parse("quantise,bits=2"))
    assert not mixed.linear
    torch.testing.assert_close(mixed.A(x), ((3 * (x**2).clamp(0, 1)).round() / 3))


# -- phase retrieval ------------------------------------------------------------------------------


@pytest.mark.parametrize("oversample", [0, 2, 4])
@pytest.mark.parametrize("shape", [(1, 4, 7), (3, 8, 4)])
def test_phase_is_the_sum_over_pixels(shape, oversample):
    x = draw(2, *shape).double()
    height, width = shape[1:]
    rows, columns = (n + 2 * int(oversample * n / 8) for n in (height, width))
    # frequencies from negative to positive, zero in the middle
    u = torch.arange(rows).double() - rows // 2
    v = torch.arange(columns).double() - columns // 2
    left = torch.exp(-2j * math.pi * u[:, None] * torch.arange(height).double() / rows)
    right = torch.exp(-2j * math.pi * torch.arange(width).double()[:, None] * v / columns)
    expected = (left @ x.to(left.dtype) @ right).abs() / math.sqrt(rows * columns)
    y = parse(f"phase:fourier,oversample={oversample}").A(x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    # the transform keeps the energy, and does not change under a rotation by 180 degrees
    torch.testing.assert_close(y.square().sum(), x.square().sum())
    turned = parse(f"phase:fourier,oversample={oversample}").A(x.flip(-2, -1))
    torch.testing.assert_close(turned, y, rtol=1e-9, atol=1e-9)


def test_phase_has_the_published_size():
    assert parse("phase:fourier,oversample=2").y_shape((3, 256, 256)) == (3, 384, 384)
    assert parse("phase:fourier,oversample=4").y_shape((1, 128, 64)) == (1, 256, 128)
    for oversample in (0, 0.7, 2, 3.3, 8):
        op = parse(f"phase:fourier,oversample={oversample}")
        for side in range(1, 80):
            shape = (1, side, 80 - side)
            assert op.x_shape(op.y_shape(shape)) == shape


def test_phase_gradient_is_zero_where_the_magnitude_is():
    op = parse("phase:fourier,oversample=2")
    x = torch.zeros(1, 1, 8, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(op.A(x).sum(), x)
    assert torch.equal(grad, torch.zeros_like(x))
    # a constant without a border has one frequency only; the others are almost zero
    x = torch.full((1, 1, 8, 8), 0.5, requires_grad=True)
    flat = parse("phase:fourier,oversample=0")
    (grad,) = torch.autograd.grad((1 - flat.A(x)).square().sum(), x)
    assert grad.isfinite().all()


# -- high dynamic range ---------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 2.0, 5.0])
def test_clip_is_that_of_the_literature(factor):
    x = draw(2, 3, 5, 4)
    y = parse(f"hdr:clip,factor={factor}").A(x)
    u = 2 * x - 1
    torch.testing.assert_close(2 * y - 1, (factor * u).clamp(-1, 1), rtol=0, atol=1e-6)
    assert (y == 1).any() and (y == 0).any()


GRID = torch.linspace(-1, 2, 6001, dtype=torch.float64)


def brute_force(op, z, y, gamma):
    """Minimize gamma (A x - y)^2 + (x - z)^2 on a fine grid, pixel by pixel."""
    ax = op.A(GRID.reshape(1, 1, 1, -1)).flatten()
    cost = gamma * (ax - y.flatten()[:, None]).square() + (GRID - z.flatten()[:, None]).square()
    return cost.amin(1)


@settings(max_examples=40, deadline=None)
@given(
    form=st.sampled_from(
        ["hdr:clip,factor=1", "hdr:clip,factor=2", "quantise,bits=1", "quantise,bits=3"]
    ),
    gamma=st.sampled_from([0.0, 0.1, 1.0, 30.0, 1e4]),
    noise=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(0, 1000),
)
def test_prox_of_clips_and_levels_is_the_least_of_all(form, gamma, noise, seed):
    op = parse(form)
    z, x, n = (draw(1, 1, 5, 6, seed=seed + k).double().clamp(-0.9, 1.9) for k in range(3))
    y = op.A(x) + noise * (n - 0.5)
    found = op.prox_l2(z, y, gamma)
    reached = gamma * (op.A(found) - y).square() + (found - z).square()
    least = brute_force(op, z, y, gamma)
    # not above the minimum on the grid (up to the margin at a level's edge), nor far below it
    assert (reached.flatten() <= least + 4e-3).all()
    assert (reached.flatten() >= least - 2e-3 * (1 + gamma)).all()


def test_prox_takes_one_gamma_for_each_image():
    for form in ("hdr:clip", "quantise,bits=2", "jpeg,quality=10"):
        op, z, y = parse(form), draw(3, 3, 8, 8), draw(3, 3, 8, 8, seed=1)
        gamma = torch.tensor([0.0, 1.0, 50.0])
        found = op.prox_l2(z, y, gamma)
        for row in range(3):
            alone = op.prox_l2(z[row : row + 1], y[row : row + 1], float(gamma[row]))
            torch.testing.assert_close(found[row : row + 1], alone, rtol=0, atol=1e-5)


# -- quantisation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 5])
def test_levels_and_straight_through(bits):
    op, x = parse(f"quantise,bits={bits}"), draw(2, 3, 9, 8).requires_grad_()
    y = op.A(x)
    top = 2**bits - 1
    levels = torch.arange(top + 1) / top
    assert torch.equal(y, levels[(y[..., None] - levels).abs().argmin(-1)])
    # each value has the nearest level
    gap = (x[..., None] - levels).abs().amin(-1)
    torch.testing.assert_close((x - y).abs(), gap, rtol=0, atol=1e-6)
    v = draw(2, 3, 9, 8, seed=1)
    assert torch.equal(torch.autograd.grad(y, x, v)[0], v)


@pytest.mark.parametrize("bits", [1, 2, 8, 12])
def test_trusted_levels_are_met_at_the_nearest_value(bits):
    op, z, x = parse(f"quantise,bits={bits}"), draw(2, 1, 9, 8), draw(2, 1, 9, 8, seed=1)
    y = op.A(x)
    found = op.prox_l2(z, y, 1e8)
    assert torch.equal(op.A(found), y)
    half = 0.5 / (2**bits - 1)
    low = torch.where(y == 0, -torch.inf, y - half)
    high = torch.where(y == 1, torch.inf, y + half)
    expected = z.maximum(low).minimum(high)
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-3 * half)


# -- JPEG -----------------------------------------------------------------------------------------


def picture(height, width, channels, seed=0):
    """Make a smooth color pattern with some grain, uint8 (H, W, C)."""
    grain = torch.randn(
        channels, 1, height, width, generator=torch.Generator().manual_seed(seed)
    ).double()
    waves = parse("blur:gaussian,sigma=2").A(grain)[:, 0]
    image = 0.5 + 0.2 * waves / waves.std() + 0.02 * grain[:, 0]
    return (255 * image.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()


def library(image, quality, chroma):
    """Compress with Pillow; return the pixels (H, W, C) and the tables of the file."""
    file = io.BytesIO()
    mode = {"4:2:0": 2, "4:4:4": 0}[chroma]
    Image.fromarray(image.squeeze()).save(file, "JPEG", quality=quality, subsampling=mode)
    with Image.open(file) as back:
        return np.asarray(back).reshape(image.shape).astype(float), back.quantization


# quality, and the fraction of values that must be within 1 and 2 of 255 levels; 0.1 less where
# chrominance is averaged, which the library does in integers
SHARES = [(5, 0.96, 0.97), (10, 0.92, 0.95), (30, 0.9, 0.92), (75, 0.8, 0.9), (100, 0.95, 0.99)]


@pytest.mark.parametrize(("quality", "one", "two"), SHARES)
@pytest.mark.parametrize(
    ("size", "channels", "chroma"),
    [
        ((64, 96), 1, "4:2:0"),
        ((61, 85), 1, "4:2:0"),
        ((64, 96), 3, "4:4:4"),
        ((61, 85), 3, "4:4:4"),
        ((64, 96), 3, "4:2:0"),
        ((61, 85), 3, "4:2:0"),
    ],
)
def test_jpeg_is_the_librarys(size, channels, chroma, quality, one, two):
    image = picture(*size, channels)
    theirs, tables = library(image, quality, chroma)
    assert tables[0] == table(LUMINANCE, quality).flatten().tolist()
    if channels == 3:
        assert tables[1] == table(CHROMINANCE, quality).flatten().tolist()
    x = torch.from_numpy(image / 255).permute(2, 0, 1)[None]
    ours = 255 * parse(f"jpeg,quality={quality},chroma={chroma}").A(x)[0].permute(1, 2, 0).numpy()
    gap = np.abs(ours.round() - theirs)
    less = 0.1 if channels == 3 and chroma == "4:2:0" else 0
    assert (gap <= 1).mean() > one - less and (gap <= 2).mean() > two - less
    # ties of coefficients may be rounded differently: far less than the compression error
    lost = np.sqrt(np.square(theirs - image).mean())
    assert np.sqrt(np.square(ours - theirs).mean()) < max(0.4 * lost, 0.8)


def test_jpeg_of_8_bit_images_does_not_depend_on_the_batch_or_the_precision():
    # most of their values lie halfway between two steps
    images = torch.stack(
        [torch.from_numpy(picture(24, 40, 3, seed)).permute(2, 0, 1) for seed in range(5)]
    )
    for form in ("jpeg,quality=10", "jpeg,quality=90,chroma=4:4:4", "jpeg,quality=75"):
        op = parse(form)
        for x in (images / 255, (images / 32).round() * 32 / 255):
            whole = op.A(x)
            for row in range(5):
                alone = op.A(x[row : row + 1])
                torch.testing.assert_close(alone, whole[row : row + 1], rtol=0, atol=1e-5)
            torch.testing.assert_close(op.A(x.double()).float(), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["phase:fourier", "hdr:clip", "blur:nonlinear", "quantise"])
def test_operators_follow_the_device_of_the_image(form):
    x = torch.zeros(2, 3, 16, 10, device="meta")
    assert parse(form).A(x).device.type == "meta"
    assert parse("jpeg,quality=5").A(x).device.type == "meta"


def test_jpeg_of_a_grey_image_is_the_identity_to_autograd():
    x = draw(2, 1, 11, 18).requires_grad_()
    v = draw(2, 1, 11, 18, seed=1)
    for quality in (1, 50):
        (back,) = torch.autograd.grad(parse(f"jpeg,quality={quality}").A(x), x, v)
        torch.testing.assert_close(back, v, rtol=0, atol=1e-5)


def test_jpeg_gradient_of_colours_is_the_adjoint_of_the_chain_without_rounding():
    # at high quality A is nearly that chain: compare with finite differences over large steps
    op, x, d = parse("jpeg,quality=100"), draw(1, 3, 16, 16).double(), draw(1, 3, 16, 16, seed=1)
    x, d = 0.5 + 0.3 * (x - 0.5), (d.double() - 0.5)
    x.requires_grad_()
    v = draw(1, 3, 16, 16, seed=2).double()
    (back,) = torch.autograd.grad(op.A(x), x, v)
    x = x.detach()
    slope = (v * (op.A(x + 0.3 * d) - op.A(x - 0.3 * d))).sum() / 0.6
    assert float((back * d).sum()) == pytest.approx(float(slope), rel=0.05)


def test_jpeg_prox_is_the_nearest_image_of_the_same_file():
    op = parse("jpeg,quality=10")
    z = 0.5 + 0.15 * (draw(4, 1, 16, 8).double() - 0.5)
    x = 0.5 + 0.3 * (draw(4, 1, 16, 8, seed=1).double() - 0.5)
    y = op.A(x)
    found = op.prox_l2(z, y, 1e8)
    torch.testing.assert_close(op.A(found), y, rtol=0, atol=1e-9)
    # none is nearer: x gives y, and so do all images between x and found, up to the margin
    away, least = (z - x).square().sum(), (z - found).square().sum()
    assert least < 0.9 * away
    # each coefficient moved to the edge of its step, or not at all
    cosines = torch.cos(math.pi / 8 * torch.outer(torch.arange(8.0), torch.arange(8) + 0.5)) / 2
    cosines[0] /= math.sqrt(2)
    cosines = cosines.double()
    blocks = [255 * image.reshape(4, 2, 8, 8) - 128 for image in (found, z, y)]
    steps = table(LUMINANCE, 10)
    c, c_z, c_y = (cosines @ block @ cosines.T / steps for block in blocks)
    edges = (c_z - c_y.round()).clamp(-0.45, 0.45) + c_y.round()
    torch.testing.assert_close(c, edges, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("chroma", "left"), [("4:4:4", 0.1), ("4:2:0", 0.3)])
def test_jpeg_prox_of_colours_leaves_little_of_the_misfit(chroma, left):
    op = parse(f"jpeg,quality=20,chroma={chroma}")
    x = torch.from_numpy(picture(32, 24, 3) / 255).permute(2, 0, 1)[None]
    z = torch.from_numpy(picture(32, 24, 3, seed=1) / 255).permute(2, 0, 1)[None]
    y = op.A(x)
    before, after = ((op.A(u) - y).norm() for u in (z, op.prox_l2(z, y, 1e8)))
    assert after < left * before


# -- nonlinear blur -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_blur_keeps_constants_and_depends_on_brightness_and_place(seed):
    op = parse(f"blur:nonlinear,seed={seed}")
    for value in (0.0, 0.3, 1.0):
        x = torch.full((1, 3, 20, 24), value)
        torch.testing.assert_close(op.A(x), x, rtol=0, atol=1e-6)
    x = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(seed)).double()
    y = op.A(x)
    # A blurs: neighbors become far more similar
    assert y.diff(dim=-1).square().mean() < 0.25 * x.diff(dim=-1).square().mean()
    # a faint pattern is blurred differently on a dark and on a bright background
    faint = 0.1 * (x - 0.5)
    dark, bright = (op.A(level + faint) - level for level in (0.2, 0.8))
    assert (dark - bright).norm() > 0.1 * dark.norm()
    # and differently at another position
    moved = op.A(0.5 + faint.roll((10, 10), (-2, -1))).roll((-10, -10), (-2, -1))
    inner = (..., slice(4, 18), slice(4, 18))
    assert (moved - op.A(0.5 + faint))[inner].norm() > 0.1 * (moved[inner] - 0.5).norm()


def test_blur_comes_from_the_seed_alone():
    x = draw(2, 3, 12, 9)
    one, two = (parse("blur:nonlinear,seed=3").A(x) for _ in range(2))
    assert torch.equal(one, two)
    assert (parse("blur:nonlinear,seed=4").A(x) - one).abs().max() > 0.02
    assert (parse("blur:nonlinear,seed=3").to("cpu").A(x) - one).abs().max() == 0
    # the draws must stay: old measurements must keep their operator
    ramp = torch.linspace(0, 1, 48, dtype=torch.float64).square().reshape(1, 1, 6, 8)
    found = parse("blur:nonlinear,length=5,seed=0").A(ramp)[0, 0, [0, 2, 5], [0, 4, 7]]
    expected = torch.tensor([0.00782618521947458, 0.18141396623793438, 0.7246515045023701])
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=1e-5)


def test_vector_jacobian_products():
    """<A_vjp(x, v), d> is the derivative of <A(x), v> along d, by central differences."""
    for form in ("phase:fourier", "hdr:clip", "blur:nonlinear", "blur:gaussian,sigma=1"):
        op = parse(form).bind([0], (1, 8, 8))
        x, d = (
            0.2 + 0.2 * torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(k))
            for k in (0, 1)
        )
        x, d = x.double(), d.double()
        v = torch.randn(op.A(x).shape, generator=torch.Generator().manual_seed(2)).double()
        slope = ((op.A(x + 1e-5 * d) - op.A(x - 1e-5 * d)) * v).sum() / 2e-5
        assert float((op.A_vjp(x, v) * d).sum()) == pytest.approx(float(slope), rel=1e-5)
