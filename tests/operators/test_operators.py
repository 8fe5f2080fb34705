"""Forward models, tested against dense matrices, direct sums and the definition of the adjoint."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unmurk.errors import InputError
from unmurk.operators import FAMILIES, Operator, as_operator, parse
from unmurk.operators.base import conjugate_gradient
from unmurk.operators.blur import CUTOFF

FORMS = [
    "identity",
    "inpaint:random,keep=0.4,seed=3",
    "inpaint:box,size=2x3",
    "inpaint:box,size=3,top=1,left=0",
    "inpaint:box,size=2,seed=5",
    "blur:gaussian,sigma=0.5",
    "blur:gaussian,sigma=1.5",
    "blur:uniform,size=5x3",
    "blur:gaussian,sigma=2,size=3x5,pad=circular",
    "blur:gaussian,sigma=1.5,pad=circular",
    "blur:uniform,size=3",
    "blur:uniform,size=9,pad=circular",
    "sr:average,factor=2",
    "sr:average,factor=1",
]
INDEX = [4, 0, 9]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(op, shape):
    """Return the matrix of an operator bound to one image, in double precision."""
    n = int(np.prod(shape))
    columns = op.A(torch.eye(n, dtype=torch.float64).reshape(n, *shape))
    return columns.reshape(n, -1).T


def each(op, rows):
    """Return the operators of single images: `dense` applies them to batches of unit images."""
    return [op.index_select([row]) for row in range(rows)]


@pytest.fixture
def files(tmp_path):
    """Write files with parameters of the images 0 to 9; return text forms that read them."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "masks.npy", rng.random((10, 6, 4)) < 0.5)
    np.save(tmp_path / "kernels.npy", rng.random((10, 5, 3)))
    np.save(tmp_path / "kernel.npy", rng.random((3, 1)))
    names = ("inpaint:file,path={}/masks.npy", "blur:file,path={}/kernels.npy")
    names += ("blur:file,path={}/kernel.npy,pad=circular",)
    names += ("blur:file,path={}/kernels.npy,pad=circular",)
    return [name.format(tmp_path) for name in names]


# -- the four maps --------------------------------------------------------------------------------


def assert_adjoint(op, x):
    y = draw(*op.A(x).shape, seed=1)
    forward, back = (op.A(x) * y).sum(), (x * op.A_adjoint(y)).sum()
    assert abs(forward - back) <= 1e-5 * op.A(x).norm() * y.norm() + 1e-12


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    half=st.tuples(st.integers(2, 8), st.integers(2, 8)),
    channels=st.sampled_from([1, 3]),
    index=st.lists(st.integers(0, 1000), min_size=1, max_size=4),
)
def test_adjoint(form, half, channels, index):
    shape = (channels, 2 * half[0], 2 * half[1])
    assert_adjoint(parse(form).bind(index, shape), draw(len(index), *shape))


@settings(max_examples=30, deadline=None)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    image=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    pad=st.sampled_from(["reflect", "circular"]),
)
def test_adjoint_of_wide_blurs(size, image, pad):
    odd = tuple(2 * n + 1 for n in size)
    op = parse(f"blur:gaussian,sigma=3,size={odd[0]}x{odd[1]},pad={pad}")
    assert_adjoint(op, draw(2, 1, *image))


def test_adjoint_of_file_operators(files):
    for form in files:
        assert_adjoint(parse(form).bind(INDEX, (3, 6, 4)), draw(3, 3, 6, 4))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 6, 4), (3, 4, 6)])
def test_prox_is_the_dense_solution(form, shape):
    check_prox(parse(form).bind(INDEX, shape), shape)


def test_prox_of_file_operators(files):
    for form in files:
        check_prox(parse(form).bind(INDEX, (3, 6, 4)), (3, 6, 4))


