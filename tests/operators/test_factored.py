"""Kronecker products of small matrices: the closed forms that follow from their SVDs."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from unmurk.operators import parse

FACTORED = (
    *("blur:gaussian,sigma=1.5", "blur:uniform,size=5", "blur:motion,length=5,angle=90"),
    *("sr:bicubic,factor=2", "blur:gaussian,sigma=1|sr:average,factor=2"),
    "colour:grey|blur:gaussian,sigma=1",
)


@pytest.mark.parametrize("form", FACTORED)
@pytest.mark.parametrize("gamma", [1e-2, 1.0, 1e6])
def test_what_factors_has_its_prox_in_closed_form_however_far_the_data_are_trusted(form, gamma):
    shape = (3, 8, 12)
    z, op = draw(2, *shape).double(), parse(form)
    matrix = dense(op, shape)
    y = op.A(draw(2, *shape, seed=1).double())
    found = op.prox_l2(z, y, torch.tensor([gamma, gamma / 2]))
    eye = torch.eye(matrix.shape[1], dtype=torch.float64)
    for row, weight in enumerate((gamma, gamma / 2)):
        right = z[row].flatten() + weight * matrix.T @ y[row].flatten()
        exact = torch.linalg.solve(eye + weight * matrix.T @ matrix, right)
        # kernels are stored in single precision
        assert (found[row].flatten() - exact).norm() < 2e-5 * exact.norm()


@pytest.mark.parametrize("form", FACTORED)
def test_what_was_decomposed_in_inference_mode_serves_training(form):
    op = parse(form).bind([0], (3, 8, 12))
    with torch.inference_mode():
        x = draw(1, 3, 8, 12)
        op.prox_l2(x, op.A(x), 2.0)
    z = draw(1, 3, 8, 12).requires_grad_()
    y = op.A(draw(1, 3, 8, 12, seed=1))
    op.prox_l2(z, y, 2.0).square().sum().backward()
    step = 1e-2 * draw(1, 3, 8, 12, seed=2)
    ends = [op.prox_l2(z.detach() + s * step, y, 2.0).square().sum() for s in (1, -1)]
    assert abs(float((z.grad * step).sum() - (ends[0] - ends[1]) / 2)) < 1e-3


def test_other_kernels_are_not_answered_from_what_is_kept():
    first, z = parse("blur:gaussian,sigma=1").bind([0], (1, 8, 12)), draw(1, 1, 8, 12)
    first.prox_l2(z, z, 2.0)
    other = parse("blur:gaussian,sigma=2").bind([0], (1, 8, 12))
    changed = first._with(kernel=other.kernel)
    assert torch.equal(changed.prox_l2(z, z, 2.0), other.prox_l2(z, z, 2.0))


# -- bicubic reduction ----------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_bicubic_keeps_constants_and_ramps(factor):
    op, height, width = parse(f"sr:bicubic,factor={factor}"), 8 * factor, 9 * factor
    x = torch.full((1, 3, height, width), 0.7)
    assert torch.allclose(op.A(x), torch.full((1, 3, 8, 9), 0.7), atol=1e-6)
    ramp = 0.1 * torch.arange(height)[:, None] - 0.3 * torch.arange(width)
    y = op.A(ramp[None, None])[0, 0]
    centre = (torch.arange(9) + 0.5) * factor - 0.5
    expected = 0.1 * centre[:8, None] - 0.3 * centre
    assert torch.allclose(y[2:-2, 2:-2], expected[2:-2, 2:-2], atol=1e-5)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_bicubic_is_that_of_torch_in_the_interior(factor):
    x = torch.rand(2, 3, 9 * factor, 8 * factor, generator=torch.manual_seed(0))
    theirs = F.interpolate(x, (9, 8), mode="bicubic", antialias=True, align_corners=False)
    ours = parse(f"sr:bicubic,factor={factor}").A(x)
    assert torch.allclose(ours[..., 2:-2, 2:-2], theirs[..., 2:-2, 2:-2], atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 12), (1, 4, 4), (1, 16, 4)])
def test_bicubic_continues_by_reflection_with_the_edge_repeated(shape):
    x, op = draw(2, *shape), parse("sr:bicubic,factor=4")
    wide = np.pad(x.numpy(), ((0, 0), (0, 0), (16, 16), (16, 16)), mode="symmetric")
    inner = op.A(torch.from_numpy(wide))[..., 4:-4, 4:-4]
    assert torch.allclose(op.A(x), inner, atol=1e-6)


def test_bicubic_made_in_inference_mode_serves_training():
    x = draw(1, 1, 46, 22)
    with torch.inference_mode():
        parse("sr:bicubic,factor=2").A(x)
    leaf = x.clone().requires_grad_()
    parse("sr:bicubic,factor=2").A(leaf).sum().backward()
    assert float(leaf.grad.sum()) == pytest.approx(23 * 11, rel=1e-5)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(op, shape):
    """Return the matrix of an operator bound to one image, in double precision."""
    n = math.prod(shape)
    return op.A(torch.eye(n, dtype=torch.float64).reshape(n, *shape)).reshape(n, -1).T


def test_the_identity_is_decomposed_at_any_size():
    """Images too large for Kronecker factors: V = U = I and s = 1, without a matrix."""
    x = torch.rand(1, 1, 2, 1500, generator=torch.Generator().manual_seed(0))
    found = parse("identity").svd(x)
    assert torch.equal(found.out(found.s * found.into(x)), x)
    assert torch.equal(found.measured(x), x) and bool((found.s == 1).all())
