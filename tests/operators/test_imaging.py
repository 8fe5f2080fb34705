"""Compressed sensing, magnetic resonance and tomography, tested against explicit dense matrices,
clipped polygons and closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmurk.errors import InputError
from unmurk.evaluation.exact import GaussianPrior
from unmurk.operators import parse
from unmurk.operators.mri import sensitivities
from unmurk.problem import Problem
from unmurk.solvers import solve

FORMS = {  # channels of the image by text form
    "cs:structured,ratio=0.4,seed=2": 3,
    "mri:cartesian,acceleration=2": 2,
    "mri:cartesian,acceleration=2,channels=1,seed=1": 1,
    "mri:cartesian,acceleration=2,center=0.2,coils=6,channels=1": 1,
    "mri:cartesian,acceleration=2,center=0.3,coils=3": 2,
    "ct:parallel,angles=3,detectors=4": 1,
    "ct:parallel,angles=4": 3,
    "sr:average,factor=2|cs:structured,ratio=0.6": 2,
    "inpaint:random,keep=0.7|mri:cartesian,acceleration=2": 2,
    "sr:average,factor=2|ct:parallel,angles=3": 1,
}
INDEX = [4, 0, 9]
SIZES = [(6, 8), (8, 4)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(op, shape):
    """Return the matrix of an operator bound to one image, in double precision."""
    n = math.prod(shape)
    return op.A(torch.eye(n, dtype=torch.float64).reshape(n, *shape)).reshape(n, -1).T


def pair_rows(matrix):
    """Write a complex matrix (m, n) as a real matrix on real and imaginary parts."""
    return torch.cat(
        [torch.cat([matrix.real, -matrix.imag], 1), torch.cat([matrix.imag, matrix.real], 1)]
    )


# -- what all of them promise ---------------------------------------------------------------------

ANY = st.one_of(
    st.builds("cs:structured,ratio={},seed={}".format, st.floats(0.01, 1), st.integers(0, 99)),
    st.builds(
        "mri:cartesian,acceleration={},center={},coils={},channels={},seed={}".format,
        st.floats(1, 8),
        st.floats(0, 0.12),
        st.integers(1, 4),
        st.integers(1, 2),
        st.integers(0, 99),
    ),
    st.builds("ct:parallel,angles={}".format, st.integers(1, 12)),
    st.builds("ct:parallel,angles={},detectors={}".format, st.integers(1, 9), st.integers(1, 12)),
)


@settings(max_examples=120, deadline=None)
@given(
    form=ANY,
    colours=st.integers(1, 3),
    image=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    index=st.lists(st.integers(0, 1000), min_size=1, max_size=4),
)
def test_adjoint_shapes_and_text(form, colours, image, index):
    op = parse(form)
    assert parse(op.spec) == op and parse(op.spec).spec == op.spec
    shape = (getattr(op, "channels", colours), *image)
    op, x = op.bind(index, shape), draw(len(index), *shape)
    y = draw(*op.A(x).shape, seed=1)
    forward, back = (op.A(x) * y).sum(), (x * op.A_adjoint(y)).sum()
    assert abs(forward - back) <= 1e-5 * op.A(x).norm() * y.norm() + 1e-12
    assert op.A(x).shape[1:] == op.y_shape(shape) == op.y_shape(x.shape)
    assert op.x_shape(y.shape) == shape == op.x_shape(y.shape[1:])
    assert torch.equal(op.apply_mask(op.A(x)), op.A(x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES)
def test_prox_and_dagger_are_the_dense_solutions(form, size):
    shape, gamma = (FORMS[form], *size), torch.tensor([0.0, 0.7, 30.0])
    op, z = parse(form).bind(INDEX, shape), draw(3, *shape).double()
    op.dagger_iterations = 200  # conjugate gradients that are not stopped early
    y = draw(3, *op.y_shape(shape), seed=1).double()
    prox, dagger = op.prox_l2(z, y, gamma), op.A_dagger(y)
    assert torch.equal(prox[0], z[0])
    assert prox.dtype == dagger.dtype == op.A(z).dtype == torch.float64
    for row in range(3):
        a, g = dense(op.index_select([row]), shape), float(gamma[row])
        left = torch.eye(a.shape[1]) + g * a.T @ a
        right = z[row].flatten() + g * a.T @ y[row].flatten()
        solved = torch.linalg.solve(left, right).reshape(shape)
        assert (prox[row] - solved).norm() <= 1e-5 * solved.norm()
        expected = torch.linalg.pinv(a, rtol=1e-9) @ y[row].flatten()
        assert (dagger[row].flatten() - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("form", FORMS)
def test_results_do_not_depend_on_the_batch(form):
    shape, index = (FORMS[form], 6, 8), [3, 8, 1, 1, 6]
    whole, x = parse(form).bind(index, shape), draw(5, *shape)
    y = whole.A(x)
    dagger, prox = whole.A_dagger(y), whole.prox_l2(x.flip(0), y, 2.0)
    for rows in ([0], [2, 3, 4]):
        split = parse(form).bind([index[row] for row in rows], shape)
        for one in (split, whole.index_select(rows), whole.index_select(torch.tensor(rows))):
            assert torch.allclose(one.A(x[rows]), y[rows], atol=1e-6)
            assert torch.allclose(one.A_dagger(y[rows]), dagger[rows], atol=2e-5)
            found = one.prox_l2(x.flip(0)[rows], y[rows], 2.0)
            assert torch.allclose(found, prox[rows], atol=1e-5)
    assert torch.allclose(parse(form).A(x), parse(form).bind(range(5), shape).A(x), atol=1e-6)
    assert Problem.from_dict(Problem(form, 0.1).to_dict()) == Problem(form, 0.1)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_the_adjoint(form):
    shape = (FORMS[form], 6, 4)
    op, x = parse(form).bind([1, 2], shape), draw(2, *shape).requires_grad_()
    (grad,) = torch.autograd.grad(0.5 * op.A(x).square().sum(), x, create_graph=True)
    assert torch.allclose(grad, op.A_adjoint(op.A(x)), atol=1e-5)
    (second,) = torch.autograd.grad(0.5 * grad.square().sum(), x)
    assert torch.allclose(second, op.A_adjoint(op.A(grad)), atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_noise_is_where_something_is_measured(form):
    shape = (FORMS[form], 6, 8)
    problem, x = Problem(form, 0.2), 0.5 + 0.1 * draw(200, *shape)
    bound = problem.bind(range(200), shape)
    y = problem.simulate(x, seed=3)
    noise, held = y - bound.A(x), bound.operator.apply_mask(torch.ones_like(y)) > 0
    assert (noise[~held] == 0).all() and (y[~held] == 0).all()
    assert float(noise[held].std()) == pytest.approx(0.2, rel=0.03)
    assert bound.measurements(y).tolist() == held.flatten(1).sum(1).tolist()
    y[~held] = torch.nan
    for found in (bound.A_adjoint(y), bound.A_dagger(y), bound.prox(x, y, 0.3)):
        assert found.isfinite().all()


@pytest.mark.parametrize(
    "form",
    [
        "cs:structured,ratio=0.5",
        "mri:cartesian,acceleration=2,channels=1",
        "mri:cartesian,acceleration=2,coils=3",
        "ct:parallel,angles=5",
        "ct:parallel,angles=5,detectors=7",
        "blur:uniform,size=3,pad=circular|cs:structured,ratio=0.5",
    ],
)
def test_red_diff_reaches_the_exact_map(form):
    """At one noise level sg the optimum is the MAP of the Gaussian prior blurred by sg."""
    shape = (2 if "coils" in form else 1, 7, 8)
    prior = GaussianPrior.exponential(shape)
    problem, sg = Problem(form, 0.1), 0.2
    y = problem.simulate(prior.sample(2, seed=1).double(), seed=2)
    wide = prior.covariance + sg**2 * torch.eye(math.prod(shape))
    expected = GaussianPrior(prior.mean, wide).map(y, problem)
    found = solve(y, problem, prior, "red-diff", steps=150, sigma_max=sg, sigma_min=sg).mean
    assert float((found - expected).abs().max()) < 1e-4
    assert float((found - prior.mean).abs().max()) > 0.1  # y had a say


# -- compressed sensing ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 6, 8), (2, 5, 7), (1, 1, 9)])
@pytest.mark.parametrize("ratio", [0.001, 0.3, 1.0])
def test_sensing_matrix_is_signs_hartley_and_selection(shape, ratio):
    op = parse(f"cs:structured,ratio={ratio},seed=4").bind([7], shape)
    height, width = shape[1:]
    row, column = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double().T
    angle = 2 * math.pi * (row[:, None] * row / height + column[:, None] * column / width)
    hartley = (angle.cos() + angle.sin()) / math.sqrt(height * width)
    signs, kept = op.signs.flatten().double(), op.selected.flatten() > 0
    plane = kept[:, None] * hartley * signs
    a = dense(op, shape)
    torch.testing.assert_close(a, torch.block_diag(*[plane] * shape[0]))
    assert int(kept.sum()) == max(1, round(ratio * height * width))
    assert signs.abs().eq(1).all()
    values = torch.linalg.svdvals(a)
    some = shape[0] * int(kept.sum())
    torch.testing.assert_close(values[:some], torch.ones(some).double())
    assert (values[some:] < 1e-12).all()


def test_sensing_is_one_random_matrix_for_each_seed_and_size():
    form, shape = "cs:structured,ratio=0.25,seed={}", (1, 40, 50)
    one, other = (parse(form.format(seed)).bind([0, 5], shape) for seed in (0, 1))
    assert one == parse(form.format(0)).bind([8], shape)
    assert one.index_select([1, 1]) is one
    for name in ("signs", "selected"):
        a, b = getattr(one, name), getattr(other, name)
        agree = float((a == b).float().mean())
        assert agree == pytest.approx(0.5 if name == "signs" else 0.625, abs=0.05)
    assert abs(float(one.signs.mean())) < 0.07
    # the measurements of a flat image look like noise of the same power
    y = one.A(torch.full((1, *shape), 0.5))[one.selected > 0]
    assert float(y.square().mean()) == pytest.approx(0.25, rel=0.2)
    assert float(y.abs().max()) < 0.5 * 5


def test_sensing_of_a_large_image_is_its_own_inverse():
    op, x = parse("cs:structured,ratio=1").bind([0], (1, 256, 200)), draw(1, 1, 256, 200)
    assert torch.allclose(op.A_dagger(op.A(x)), x, atol=1e-5)
    part = parse("cs:structured,ratio=0.25").bind([0], (1, 256, 200))
    y = part.A(x)
    assert torch.allclose(part.A(part.A_adjoint(y)), y, atol=1e-5)
    assert part.count(y).tolist() == [12800]


# -- magnetic resonance ---------------------------------------------------------------------------


def centred_fourier(height, width):
    """Write the centered orthonormal transform as a matrix (H W, H W)."""
    axes = []
    for n in (height, width):
        place = torch.arange(n).double() - n // 2
        axes.append(torch.exp(-2j * math.pi * place[:, None] * place / n) / math.sqrt(n))
    return torch.kron(*axes)


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (3, 8)])
@pytest.mark.parametrize("coils", [1, 3])
@pytest.mark.parametrize("channels", [1, 2])
def test_mri_matrix_is_the_definition(size, coils, channels):
    form = f"mri:cartesian,acceleration=2,coils={coils},channels={channels}"
    shape = (channels, *size)
    op = parse(form).bind([3], shape)
    fourier, maps = centred_fourier(*size), op.maps[0].to(torch.complex128)
    rows = op.columns.flatten().repeat(size[0])[:, None]
    parts = [pair_rows(rows * fourier * s.flatten()) for s in maps]
    whole = torch.cat(parts)[:, : channels * math.prod(size)]
    torch.testing.assert_close(dense(op, shape), whole.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("width", [7, 8])
def test_mri_singular_values_of_one_coil(width):
    """They are 1 for complex images, and sqrt((m(k) + m(-k)) / 2) for real ones."""
    form = "mri:cartesian,acceleration=2,seed=2,channels={}"
    both = parse(form.format(2)).bind([7], (2, 3, width))
    values = torch.linalg.svdvals(dense(both, (2, 3, width)))
    columns = both.columns.flatten()
    expected = columns.repeat(6).double().sort(descending=True).values
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=0)
    frequency = {c - width // 2: float(m) for c, m in enumerate(columns)}
    symmetries = [frequency[k] + frequency.get(-k, frequency[k]) for k in frequency]
    expected = torch.tensor(symmetries * 3).double().div(2).sqrt().sort(descending=True).values
    real = parse(form.format(1)).bind([7], (1, 3, width))
    values = torch.linalg.svdvals(dense(real, (1, 3, width)))
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=0)
    assert 0 < float(values[values > 1e-6].min()) < 0.71  # some column came without its twin


def test_mri_columns_are_the_middle_and_random_others():
    shape = (2, 4, 100)
    op = parse("mri:cartesian,acceleration=4,center=0.08,seed=3").bind(range(300), shape)
    columns = op.columns[:, 0, 0]
    assert (columns[:, 46:54] == 1).all() and len(set(map(bytes, columns.byte().numpy()))) == 300
    # 25 are expected in all: each of the 92 other columns has probability 17 / 92
    assert float(columns.sum(1).mean()) == pytest.approx(25, abs=4 * math.sqrt(92 * 0.15 / 300))
    others = torch.cat([columns[:, :46], columns[:, 54:]], 1).mean(0)
    assert float((others - 17 / 92).abs().max()) < 4.5 * math.sqrt(0.15 / 300)
    again = parse("mri:cartesian,acceleration=4,center=0.08,seed=3").bind([7, 5], (2, 9, 100))
    assert torch.equal(again.columns[:, 0, 0], columns[[7, 5]])
    assert not torch.equal(
        parse("mri:cartesian,seed=4").bind([7], shape).columns, op.index_select([7]).columns
    )
    assert op.count(torch.zeros(300, 2, 4, 100)).tolist() == (8 * columns.sum(1)).tolist()
    few = parse("mri:cartesian,acceleration=8,center=0").bind(range(9), (2, 1, 5)).columns
    assert (few[..., 2] == 1).all()  # frequency zero at the least
    assert parse("mri:cartesian,acceleration=1,center=1").bind([0], (2, 3, 5)).columns.all()


def test_mri_sees_a_point_and_a_flat_image_as_theory_says():
    op = parse("mri:cartesian,acceleration=1").bind([0], (2, 6, 8))
    flat, point = torch.zeros(2, 1, 2, 6, 8)
    flat[:, 0], point[:, 1, 3, 4] = 1, 1
    spectrum = op.A(flat)
    assert spectrum[0, 0, 3, 4] == pytest.approx(math.sqrt(48))
    assert float(spectrum.abs().sum()) == pytest.approx(math.sqrt(48), abs=1e-4)
    # an imaginary point in the middle has a constant imaginary transform
    assert torch.allclose(op.A(point)[0, 1], torch.full((6, 8), 1 / math.sqrt(48)))
    assert op.A(point)[0, 0].abs().max() < 1e-6


def test_mri_coils_are_smooth_different_and_add_up_to_one():
    maps = sensitivities(8, 40, 64)[0]
    power = maps.abs().square()
    assert torch.allclose(power.sum(0), torch.ones(40, 64), atol=1e-6)
    assert float(maps.diff(dim=-1).abs().max()) < 0.1 > float(maps.diff(dim=-2).abs().max())
    assert torch.equal(sensitivities(1, 4, 5), torch.ones(1, 1, 4, 5, dtype=torch.complex64))
    # coil 0 is on the right and coil 2 above: there they are most sensitive
    down, across = torch.arange(40.0), torch.arange(64.0)
    for coil, (row, column) in {
        0: (19.5, 48),
        2: (10, 31.5),
        4: (19.5, 15),
        6: (29, 31.5),
    }.items():
        weight = power[coil] / power[coil].sum()
        assert float((weight.sum(1) * down).sum()) == pytest.approx(row, abs=3)
        assert float((weight.sum(0) * across).sum()) == pytest.approx(column, abs=6)
    # with full sampling A^T A = I for any number of coils
    op, x = (
        parse("mri:cartesian,acceleration=1,coils=8").bind([0], (2, 40, 64)),
        draw(1, 2, 40, 64),
    )
    assert torch.allclose(op.A_adjoint(op.A(x)), x, atol=1e-5)
    # several coils resolve the aliasing of missing columns
    blind = [parse(f"mri:cartesian,acceleration=2,coils={n}").bind([0], (2, 6, 8)) for n in (1, 6)]
    ranks = [int(torch.linalg.matrix_rank(dense(op, (2, 6, 8)), rtol=1e-6)) for op in blind]
    assert ranks[0] < ranks[1] == 96


# -- tomography -----------------------------------------------------------------------------------


def clipped(corners, normal, limit):
    """Return the part of a polygon where normal . p <= limit."""
    kept = []
    for p, q in zip(corners, corners[1:] + corners[:1], strict=True):
        a, b = limit - normal @ p, limit - normal @ q
        if a >= 0:
            kept.append(p)
        if a * b < 0:
            kept.append(p + a / (a - b) * (q - p))
    return kept


def area(corners):
    if len(corners) < 3:
        return 0.0
    x, y = np.array(corners).T
    return abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2


@pytest.mark.parametrize(
    ("size", "views", "bins"), [((3, 4), 5, None), ((4, 2), 4, 3), ((2, 2), 1, 6)]
)
def test_ct_matrix_is_the_area_of_pixels_in_strips(size, views, bins):
    form = f"ct:parallel,angles={views}" + (f",detectors={bins}" if bins else "")
    op = parse(form).bind([0], (1, *size))
    height, width = size
    bins = bins or math.ceil(math.hypot(height, width))
    assert op.y_shape((1, *size)) == (1, views, bins)
    a = dense(op, (1, *size)).reshape(views, bins, height, width).numpy()
    for k in range(views):
        # x to the right, y upwards
        turn = math.pi * k / views
        e = np.array([math.cos(turn), math.sin(turn)])
        for i in range(height):
            for j in range(width):
                x, y = j - width / 2, height / 2 - i
                square = [np.array(p) for p in ((x, y), (x + 1, y), (x + 1, y - 1), (x, y - 1))]
                for b in range(bins):
                    strip = clipped(clipped(square, e, b + 1 - bins / 2), -e, bins / 2 - b)
                    assert a[k, b, i, j] == pytest.approx(area(strip) / max(size), abs=1e-8)


def test_ct_views_along_the_axes_are_sums_of_columns_and_rows():
    x = torch.rand(2, 3, 6, 8, generator=torch.manual_seed(0)).double()
    y = parse("ct:parallel,angles=2").A(x)  # 10 bins, as even as the sides
    columns, rows = y[:, :, 0], y[:, :, 1]
    torch.testing.assert_close(columns[..., 1:9], x.sum(-2) / 8)
    torch.testing.assert_close(rows[..., 2:8], x.sum(-1).flip(-1) / 8)
    assert float(columns[..., [0, 9]].abs().max()) == 0
    # at every angle, the whole image is measured
    y = parse("ct:parallel,angles=7").A(x)
    torch.testing.assert_close(y.sum(-1), (x.sum((-1, -2)) / 8)[..., None].expand(-1, -1, 7))


def test_ct_of_a_disc_is_its_chord_from_every_side():
    n, radius = 96, 30.0
    place = (torch.arange(8 * n).double() + 0.5) / 8 - n / 2  # 8 x 8 points for each pixel
    inside = (place[:, None] ** 2 + place**2 <= radius**2).double()
    disc = inside.reshape(n, 8, n, 8).mean((1, 3))[None, None]
    y = parse("ct:parallel,angles=9").A(disc)[0, 0]
    t = torch.arange(y.shape[-1]).double() + 0.5 - y.shape[-1] / 2
    chord = 2 * (radius**2 - t.square()).clamp_min(0).sqrt() / n
    assert float((y - chord)[:, t.abs() < 0.9 * radius].abs().max()) < 0.01 * 2 * radius / n
    assert float(y[:, t.abs() > radius + 1.5].abs().max()) == 0
    # a line through a white square measures sqrt(2) at most, which the diagonal nearly reaches
    white = parse("ct:parallel,angles=4").A(torch.ones(1, 1, n, n))
    assert 0.98 * math.sqrt(2) < float(white.max()) < math.sqrt(2)
    assert torch.allclose(white[0, 0, 0, 30:-30], torch.ones(136 - 60), atol=1e-5)


def test_ct_pseudo_inverse_fits_clean_data_and_bounds_noise():
    place = torch.linspace(-1, 1, 48).double()
    x = torch.exp(-4 * ((place[:, None] - 0.2) ** 2 + place[:40] ** 2))
    x = (x + 0.5 * ((place[:, None].abs() < 0.5) & (place[:40] > 0.1)))[None, None]
    op = parse("ct:parallel,angles=40").bind([0], (1, 48, 40))
    for data, goal in ((x.float(), 1e-4), (x, 1e-4)):
        y = op.A(data)
        found = op.A_dagger(y)
        misfit = op.A_adjoint(op.A(found) - y).norm() / op.A_adjoint(y).norm()
        assert float(misfit) < goal
        assert float((found - data).square().mean().sqrt()) < 0.03
    noise = 0.01 * draw(1, *op.y_shape((1, 48, 40))).double()
    assert float(op.A_dagger(noise).square().mean().sqrt()) < 20 * 0.01


def test_ct_knows_square_images_and_asks_for_others():
    op = parse("ct:parallel,angles=5")
    for n in range(1, 300):
        assert op.x_shape(op.y_shape((3, n, n))) == (3, n, n)
    with pytest.raises(InputError, match="the size of the image behind 4 detectors is not known"):
        op.A_adjoint(torch.zeros(1, 1, 5, 4))
    with pytest.raises(InputError, match="bind it with bind"):
        parse("ct:parallel,detectors=14").x_shape((1, 60, 14))
    # the shape of the prior's images comes first
    prior = GaussianPrior.exponential((1, 4, 9))
    y = parse("ct:parallel,angles=5,detectors=8").A(prior.sample(2))
    found = solve(y, Problem("ct:parallel,angles=5,detectors=8", 0.1), prior, steps=2)
    assert found.mean.shape == (2, 1, 4, 9)


def test_ct_made_in_inference_mode_serves_training():
    x = draw(1, 1, 11, 13)
    with torch.inference_mode():
        parse("ct:parallel,angles=3").A(x)
    leaf = x.clone().requires_grad_()
    parse("ct:parallel,angles=3").A(leaf).sum().backward()
    # every view covers every pixel completely
    assert torch.allclose(leaf.grad, torch.full_like(x, 3 / 13), atol=1e-6)


# -- what cannot be read or does not fit ----------------------------------------------------------

BAD_FORMS = {
    "cs:structured": "needs the option ratio",
    "cs:structured,ratio=0": "ratio must be a number from 1e-06 to 1",
    "cs:structured,ratio=nan": "ratio must be a number from 1e-06 to 1",
    "cs:structured,ratio=0.5,seed=-1": "must be a whole number from 0 to 9223372036854775807",
    "cs:gaussian": "known are",
    "mri:cartesian,acceleration=0.5": "acceleration must be a number from 1 to 1024",
    "mri:cartesian,acceleration=inf": "acceleration must be a number from 1 to 1024",
    "mri:cartesian,acceleration=16": "center must be at most 1 / acceleration",
    "mri:cartesian,center=-0.1": "center must be a number from 0 to 1",
    "mri:cartesian,coils=0": "coils must be a whole number from 1 to 256",
    "mri:cartesian,channels=3": "channels must be a whole number from 1 to 2",
    "mri:cartesian,coils=two": "coils must be a whole number from 1 to 256",
    "mri:cartesian,seed=-1": "must be a whole number from 0 to 9223372036854775807",
    "ct:parallel,angles=0": "angles must be a whole number from 1 to 10000",
    "ct:parallel,detectors=0": "detectors must be a whole number from 1 to 65536",
    "ct:parallel,angles=1.5": "angles must be a whole number from 1 to 10000",
}


@pytest.mark.parametrize("form", BAD_FORMS)
def test_bad_text_forms(form):
    with pytest.raises(InputError) as error:
        parse(form)
    assert BAD_FORMS[form] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("use", "part"),
    [
        (lambda: parse("mri:cartesian").bind([0], (1, 4, 6)), "has 1 channels but channels=2"),
        (lambda: parse("mri:cartesian").A(torch.zeros(1, 3, 4, 6)), "complex images have 2, real"),
        (
            lambda: parse("mri:cartesian").bind([-1], (2, 4, 6)),
            "image numbers must be >= 0, got -1",
        ),
        (lambda: parse("mri:cartesian,coils=4").A_dagger(torch.zeros(1, 2, 4, 6)), "each coil, 8"),
        (
            lambda: parse("mri:cartesian").bind([0], (2, 4, 6)).A(torch.zeros(1, 2, 4, 5)),
            "bound to images of 4x6 but this one is 4x5",
        ),
        (
            lambda: parse("mri:cartesian").bind([0, 1], (2, 4, 6)).A(torch.zeros(3, 2, 4, 6)),
            "the columns of 2 images but the batch has 3",
        ),
        (
            lambda: parse("cs:structured,ratio=1").bind([0], (1, 4, 6)).A(torch.zeros(1, 1, 4, 5)),
            "the matrix is for images of 4x6 but this one is 4x5",
        ),
    ],
)
def test_what_does_not_fit(use, part):
    with pytest.raises(InputError) as error:
        use()
    assert part in str(error.value) and "\n" not in str(error.value)