def check_prox(op, shape):
    gamma = torch.tensor([0.0, 0.7, 30.0])
    z = draw(3, *shape)
    y = draw(3, *op.A(z).shape[1:], seed=1)
    found = op.prox_l2(z, y, gamma)
    for row, one in enumerate(each(op, 3)):
        a, g = dense(one, shape), float(gamma[row])
        left = torch.eye(a.shape[1]) + g * a.T @ a
        right = z[row].flatten() + g * a.T @ y[row].flatten().double()
        solved = torch.linalg.solve(left, right).reshape(shape)
        assert torch.allclose(found[row].double(), solved, atol=1e-4)
    same = op.prox_l2(z, y, 0.7)
    assert torch.allclose(same[1], found[1], atol=1e-6)


@pytest.mark.parametrize("pad", ["reflect", "circular"])
@pytest.mark.parametrize("blur", ["gaussian,sigma=1.5", "uniform,size=5x3"])
def test_prox_that_trusts_the_data(blur, pad):
    # at this gamma, plain conjugate gradients are far off after 100 iterations
    op, shape, gamma = parse(f"blur:{blur},pad={pad}"), (1, 12, 10), 1e4
    z, x = draw(1, *shape), draw(1, *shape, seed=1)
    y = op.A(x)
    a = dense(op, shape)
    left = torch.eye(120) + gamma * a.T @ a
    right = z.flatten() + gamma * a.T @ y.flatten().double()
    solved = torch.linalg.solve(left, right).reshape(1, *shape)
    assert torch.allclose(op.prox_l2(z, y, gamma).double(), solved, atol=2e-3)


def check_dagger(op, shape, tolerance=2e-4):
    """Compare with the dense pseudo-inverse; reflecting borders need norms that weight edges."""
    y = draw(3, *op.A(draw(3, *shape)).shape[1:])
    found = op.A_dagger(y)
    root = torch.ones(shape, dtype=torch.float64)
    if "reflect" in op.spec:
        for edge in (root[:, 0], root[:, -1], root[..., 0], root[..., -1]):
            edge *= 0.5**0.5
    root = root.flatten()
    for row, one in enumerate(each(op, 3)):
        a = dense(one, shape)
        weighed = root[:, None] * a / root if "reflect" in op.spec else a
        inverse = torch.linalg.pinv(weighed, rtol=CUTOFF)
        right = y[row].flatten().double()
        if "reflect" in op.spec:
            expected = (inverse @ (root * right) / root).reshape(shape)
        else:
            expected = (inverse @ right).reshape(shape)
        assert torch.allclose(found[row].double(), expected, atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 6, 4), (3, 4, 6)])
def test_dagger_is_the_pseudo_inverse(form, shape):
    check_dagger(parse(form).bind(INDEX, shape), shape)


@pytest.mark.parametrize("form", ["blur:gaussian,sigma=0.5", "identity", "sr:average,factor=1"])
def test_dagger_inverts_what_can_be_inverted(form):
    op, shape = parse(form), (1, 6, 4)
    y = draw(1, *shape)
    plain = torch.linalg.pinv(dense(op, shape)) @ y.flatten().double()
    assert torch.allclose(op.A_dagger(y).flatten().double(), plain, atol=1e-5)


@pytest.mark.parametrize("pad", ["reflect", "circular"])
def test_dagger_of_user_kernels(tmp_path, pad):
    kernels = np.random.default_rng(0).random((10, 3, 3)) * 0.1
    kernels[:, 1, 1] += 1
    np.save(tmp_path / "k.npy", kernels)
    op = parse(f"blur:file,path={tmp_path}/k.npy,pad={pad}").bind(INDEX, (2, 6, 4))
    check_dagger(op, (2, 6, 4))


@pytest.mark.parametrize("form", ["blur:gaussian,sigma=1.5", "blur:uniform,size=5"])
def test_dagger_of_a_reflecting_blur_restores_and_holds_noise(form):
    x = parse("blur:gaussian,sigma=1.5").A(
        torch.rand(4, 1, 32, 20, generator=torch.manual_seed(0))
    )
    op = parse(form)
    y = op.A(x)
    found = op.A_dagger(y)
    assert (op.A(found) - y).square().mean().sqrt() < 1e-3
    assert (found - x).square().mean() < 0.1 * (y - x).square().mean()
    noise = op.A_dagger(y + 0.01 * draw(4, 1, 32, 20)) - found
    assert noise.square().mean().sqrt() < 0.01 / CUTOFF


