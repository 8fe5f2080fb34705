"""Strokes, oriented blurs, bicubic reduction, loss of color and compositions, tested against dense
matrices, direct sums and torch's own resampling."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmurk.errors import InputError
from unmurk.operators import Compose, as_operator, parse
from unmurk.operators.blur import CUTOFF
from unmurk.problem import Problem

SINGLE = [
    "inpaint:freeform,strokes=1,width=1.5,seed=3",
    "inpaint:freeform,strokes=2,width=2",
    "blur:anisotropic,sigma=0.5,ratio=0.7,angle=25",
    "blur:anisotropic,sigma=2,ratio=0.3,angle=30,pad=circular",
    "blur:anisotropic,sigma=1.5,ratio=0.4,angle=90",
    "blur:motion,length=1.4,angle=30",
    "blur:motion,length=4.5,angle=-60,pad=circular",
    "blur:motion,length=3",
    "sr:bicubic,factor=2",
    "sr:bicubic,factor=1",
    "colour:grey",
]
CHAINS = [
    "inpaint:random,keep=0.6,seed=1|sr:average,factor=2",
    "sr:bicubic,factor=2|inpaint:random,keep=0.6",
    "colour:grey|inpaint:freeform,strokes=1,width=2|sr:bicubic,factor=2",
    "identity|inpaint:box,size=2,seed=1|inpaint:random,keep=0.7",
    "blur:motion,length=1.4,angle=30|inpaint:random,keep=0.6,seed=2",
    "colour:grey|blur:anisotropic,sigma=0.5,ratio=0.7,angle=25,pad=circular",
]
FORMS = SINGLE + CHAINS
INDEX = [4, 0, 9]
SHAPES = [(3, 6, 4), (3, 4, 6)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(op, shape):
    """Return the matrix of an operator bound to one image, in double precision."""
    n = math.prod(shape)
    return op.A(torch.eye(n, dtype=torch.float64).reshape(n, *shape)).reshape(n, -1).T


# -- the four maps --------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    half=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    index=st.lists(st.integers(0, 1000), min_size=1, max_size=4),
)
def test_adjoint(form, half, index):
    shape = (3, 2 * half[0] + 2, 2 * half[1] + 2)
    op, x = parse(form).bind(index, shape), draw(len(index), *shape)
    y = draw(*op.A(x).shape, seed=1)
    forward, back = (op.A(x) * y).sum(), (x * op.A_adjoint(y)).sum()
    assert abs(forward - back) <= 1e-5 * op.A(x).norm() * y.norm() + 1e-12
    assert op.A(x).shape[1:] == op.y_shape(shape) == op.y_shape(x.shape)
    assert op.A_adjoint(y).shape == x.shape
    assert op.x_shape(y.shape) == shape == op.x_shape(y.shape[1:])


@settings(max_examples=40, deadline=None)
@given(
    blur=st.one_of(
        st.builds("blur:motion,length={},angle={}".format, st.floats(1, 20), st.floats(-400, 400)),
        st.builds(
            "blur:anisotropic,sigma={},ratio={},angle={}".format,
            st.floats(0.1, 5),
            st.floats(0.05, 1),
            st.floats(-400, 400),
        ),
    ),
    pad=st.sampled_from(["reflect", "circular"]),
    image=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_adjoint_brightness_and_text_of_any_oriented_blur(blur, pad, image):
    op = parse(f"{blur},pad={pad}")
    x, y = draw(2, 3, *image).double(), draw(2, 3, *image, seed=1).double()
    forward, back = (op.A(x) * y).sum(), (x * op.A_adjoint(y)).sum()
    assert abs(forward - back) <= 1e-6 * op.A(x).norm() * y.norm() + 1e-12
    assert torch.allclose(op.A(torch.ones_like(x)), torch.ones_like(x), atol=1e-5)
    assert torch.allclose(op.kernel, op.kernel.flip(-2, -1), atol=1e-7)
    assert parse(op.spec) == op


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_prox_is_the_dense_solution(form, shape):
    op, gamma, z = parse(form).bind(INDEX, shape), torch.tensor([0.0, 0.7, 30.0]), draw(3, *shape)
    y = draw(*op.A(z).shape, seed=1)
    found = op.prox_l2(z, y, gamma)
    assert torch.equal(found[0], z[0])
    for row in range(3):
        a, g = dense(op.index_select([row]), shape), float(gamma[row])
        left = torch.eye(a.shape[1]) + g * a.T @ a
        right = z[row].flatten() + g * a.T @ y[row].flatten().double()
        solved = torch.linalg.solve(left, right).reshape(shape)
        assert torch.allclose(found[row].double(), solved, atol=1e-4)
    assert torch.allclose(op.prox_l2(z, y, 0.7)[1], found[1], atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dagger_is_the_pseudo_inverse(form, shape):
    op = parse(form).bind(INDEX, shape)
    y = draw(*op.A(draw(3, *shape)).shape)
    found = op.A_dagger(y)
    # for a single blur with reflecting borders, use the norms that weight the edges
    root = torch.ones(shape, dtype=torch.float64)
    if form.startswith("blur") and "reflect" in op.spec and "|" not in op.spec:
        for edge in (root[:, 0], root[:, -1], root[..., 0], root[..., -1]):
            edge *= 0.5**0.5
    root = root.flatten()
    for row in range(3):
        a, right = dense(op.index_select([row]), shape), y[row].flatten().double()
        if bool((root != 1).any()):
            inverse = torch.linalg.pinv(root[:, None] * a / root, rtol=CUTOFF)
            expected = inverse @ (root * right) / root
        else:
            expected = torch.linalg.pinv(a, rtol=CUTOFF) @ right
        assert torch.allclose(found[row].flatten().double(), expected, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_autograd_agrees_with_the_adjoint(form):
    op = parse(form).bind([1, 2], (3, 6, 4))
    x = draw(2, 3, 6, 4).requires_grad_()
    (grad,) = torch.autograd.grad(0.5 * op.A(x).square().sum(), x)
    assert torch.allclose(grad, op.A_adjoint(op.A(x)), atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_double_precision_stays(form):
    op, x = parse(form).bind([1, 2], (3, 6, 4)), draw(2, 3, 6, 4).double()
    assert op.A(x).dtype == op.A_dagger(op.A(x)).dtype == torch.float64
    assert op.prox_l2(x, op.A(x), 1.0).dtype == torch.float64


@pytest.mark.parametrize("form", FORMS)
def test_results_do_not_depend_on_the_batch(form):
    shape, index = (3, 6, 4), [3, 8, 1, 1, 6]
    whole, x = parse(form).bind(index, shape), draw(5, *shape)
    y = whole.A(x)
    for rows in ([0, 1], [2, 3, 4]):
        split = parse(form).bind([index[row] for row in rows], shape)
        for one in (split, whole.index_select(rows), whole.index_select(torch.tensor(rows))):
            assert torch.allclose(one.A(x[rows]), y[rows], atol=1e-6)
            assert torch.allclose(one.A_dagger(y[rows]), whole.A_dagger(y)[rows], atol=1e-5)
            prox = one.prox_l2(x.flip(0)[rows], y[rows], 2.0)
            assert torch.allclose(prox, whole.prox_l2(x.flip(0), y, 2.0)[rows], atol=1e-5)
    assert torch.allclose(parse(form).A(x), parse(form).bind(range(5), shape).A(x), atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_text_form_round_trip(form):
    op = parse(form)
    assert parse(op.spec) == op and parse(op.spec).spec == op.spec
    assert hash(parse(op.spec)) == hash(op)
    assert op.bind([1], (3, 4, 6)) == parse(op.spec).bind([1], (3, 4, 6))
    assert Problem.from_dict(Problem(op, 0.1).to_dict()) == Problem(op, 0.1)


# -- strokes --------------------------------------------------------------------------------------


def hidden(form, shape, index):
    return (parse(form).bind(index, shape).mask == 0)[:, 0].numpy()


@pytest.mark.parametrize("shape", [(1, 40, 64), (3, 64, 30)])
def test_strokes_are_different_connected_and_as_thick_as_the_brush(shape):
    masks = hidden("inpaint:freeform,strokes=1,width=5,seed=2", shape, range(20))
    assert len({mask.tobytes() for mask in masks}) == 20
    rows, columns = np.indices(shape[1:])
    disc = rows[:5, :5] - 2, columns[:5, :5] - 2
    disc = [(r, c) for r, c in zip(disc[0].flat, disc[1].flat, strict=True) if r * r + c * c <= 4]
    for mask in masks:
        # a stroke is connected: growing from one hidden pixel reaches all of them
        piece = np.zeros_like(mask)
        piece[tuple(np.argwhere(mask)[0])] = True
        for _ in range(mask.size):
            wide = np.pad(piece, 1)
            grown = mask & (
                wide[1:-1, 1:-1]
                | wide[2:, 1:-1]
                | wide[:-2, 1:-1]
                | wide[1:-1, 2:]
                | wide[1:-1, :-2]
            )
            if (grown == piece).all():
                break
            piece = grown
        assert (piece == mask).all()
        # a stroke is thick: discs one pixel smaller than the brush cover almost all of it
        wide = np.pad(mask, 2, constant_values=True)
        h, w = mask.shape
        inner = np.all([wide[2 + r : 2 + r + h, 2 + c : 2 + c + w] for r, c in disc], 0)
        wide = np.pad(inner, 2)
        opened = np.any([wide[2 + r : 2 + r + h, 2 + c : 2 + c + w] for r, c in disc], 0)
        assert (mask & ~opened).sum() <= 0.12 * mask.sum()


def test_strokes_hide_what_their_length_and_width_say():
    # a stroke is 100 pixels long on average; reflections and crossings hide pixels twice
    share = hidden("inpaint:freeform,strokes=1,width=2", (1, 100, 150), range(150)).mean()
    assert 0.8 * 100 * 2 / 15000 < share < 1.05 * 100 * 2 / 15000
    four = hidden("inpaint:freeform,strokes=4,width=2", (1, 100, 150), range(150)).mean()
    assert four == pytest.approx(1 - (1 - share) ** 4, rel=0.1)
    # strokes are uniform over the image: no block is preferred or avoided
    where = hidden("inpaint:freeform,strokes=4,width=4", (1, 32, 32), range(150)).mean(0)
    blocks = where.reshape(4, 8, 4, 8).mean((1, 3)) / where.mean()
    assert blocks.min() > 0.7 and blocks.max() < 1.35


def test_strokes_depend_on_seed_and_image_alone():
    form = "inpaint:freeform,strokes=2,width=3,seed={}"
    one = hidden(form.format(5), (3, 20, 24), [7, 1])
    assert (one[::-1] == hidden(form.format(5), (1, 20, 24), [1, 7])).all()
    assert (one != hidden(form.format(6), (3, 20, 24), [7, 1])).any((1, 2)).all()
    y = parse(form.format(5)).bind([7, 1], (3, 20, 24)).A(torch.ones(2, 3, 20, 24))
    assert ((y == 0).numpy() == one[:, None]).all()
    assert hidden(form.format(0), (1, 1, 1), [0]).all()


# -- blurs along a direction ----------------------------------------------------------------------


def test_anisotropic_kernel_has_the_moments_of_the_rotated_gaussian():
    sigma, ratio, angle = 4.0, 0.5, 30.0
    op = parse(f"blur:anisotropic,sigma={sigma},ratio={ratio},angle={angle}")
    kernel = op.kernel[0, 0].double()
    assert kernel.shape == (25, 25) and float(kernel.sum()) == pytest.approx(1, abs=1e-6)
    up = -(torch.arange(25.0) - 12)[:, None].double()  # rows count downwards
    right = (torch.arange(25.0) - 12).double()
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    cov = np.array([[c, -s], [s, c]]) @ np.diag([sigma**2, (ratio * sigma) ** 2])
    cov = cov @ np.array([[c, s], [-s, c]])
    # the kernel is cut at 3 sigma, which removes 3 % of the variance
    assert float((kernel * right * right).sum()) == pytest.approx(cov[0, 0], rel=0.04)
    assert float((kernel * up * up).sum()) == pytest.approx(cov[1, 1], rel=0.04)
    assert float((kernel * up * right).sum()) == pytest.approx(cov[0, 1], rel=0.04)


def test_a_round_anisotropic_kernel_is_the_gaussian():
    for angle in (0, 17, 90):
        op = parse(f"blur:anisotropic,sigma=1.5,ratio=1,angle={angle}")
        assert torch.allclose(op.kernel, parse("blur:gaussian,sigma=1.5").kernel, atol=1e-7)


@pytest.mark.parametrize("pad", ["reflect", "circular"])
def test_a_delta_moves_along_the_line(pad):
    delta = torch.zeros(1, 1, 15, 19)
    delta[..., 7, 9] = 1
    for angle in (0, 20, 45, 90, 135, 250):
        op = parse(f"blur:motion,length=6,angle={angle},pad={pad}")
        y = op.A(delta)[0, 0].double()
        assert float(y.sum()) == pytest.approx(1, abs=1e-6)
        up, right = (7 - torch.arange(15.0))[:, None].double(), torch.arange(19.0).double() - 9
        c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        along, aside = c * right + s * up, -s * right + c * up
        far = (aside.abs() >= 1) | (along.abs() >= 3.5)
        assert y[far].abs().max() < 1e-7
        assert float((y * along).sum()) == pytest.approx(0, abs=1e-6)
        # the point is spread over a line of 5 pixels whose ends fade over a pixel
        spread = float((y * along.square()).sum())
        assert 25 / 12 < spread < 1.3 * 36 / 12
        assert float((y * aside.square()).sum()) < 0.2


@pytest.mark.parametrize("pad", ["reflect", "circular"])
def test_motion_along_an_axis_is_a_row_of_equal_taps(pad):
    x = draw(2, 3, 9, 12)
    for angle, size in ((0, "1x5"), (180, "1x5"), (90, "5x1"), (-90, "5x1")):
        found = parse(f"blur:motion,length=5,angle={angle},pad={pad}")
        box = parse(f"blur:uniform,size={size},pad={pad}")
        assert torch.equal(found.kernel, box.kernel) and found.symmetric
        assert torch.allclose(found.A(x), box.A(x), atol=1e-6)
    for angle in (0, 33):
        still = parse(f"blur:motion,length=1,angle={angle},pad={pad}")
        assert torch.allclose(still.A(x), x, atol=1e-6)
    even = parse("blur:motion,length=4").kernel[0, 0, 0]
    assert torch.allclose(even, torch.tensor([0.5, 1, 1, 1, 0.5]) / 4)


@pytest.mark.parametrize("blur", ["motion,length=5,angle=45", "anisotropic,sigma=2,ratio=0.3"])
def test_prox_that_trusts_the_data(blur):
    # without a preconditioner, conjugate gradients are 20 % off after 100 iterations
    op, shape, gamma = parse(f"blur:{blur}"), (1, 14, 12), 1e4
    z, y = draw(1, *shape), parse(f"blur:{blur}").A(draw(1, *shape, seed=1))
    a = dense(op, shape)
    left = torch.eye(a.shape[1]) + gamma * a.T @ a
    right = z.flatten() + gamma * a.T @ y.flatten().double()
    solved = torch.linalg.solve(left, right).reshape(1, *shape)
    change = (solved - z).norm()
    assert (op.prox_l2(z, y, gamma) - solved).norm() < 0.01 * change


# -- loss of colour -------------------------------------------------------------------------------


def test_grey_is_the_mean_of_the_channels():
    x = draw(2, 3, 4, 5)
    y = parse("colour:grey").A(x)
    assert torch.allclose(y[:, 0], (x[:, 0] + x[:, 1] + x[:, 2]) / 3, atol=1e-6)
    back = parse("colour:grey").A_dagger(y)
    assert torch.equal(back, y.repeat(1, 3, 1, 1))
    four = parse("colour:grey,channels=4")
    assert four.x_shape((1, 4, 5)) == (4, 4, 5) and four.y_shape((4, 4, 5)) == (1, 4, 5)


# -- compositions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", CHAINS)
def test_a_composition_is_the_product(form):
    shape, x = (3, 6, 4), draw(3, 3, 6, 4)
    op, step, passed = parse(form).bind(INDEX, shape), x, shape
    for part in form.split("|"):
        one = parse(part).bind(INDEX, passed)
        step, passed = one.A(step), one.y_shape(passed)
    assert torch.allclose(op.A(x), step, atol=1e-6)
    assert op.linear and isinstance(op, Compose)


def test_spaces_nesting_and_order():
    a, b, c = (parse(t) for t in ("colour:grey", "sr:average,factor=2", "inpaint:box,size=1"))
    text = "colour:grey | sr:average,factor=2 |inpaint:box,size=1"
    assert parse(text) == Compose(a, Compose(b, c)) == Compose(Compose(a, b), c)
    assert Compose(b, c) != Compose(c, b)
    assert parse("identity") != parse("identity|identity")
    op = Compose(b, a)
    assert op.index_select([0, 0, 1]) is op
    with pytest.raises(InputError, match="two or more operators, got 1"):
        Compose(a)


def test_mask_and_count_of_a_composition():
    shape = (3, 8, 6)
    first, second = "inpaint:random,keep=0.6,seed=1", "inpaint:box,size=3,seed=2"
    masks = [parse(form).bind([3, 5], shape).mask for form in (first, second)]
    op = parse(f"{first}|identity|{second}").bind([3, 5], shape)
    assert torch.equal(op.mask, masks[0] * masks[1])
    assert torch.equal(op.index_select([1]).mask, (masks[0] * masks[1])[1:])
    small = parse(f"{first}|sr:average,factor=2|inpaint:box,size=2").bind([3, 5], shape)
    assert torch.equal(small.mask, masks[0])
    # the last operator decides the count: 3 channels of 4 x 3 pixels without 2 x 2
    y = small.A(draw(2, *shape))
    assert small.count(y).tolist() == [24, 24]
    assert parse("sr:average,factor=2|identity").bind([0], shape).mask is None
    assert parse(f"{first}|identity").mask is None
    y[..., 1:3, 0:2] = torch.nan
    for found in (small.A_adjoint(y), small.A_dagger(y), small.prox_l2(draw(2, *shape), y, 1.0)):
        assert found.isfinite().all()


def test_noise_enters_after_the_last_operator():
    shape = (3, 8, 6)
    problem = Problem("colour:grey|inpaint:random,keep=0.5,seed=1", 0.2)
    y = problem.simulate(torch.zeros(400, *shape), seed=3)
    seen = problem.bind(range(400), shape).mask > 0
    assert (y[~seen] == 0).all()
    assert float(y[seen].std()) == pytest.approx(0.2, rel=0.03)


def test_noise_in_the_pseudo_inverse_of_a_blurring_composition_stays_bounded():
    op = parse("sr:bicubic,factor=2|blur:gaussian,sigma=1")
    y = op.A(parse("blur:gaussian,sigma=1.5").A(torch.rand(2, 1, 32, 32)))
    noisy = op.A_dagger(y + 0.05 * draw(*y.shape))
    assert (op.A(op.A_dagger(y)) - y).norm() < 0.01 * y.norm()
    assert float((noisy - op.A_dagger(y)).square().mean().sqrt()) < 10 * 0.05


def test_functions_compose():
    half = as_operator(lambda x: 0.5 * x[..., ::2])
    op = Compose(parse("inpaint:random,keep=0.5"), half).bind([0, 1], (1, 4, 6))
    assert op.linear and op.y_shape((1, 4, 6)) == (1, 4, 3) and op.x_shape((1, 4, 3)) == (1, 4, 6)
    x, y = draw(2, 1, 4, 6), draw(2, 1, 4, 3, seed=1)
    assert torch.allclose((op.A(x) * y).sum(), (x * op.A_adjoint(y)).sum(), atol=1e-5)
    assert torch.allclose(op.A(x), 0.5 * (op.mask * x)[..., ::2])
    with pytest.raises(InputError, match="was a Python object"):
        parse(op.spec)


def test_a_composition_with_a_nonlinear_member_has_only_a_forward():
    op = Compose(parse("blur:uniform,size=3"), as_operator(torch.tanh)).bind([0], (1, 5, 4))
    x = draw(1, 1, 5, 4)
    assert torch.equal(op.A(x), torch.tanh(parse("blur:uniform,size=3").A(x)))
    assert not op.linear
    for use in (op.A_adjoint, op.A_dagger, lambda y: op.prox_l2(x, y, 1.0)):
        with pytest.raises(InputError, match="is not linear") as error:
            use(x)
        assert "\n" not in str(error.value)


# -- what cannot be read or does not fit ----------------------------------------------------------

BAD_FORMS = {
    "inpaint:freeform": "needs the option strokes, width",
    "inpaint:freeform,strokes=2": "needs the option width",
    "inpaint:freeform,strokes=0,width=2": "must be a whole number from 1 to 1000",
    "inpaint:freeform,strokes=1.5,width=2": "must be a whole number from 1 to 1000",
    "inpaint:freeform,strokes=1,width=0.5": "width must be a number from 1 to 1024",
    "inpaint:freeform,strokes=1,width=nan": "width must be a number from 1 to 1024",
    "inpaint:freeform,strokes=1,width=inf": "width must be a number from 1 to 1024",
    "inpaint:freeform,strokes=1,width=2,seed=-1": "from 0 to 9223372036854775807",
    "blur:anisotropic,sigma=1": "needs the option ratio",
    "blur:anisotropic,sigma=0,ratio=0.5": "sigma must be a number from 0.01 to 256",
    "blur:anisotropic,sigma=inf,ratio=0.5": "must be a number from 0.01 to 256",
    "blur:anisotropic,sigma=1,ratio=0": "ratio must be a number from 0.001 to 1",
    "blur:anisotropic,sigma=1,ratio=2": "ratio must be a number from 0.001 to 1",
    "blur:anisotropic,sigma=1,ratio=0.5,angle=nan": "must be a number from -3600 to 3600",
    "blur:anisotropic,sigma=1,ratio=0.5,pad=zero": "one of reflect, circular",
    "blur:motion": "needs the option length",
    "blur:motion,length=0.5": "length must be a number from 1 to 1024",
    "blur:motion,length=nan": "length must be a number from 1 to 1024",
    "blur:motion,length=3,angle=inf": "angle must be a number from -3600 to 3600",
    "blur:motion,length=3,angle=north": "angle must be a number from -3600 to 3600",
    "blur:motion,length=3,pad=zero": "one of reflect, circular",
    "sr:bicubic": "needs the option factor",
    "sr:bicubic,factor=0": "factor must be a whole number from 1 to 256",
    "sr:bicubic,factor=2.5": "factor must be a whole number from 1 to 256",
    "colour:grey,channels=1": "channels must be a whole number from 2 to 1024",
    "colour:grey,channels=three": "channels must be a whole number from 2 to 1024",
    "color:grey": "known are",
    "identity|": "unknown operator ''",
    "|": "unknown operator ''",
    "identity||identity": "unknown operator ''",
    "identity|blur": "unknown operator 'blur'",
    "identity|sr:average,factor=0": "factor must be a whole number from 1 to 256",
    "identity|python:f": "was a Python object",
}


@pytest.mark.parametrize("form", BAD_FORMS)
def test_bad_text_forms(form):
    with pytest.raises(InputError) as error:
        parse(form)
    assert BAD_FORMS[form] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("form", "shape", "part"),
    [
        ("sr:bicubic,factor=4", (1, 8, 6), "4 does not divide the image of 8x6"),
        ("colour:grey", (1, 8, 6), "the image has 1 channel, so there is no colour to lose"),
        ("colour:grey", (4, 8, 6), "write colour:grey,channels=4"),
        ("colour:grey|colour:grey", (3, 8, 6), "the image has 1 channel"),
        ("sr:average,factor=2|inpaint:box,size=5", (1, 8, 6), "5x5 but the image is 4x3"),
        ("sr:average,factor=2|sr:bicubic,factor=2", (1, 8, 6), "does not divide the image of 4x3"),
    ],
)
def test_operators_that_do_not_fit(form, shape, part):
    for use in (lambda op: op.bind([0], shape), lambda op: op.A(torch.zeros(1, *shape))):
        with pytest.raises(InputError) as error:
            use(parse(form))
        assert part in str(error.value) and "\n" not in str(error.value)


def test_measurements_and_batches_that_do_not_fit():
    with pytest.raises(InputError, match="has 1 channel, this one has 3"):
        parse("colour:grey").A_adjoint(torch.zeros(1, 3, 4, 4))
    op = parse("identity|inpaint:freeform,strokes=1,width=2").bind([0, 1], (1, 4, 4))
    with pytest.raises(InputError, match="4x4 but the image is 4x5"):
        op.A(torch.zeros(2, 1, 4, 5))
    with pytest.raises(InputError, match="2 images but the batch has 3"):
        op.A(torch.zeros(3, 1, 4, 4))
    with pytest.raises(InputError, match="must be >= 0"):
        op.bind([-1], (1, 4, 4))