@pytest.mark.parametrize("form", FORMS)
def test_autograd_agrees_with_the_adjoint(form):
    op = parse(form)
    x = draw(2, 3, 6, 4).requires_grad_()
    (grad,) = torch.autograd.grad(0.5 * op.A(x).square().sum(), x)
    assert torch.allclose(grad, op.A_adjoint(op.A(x)), atol=1e-5)


# -- blur -----------------------------------------------------------------------------------------


def direct_blur(x, kernel, pad):
    """Compute the sum of the definition by loops, in double precision, for an image (H, W)."""
    height, width = x.shape
    kh, kw = kernel.shape
    ch, cw = kh // 2, kw // 2
    wide = np.pad(x, ((kh - 1 - ch, ch), (kw - 1 - cw, cw)), mode=pad)
    out = np.zeros_like(x)
    for i in range(height):
        for j in range(width):
            for a in range(kh):
                for b in range(kw):
                    # wide[r] is x[r - (kh - 1 - ch)]
                    out[i, j] += kernel[a, b] * wide[i + kh - 1 - a, j + kw - 1 - b]
    return out


@pytest.mark.parametrize("pad", ["reflect", "circular"])
def test_gaussian_blur_is_the_convolution_of_every_channel(pad):
    # a blur that mixes channels, or drops a tap, is off by 25 % here
    x = draw(2, 3, 9, 12)
    sigma, radius = 1.2, 4
    tap = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = np.outer(tap, tap) / tap.sum() ** 2
    found = parse(f"blur:gaussian,sigma={sigma},pad={pad}").A(x).numpy()
    mode = {"reflect": "reflect", "circular": "wrap"}[pad]
    for row in range(2):
        for channel in range(3):
            expected = direct_blur(x[row, channel].double().numpy(), kernel, mode)
            error = np.linalg.norm(found[row, channel] - expected) / np.linalg.norm(expected)
            assert error < 1e-6


@pytest.mark.parametrize("pad", ["reflect", "circular"])
@pytest.mark.parametrize("size", [(3, 3), (5, 3), (1, 5)])
def test_user_kernel_is_convolved_not_correlated(tmp_path, pad, size):
    kernels = np.random.default_rng(1).random((3, *size))
    np.save(tmp_path / "k.npy", kernels)
    x = draw(3, 2, 6, 7)
    found = parse(f"blur:file,path={tmp_path}/k.npy,pad={pad}").A(x).numpy()
    mode = {"reflect": "reflect", "circular": "wrap"}[pad]
    for row in range(3):
        kernel = kernels[row] / kernels[row].sum()
        for channel in range(2):
            expected = direct_blur(x[row, channel].double().numpy(), kernel, mode)
            assert np.allclose(found[row, channel], expected, atol=1e-6)


@pytest.mark.parametrize("form", [f for f in FORMS if f.startswith(("blur", "sr"))])
def test_brightness_is_kept(form):
    ones = torch.ones(1, 3, 8, 8)
    y = parse(form).A(ones)
    assert torch.allclose(y, torch.ones_like(y), atol=1e-6)


def test_channels_stay_apart():
    x = torch.zeros(1, 3, 9, 9)
    x[:, 1, 4, 4] = 1
    y = parse("blur:gaussian,sigma=1.5").A(x)
    assert y[:, [0, 2]].abs().max() == 0
    assert y[0, 1, 4, 4] > 0


# -- masks and binding ----------------------------------------------------------------------------


def test_random_masks_keep_the_fraction_and_differ():
    mask = parse("inpaint:random,keep=0.3,seed=1").bind(range(50), (3, 20, 30)).mask
    assert mask.shape == (50, 1, 20, 30)
    assert abs(mask.mean() - 0.3) < 4 * (0.21 / mask.numel()) ** 0.5
    assert len(torch.unique(mask.flatten(1), dim=0)) == 50
    other = parse("inpaint:random,keep=0.3,seed=2").bind(range(50), (3, 20, 30)).mask
    assert abs(((mask - 0.3) * (other - 0.3)).mean()) < 4 * 0.21 / mask.numel() ** 0.5


def test_box_masks():
    centred = parse("inpaint:box,size=2x4").bind([0], (1, 8, 10)).mask
    expected = torch.ones(1, 1, 8, 10)
    expected[..., 3:5, 3:7] = 0
    assert torch.equal(centred, expected)
    placed = parse("inpaint:box,size=3,top=5,left=0").bind([0], (1, 8, 10)).mask
    assert torch.equal((placed == 0).nonzero().min(0).values, torch.tensor([0, 0, 5, 0]))
    random = parse("inpaint:box,size=2,seed=0").bind(range(200), (1, 4, 5)).mask
    assert torch.equal((random == 0).flatten(1).sum(1), torch.full((200,), 4))
    assert len(torch.unique(random.flatten(1), dim=0)) == 3 * 4  # every place occurs


@pytest.mark.parametrize("form", FORMS)
def test_results_do_not_depend_on_the_batch(form, files):
    shape = (1, 6, 4)
    for op in (parse(form), *map(parse, files)):
        x, index = draw(5, *shape), [3, 8, 1, 1, 6]
        whole = op.bind(index, shape)
        y = whole.A(x)
        for part in (slice(0, 2), slice(2, 5)):
            split = op.bind(index[part], shape)
            rows = list(range(5))[part]
            for one in (split, whole.index_select(rows), whole.index_select(torch.tensor(rows))):
                assert torch.allclose(one.A(x[part]), y[part], atol=1e-6)
                assert torch.allclose(one.A_dagger(y[part]), whole.A_dagger(y)[part], atol=1e-5)
            prox = whole.prox_l2(x.flip(0), y, 2.0)[part]
            assert torch.allclose(split.prox_l2(x.flip(0)[part], y[part], 2.0), prox, atol=1e-5)


def test_unbound_means_images_from_zero():
    x = draw(4, 3, 6, 5)
    op = parse("inpaint:random,keep=0.5")
    assert torch.equal(op.A(x), op.bind(range(4), x.shape[1:]).A(x))
    assert op.mask is None
    assert torch.equal(op.A_adjoint(x), op.A(x))


def test_take_repeats_rows():
    op = parse("inpaint:random,keep=0.5").bind([5, 6], (1, 4, 4))
    assert torch.equal(op.index_select([1, 1, 0]).mask, op.mask[[1, 1, 0]])
    shared = parse("inpaint:box,size=2").bind([5, 6], (1, 4, 4))
    assert shared.index_select([1, 1, 0]) is shared


def test_hidden_pixels_may_hold_anything():
    op = parse("inpaint:box,size=2").bind([0], (1, 4, 4))
    y = torch.full((1, 1, 4, 4), 0.5)
    y[..., 1:3, 1:3] = float("nan")
    for found in (op.A_adjoint(y), op.A_dagger(y), op.prox_l2(torch.zeros_like(y), y, 1.0)):
        assert found.isfinite().all()
    assert op.count(y).tolist() == [12]


def test_shapes():
    for form in FORMS:
        op = parse(form)
        x = draw(2, 3, 8, 6)
        assert op.A(x).shape[1:] == op.y_shape(x.shape) == op.y_shape((3, 8, 6))
        assert op.x_shape(op.A(x).shape) == (3, 8, 6)
    assert parse("sr:average,factor=4").y_shape((3, 8, 16)) == (3, 2, 4)


def test_double_precision_stays():
    for form in FORMS:
        x = draw(2, 1, 6, 4).double()
        op = parse(form)
        assert op.A(x).dtype == op.A_dagger(op.A(x)).dtype == torch.float64
        assert op.prox_l2(x, op.A(x), 1.0).dtype == torch.float64


def test_conjugate_gradients_solve_each_image_alone():
    a = draw(3, 6, 6)
    matrix = a @ a.mT + 0.5 * torch.eye(6)
    b = draw(3, 6, seed=1)
    b[1] = 0
    x = conjugate_gradient(lambda v: (matrix @ v[..., None])[..., 0], b)
    assert torch.allclose(x, torch.linalg.solve(matrix, b), atol=1e-4)
    assert x[1].abs().max() == 0


# -- text form ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_text_form_round_trip(form):
    op = parse(form)
    assert parse(op.spec) == op
    assert parse(op.spec).spec == op.spec
    assert hash(parse(op.spec)) == hash(op)


@given(
    sigma=st.floats(0.01, 20, allow_nan=False),
    size=st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9)),
    pad=st.sampled_from(["reflect", "circular"]),
    keep=st.floats(1e-6, 1),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=50, deadline=None)
def test_any_option_survives_the_text_form(sigma, size, pad, keep, seed):
    odd = None if size is None else (2 * size[0] + 1, 2 * size[1] + 1)
    for op in (
        FAMILIES["blur:gaussian"](sigma=sigma, size=odd, pad=pad),
        FAMILIES["inpaint:random"](keep=keep, seed=seed),
        FAMILIES["inpaint:box"](size=(3, 2), seed=seed),
    ):
        assert parse(op.spec) == op


def test_operators_differ_by_options_and_masks():
    assert parse("blur:gaussian,sigma=1") != parse("blur:gaussian,sigma=2")
    op = parse("inpaint:random,keep=0.5")
    assert op.bind([0], (1, 4, 4)) != op.bind([1], (1, 4, 4))
    assert op.bind([0], (1, 4, 4)) == op.bind([0], (1, 4, 4))


def test_spaces_and_commas_in_paths():
    assert parse(" blur:gaussian, sigma = 1.5 ") == parse("blur:gaussian,sigma=1.5")
    assert parse("inpaint:file,path=a,b.png").path == "a,b.png"


BAD_FORMS = {
    "": "unknown operator",
    "blur": "known are",
    "blur:motion,size=3": "known are",
    "blur:gaussian": "needs the option sigma",
    "blur:gaussian,sigma": "unknown operator",
    "blur:gaussian,sigma=": "sigma must be a number from 0.01 to 256",
    "blur:gaussian,sigma=x": "sigma must be a number from 0.01 to 256",
    "blur:gaussian,sigma=0": "sigma must be a number from 0.01 to 256",
    "blur:gaussian,sigma=nan": "sigma must be a number from 0.01 to 256",
    "blur:gaussian,sigma=-1": "sigma must be a number from 0.01 to 256",
    "blur:gaussian,sigma=1,sigma=2": "given twice",
    "blur:gaussian,sigma=1,width=3": "no option 'width'",
    "blur:gaussian,sigma=1,size=4": "an odd number from 1 to 1537, or two of them as in 9x5",
    "blur:gaussian,sigma=1,size=3x5x7": "an odd number from 1 to 1537, or two of them",
    "blur:gaussian,sigma=1,pad=zero": "one of reflect, circular",
    "blur:uniform,size=0": "must be an odd number from 1 to 1537, or two of them as in 9x5",
    "inpaint:random,keep=0": "keep must be a number from 1e-06 to 1",
    "inpaint:random,keep=1.5": "keep must be a number from 1e-06 to 1",
    "inpaint:random,keep=0.5,seed=-1": "must be a whole number from 0 to 9223372036854775807",
    "inpaint:box,size=0": "must be a whole number from 1 to 65536, or two of them as in 12x8",
    "inpaint:box,size=3,top=1": "both top and left",
    "inpaint:box,size=3,top=1,left=1,seed=0": "leave out top and left",
    "inpaint:box,size=3,top=-1,left=1": "top must be a whole number from 0 to 65536",
    "sr:average,factor=0": "factor must be a whole number from 1 to 256",
    "identity,sigma=1": "no option 'sigma'",
}


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and text
    return text


@pytest.mark.parametrize("form", BAD_FORMS)
def test_bad_text_forms(form):
    with pytest.raises(InputError) as error:
        parse(form)
    assert BAD_FORMS[form] in one_line(error)


@pytest.mark.parametrize(
    ("form", "parts"),
    [
        ("inpaint:box,size=9", ["9x9", "8x6"]),
        ("inpaint:box,size=2,top=7,left=0", ["2x2", "8x6"]),
        ("sr:average,factor=4", ["4", "8x6"]),
    ],
)
def test_operators_that_do_not_fit(form, parts):
    for use in (lambda op: op.bind([0], (1, 8, 6)), lambda op: op.A(torch.zeros(1, 1, 8, 6))):
        with pytest.raises(InputError) as error:
            use(parse(form))
        assert all(part in one_line(error) for part in parts)


def test_bound_masks_do_not_fit_other_images():
    op = parse("inpaint:random,keep=0.5").bind([0, 1], (1, 4, 4))
    with pytest.raises(InputError, match="4x4 but the image is 4x5"):
        op.A(torch.zeros(2, 1, 4, 5))
    with pytest.raises(InputError, match="2 images but the batch has 3"):
        op.A(torch.zeros(3, 1, 4, 4))
    with pytest.raises(InputError, match="must be >= 0"):
        op.bind([-1], (1, 4, 4))


# -- masks and kernels from files -----------------------------------------------------------------


def test_mask_files(tmp_path):
    seen = np.random.default_rng(0).random((6, 5)) < 0.5
    Image.fromarray(np.uint8(seen) * 255).save(tmp_path / "m.png")
    np.save(tmp_path / "m.npy", seen.astype(np.float64))
    for name in ("m.png", "m.npy"):
        op = parse(f"inpaint:file,path={tmp_path / name}").bind([3, 4], (3, 6, 5))
        assert torch.equal(op.mask, torch.from_numpy(seen).float()[None, None])
        assert parse(op.spec).spec == op.spec


def test_a_mask_for_every_image(tmp_path):
    masks = np.random.default_rng(0).random((4, 6, 5)) < 0.5
    np.save(tmp_path / "m.npy", masks)
    op = parse(f"inpaint:file,path={tmp_path}/m.npy")
    expected = torch.from_numpy(masks[[3, 0]]).float()[:, None]
    assert torch.equal(op.bind([3, 0], (3, 6, 5)).mask, expected)
    with pytest.raises(InputError, match="4 arrays, so there is none for image 4"):
        op.bind([4], (3, 6, 5))


def bad_file(form, path, array=None, data=None):
    if array is not None:
        np.save(path, array)
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InputError) as error:
        parse(f"{form},path={path}").bind([0], (1, 8, 6))
    return one_line(error)


def test_bad_mask_and_kernel_files(tmp_path):
    path = tmp_path / "m.npy"
    message = bad_file("inpaint:file", path, np.eye(7, 6))
    assert "7x6" in message and "8x6" in message
    message = bad_file("blur:file", path, np.ones((9, 3)))
    assert "9x3" in message and "8x6" in message
    assert "positive sum" in bad_file("blur:file", path, np.zeros((3, 3)))
    assert "not finite" in bad_file("blur:file", path, np.full((3, 3), np.nan))
    assert "shape (8,)" in bad_file("inpaint:file", path, np.ones(8))
    assert "cannot read" in bad_file("inpaint:file", path, np.array([{}, None], object))
    assert "cannot read" in bad_file("inpaint:file", path, data=b"nonsense")
    assert "cannot read" in bad_file("inpaint:file", tmp_path / "m.png", data=b"nonsense")
    assert "there is no file" in bad_file("inpaint:file", tmp_path / "none.npy")


# -- what users bring -----------------------------------------------------------------------------


def shrink(x):
    """A linear map to another shape."""
    return 2 * x[..., ::2] - x[..., 1::2].flip(-1)


def test_a_linear_function_gets_everything():
    shape = (2, 3, 4)
    op = as_operator(shrink).bind([0], shape)
    assert op.linear and op.y_shape(shape) == (2, 3, 2)
    assert_adjoint(op, draw(3, *shape))
    check_prox(op, shape)
    y = draw(3, 2, 3, 2)
    inverse = torch.linalg.pinv(dense(op, shape))
    expected = (inverse @ y.flatten(1).double().T).T.reshape(3, *shape)
    assert torch.allclose(op.A_dagger(y).double(), expected, atol=1e-5)


def test_a_function_is_a_value_that_no_call_changes():
    op = as_operator(shrink)
    with pytest.raises(InputError, match="bind it with bind"):
        _ = op.linear
    with pytest.raises(InputError, match="bind\\(index, shape\\)"):
        op.A_adjoint(torch.zeros(1, 2, 3, 2))
    bound = op.bind([0], (2, 3, 4))
    before = dict(vars(op))
    op.A(torch.zeros(1, 2, 3, 4))
    op.y_shape((2, 3, 4))
    assert vars(op) == before and op.shape is None
    assert bound.linear and bound.A_adjoint(torch.zeros(1, 2, 3, 2)).shape == (1, 2, 3, 4)
    bound.A(torch.zeros(1, 2, 5, 6))
    assert bound.shape == (2, 3, 4)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.clamp(0, 1),
        lambda x: x + 1,
        lambda x: (x * 255).round() / 255,
        lambda x: x.abs(),
        lambda x: torch.tanh(x),
    ],
)
def test_nonlinear_functions_say_so(fn):
    op = as_operator(fn).bind([0], (1, 4, 4))
    x = draw(2, 1, 4, 4)
    assert not op.linear and torch.equal(op.A(x), fn(x))
    for use in (op.A_adjoint, op.A_dagger, lambda y: op.prox_l2(x, y, 1.0)):
        with pytest.raises(InputError, match="is not linear"):
            use(op.A(x))


class Physics:
    """An object with the methods of deepinv: y = w x with a weight for every image."""

    def __init__(self, w):
        self.w = w

    def A(self, x):
        return self.w * x

    def A_adjoint(self, y):
        return self.w * y

    def index_select(self, rows):
        return Physics(self.w[list(rows)])


class Complete(Physics):
    def A_dagger(self, y):
        return y / self.w

    def prox_l2(self, z, y, gamma):
        assert isinstance(gamma, float)
        return (z + gamma * self.w * y) / (1 + gamma * self.w**2)


@pytest.mark.parametrize("kind", [Physics, Complete])
def test_objects_in_deepinv_dialect(kind):
    w = torch.tensor([0.5, 2.0, 3.0]).reshape(3, 1, 1, 1)
    op = as_operator(kind(w))
    x, y = draw(3, 1, 4, 5), draw(3, 1, 4, 5, seed=1)
    assert op.linear
    assert_adjoint(op, x)
    assert torch.allclose(op.A_dagger(y), y / w, atol=1e-5)
    for gamma in (0.3, torch.tensor([0.3, 0.5, 0.0])):
        g = torch.as_tensor(gamma).reshape(-1, 1, 1, 1)
        expected = (x + g * w * y) / (1 + g * w**2)
        assert torch.allclose(op.prox_l2(x, y, gamma), expected, atol=1e-5)
    assert torch.equal(op.index_select([2, 2]).A(x[:2]), 3 * x[:2])


class OnlyA:
    def A(self, x):
        return shrink(x)


def test_an_object_with_only_a_forward():
    op = as_operator(OnlyA()).bind([0], (1, 4, 6))
    assert op.linear and op.spec == "python:OnlyA"
    assert_adjoint(op, draw(2, 1, 4, 6))
    assert op.x_shape((1, 4, 3)) == (1, 4, 6)


def test_as_operator_takes_what_it_knows():
    op = parse("identity")
    assert as_operator(op) is op
    assert isinstance(as_operator("sr:average,factor=2"), Operator)
    with pytest.raises(InputError, match="not int"):
        as_operator(3)
    with pytest.raises(InputError, match="was a Python object"):
        parse(as_operator(shrink).spec)


class Squared:
    """A nonlinear object with its own inverse."""

    def A(self, x):
        return x**2

    def A_dagger(self, y):
        return y.sqrt()


def test_a_nonlinear_object_may_bring_its_inverse():
    op, x = as_operator(Squared()), torch.full((1, 1, 2, 2), 3.0)
    assert torch.equal(op.A_dagger(op.A(x)), x)
    with pytest.raises(InputError, match="no A_adjoint"):
        op.A_adjoint(x)


def test_a_function_outside_torch_has_no_adjoint():
    op = as_operator(lambda x: torch.from_numpy(2 * x.detach().numpy()))
    with pytest.raises(InputError, match="cannot be differentiated"):
        op.A_adjoint(torch.zeros(1, 1, 4, 4))


# -- what follows from the structure --------------------------------------------------------------

MORE = ["colour:grey,channels=2", "colour:grey,channels=2|inpaint:random,keep=0.5"]
MORE += ["sr:average,factor=2|inpaint:random,keep=0.5", "blur:motion,length=4,angle=30"]
MORE += ["cs:structured,ratio=0.5", "mri:cartesian"]


@pytest.mark.parametrize("form", FORMS + MORE)
def test_orthogonal_rows_and_preconditioners_by_their_matrices(form):
    """The rows that measure, by A A^T; a preconditioner is symmetric and positive."""
    shape = (2, 4, 8)
    op = parse(form).bind([4], shape)
    a = dense(op, shape)
    if op.orthogonal_rows:
        product, measured = a @ a.T, (a != 0).any(1)
        wanted = torch.diag(measured.double() * op.gram)
        assert (product - wanted).abs().max() < 1e-12
    else:
        with pytest.raises(InputError, match="the rows of .* are not orthogonal"):
            op.gram  # noqa: B018
    gamma = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64)
    unit = torch.eye(a.shape[1], dtype=torch.float64).reshape(-1, *shape)
    m = op.preconditioner(unit[:1], gamma)(unit).flatten(1)
    assert (m - m.T).abs().max() < 1e-6 and torch.linalg.eigvalsh((m + m.T) / 2).min() > 0
    if form.startswith(("blur:gaussian", "blur:uniform")):  # exact; near the inverse elsewhere
        inverse = torch.linalg.inv(torch.eye(len(m)).double() + 3 * a.T @ a)
        assert (m - inverse).abs().max() < 1e-6


def test_a_singular_value_decomposition_of_small_images_serves_all():
    """That of a dense matrix is made once, and not where every image has its own operator."""
    x, blur = draw(2, 1, 4, 6), parse("blur:motion,length=4,angle=30").bind([0, 1], (1, 4, 6))
    assert blur.has_cheap_svd(x) and blur.svd(x).s is blur.svd(x[:1]).s
    assert not blur.has_cheap_svd(draw(1, 1, 64, 64))


@pytest.mark.parametrize("form", FORMS + MORE)
def test_expanded_images_are_taken(form):
    """Copies of one image that share its memory give what copies of their own give."""
    shape = (2, 4, 8)
    op = parse(form).bind([4] * 3, shape)
    x = draw(1, *shape).expand(3, *shape)
    y = op.A(x.clone())[:1].expand(3, *op.y_shape(shape))
    for apply, copies in ((op.A, x), (op.normal, x), (op.A_adjoint, y), (op.A_dagger, y)):
        assert torch.equal(apply(copies), apply(copies.clone()))
