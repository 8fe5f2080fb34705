"""Operators from outside: matrices of every kind, registered classes, entry points."""

import importlib.metadata
from typing import ClassVar

import numpy as np
import pytest
import torch

import unmurk
from unmurk import operators
from unmurk.bounds import Option, Real
from unmurk.errors import InputError
from unmurk.operators import FAMILIES, LinearMap, Matrix, Operator, as_operator, parse
from unmurk.problem import Problem

SHAPES = [(1, 4, 6), (3, 2, 4), (2, 12, 1)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


M = draw(15, 24)
M[7] = M[3]  # not of full rank


# -- matrices -------------------------------------------------------------------------------------


def scipy_map():
    linalg = pytest.importorskip("scipy.sparse.linalg")
    return linalg.aslinearoperator(M.numpy())


def scipy_sparse():
    return pytest.importorskip("scipy.sparse").csr_array(M.numpy())


MATRICES = {
    "tensor": lambda: M,
    "float32 tensor": lambda: M.float(),
    "array": lambda: M.numpy(),
    "sparse tensor": lambda: M.to_sparse(),
    "scipy LinearOperator": scipy_map,
    "scipy sparse": scipy_sparse,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", MATRICES)
def test_a_matrix_has_all_maps_for_any_image_shape(kind, shape):
    obj = MATRICES[kind]()
    m = M.float().double() if "float32" in kind else M
    op = unmurk.operator(obj, shape=shape)
    assert isinstance(op, LinearMap if "scipy" in kind else Matrix) and op.linear
    assert op.y_shape(shape) == (15,) and op.x_shape((15,)) == shape
    assert op.spec.endswith("15x24") and op == unmurk.operator(obj, shape=shape)
    x, z, y = draw(3, *shape), draw(3, *shape, seed=1), draw(3, 15, seed=2)
    torch.testing.assert_close(op.A(x), x.flatten(1) @ m.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(op.A_adjoint(y).flatten(1), y @ m, rtol=1e-12, atol=1e-12)
    # conjugate gradients stop at 1e-6 of the right-hand side
    pinv = torch.linalg.pinv(m)
    torch.testing.assert_close(op.A_dagger(y).flatten(1), y @ pinv.T, rtol=1e-5, atol=1e-5)
    gamma = torch.tensor([0.1, 1.0, 20.0]).double()
    found = op.prox_l2(z, y, gamma)
    for row in range(3):
        left = torch.eye(24).double() + gamma[row] * m.T @ m
        right = z[row].flatten() + gamma[row] * m.T @ y[row]
        exact = torch.linalg.solve(left, right)
        torch.testing.assert_close(found[row].flatten(), exact, rtol=1e-4, atol=1e-5)
    values = torch.linalg.svdvals(m)
    found = op.svd(x[:1]).s.flatten().sort(descending=True).values
    torch.testing.assert_close(found[:15], values, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(op.matrix(shape, x), m[None], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", MATRICES)
def test_a_matrix_is_part_of_a_problem_and_of_a_composition(kind):
    obj, shape = MATRICES[kind](), (1, 4, 6)
    problem = Problem(obj, 0.1, shape=shape)
    x = draw(2, *shape)
    y = problem.simulate(x, seed=1)
    assert y.shape == (2, 15) and y.dtype == torch.float64
    assert float(problem.residual(x, y).std()) < 0.2
    assert problem.prox(x, y, 0.3).dtype == torch.float64
    chain = operators.Compose(parse("blur:gaussian,sigma=1"), as_operator(obj, shape=shape))
    torch.testing.assert_close(chain.A(x), problem.A(chain.members[0].A(x)))
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(0.5 * problem.A(leaf).square().sum(), leaf, create_graph=True)
    torch.testing.assert_close(grad, problem.A_adjoint(problem.A(x)))
    (second,) = torch.autograd.grad(grad.square().sum() / 2, leaf)
    torch.testing.assert_close(second, problem.A_adjoint(problem.A(grad.detach())))


def test_a_matrix_is_copied():
    values = M.numpy().copy()
    op = as_operator(values, shape=(1, 4, 6))
    values[:] = 0
    assert op == as_operator(M)


def test_shapes_that_do_not_fit():
    for obj in (M, scipy_sparse()):
        with pytest.raises(InputError, match="is for images of 24 numbers"):
            as_operator(obj, shape=(1, 5, 5))
        with pytest.raises(InputError, match="give shape="):
            as_operator(obj).A_adjoint(torch.zeros(1, 15))
    for shape in ((24,), (0, 4, 6), (1, 2, 3, 4)):
        with pytest.raises(InputError, match="must be \\(channels, height, width\\)"):
            as_operator(M, shape=shape)
    with pytest.raises(InputError, match="use bind"):
        as_operator("identity", shape=(1, 4, 6))
    assert as_operator(lambda x: x[..., ::2], shape=(1, 4, 6)).x_shape((1, 4, 3)) == (1, 4, 6)


def test_maps_that_fail_say_so():
    linalg = pytest.importorskip("scipy.sparse.linalg")
    forward = linalg.LinearOperator((3, 4), matvec=lambda v: v[:3], dtype=float)
    op = as_operator(forward, shape=(1, 2, 2))
    assert torch.equal(op.A(torch.ones(1, 1, 2, 2)), torch.ones(1, 3))
    turned = as_operator(1j * scipy_sparse())
    for use in (
        lambda: op.A_adjoint(torch.ones(1, 3)),
        lambda: turned.A(torch.ones(1, 1, 4, 6)),
    ):
        with pytest.raises(InputError, match="a product with it or its transpose") as error:
            use()
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="holds real numbers"):
        as_operator(np.array([["a", {}]], object))


def test_objects_that_select_by_image_are_not_shared():
    """Each image has its own decomposition."""

    class Weights:
        def __init__(self, w):
            self.w = w

        def A(self, x):
            return self.w * x

        def A_adjoint(self, y):
            return self.w * y

        def index_select(self, rows):
            return Weights(self.w[list(rows)])

    w = torch.tensor([0.5, 2.0]).reshape(2, 1, 1, 1)
    op = as_operator(Weights(w)).bind([0, 1], (1, 2, 2))
    x = torch.ones(2, 1, 2, 2)
    assert not op.has_cheap_svd(x)
    assert torch.allclose(op.svd(x).s, torch.tensor([[0.5], [2.0]]).expand(2, 4))


# -- registered classes ---------------------------------------------------------------------------


class Gain(Operator):
    """y = factor x."""

    options: ClassVar[dict[str, Option]] = {"factor": Real(0.1, 10)}

    def __init__(self, factor):
        self._take_options(factor=factor)

    def _A(self, x):
        return self.factor * x

    def _A_adjoint(self, y):
        return self.factor * y


def test_a_registered_class_has_a_text_form(registries):
    assert operators.register("my-gain")(Gain) is Gain and FAMILIES["my-gain"] is Gain
    problem = Problem("my-gain,factor=2|sr:average,factor=2", 0.1)
    assert Problem.from_dict(problem.to_dict()) == problem
    op = parse("my-gain,factor=2")
    assert op.spec == "my-gain,factor=2" and parse(op.spec) == op
    x = draw(2, 1, 4, 4)
    assert torch.allclose(op.A_dagger(op.A(x)), x)
    with pytest.raises(InputError, match="factor must be a number from 0.1 to 10"):
        parse("my-gain,factor=11")
    with pytest.raises(InputError, match="needs the option factor"):
        parse("my-gain")
    with pytest.raises(InputError, match="known are .*my-gain"):
        parse("nothing")
    # a class that is defined again, in a notebook for example, replaces the former
    again = type("Gain", (Gain,), {"__module__": Gain.__module__, "__qualname__": "Gain"})
    operators.register("my-gain")(again)
    assert type(parse("my-gain,factor=2")) is again


def test_what_cannot_be_registered(registries):
    operators.register("my:gain")(Gain)
    for form in ("", "My-gain", "a b", "a|b", "a,b", "a:b:c", "python:", 3):
        with pytest.raises(InputError, match="the form of an operator"):
            operators.register(form)
    for form in ("identity", "blur:gaussian"):
        with pytest.raises(InputError, match="exists already"):
            operators.register(form)(Gain)
    with pytest.raises(InputError, match="exists already"):
        operators.register("my:gain")(type("Other", (Gain,), {}))
    with pytest.raises(InputError, match="register a class of Operator"):
        operators.register("other")(int)
    for family in (Gain, FAMILIES["blur:gaussian"]):
        with pytest.raises(InputError, match="already: register a subclass"):
            operators.register("other")(family)
    assert FAMILIES["blur:gaussian"].form == "blur:gaussian"
    with pytest.raises(TypeError):
        FAMILIES["other"] = Gain


def entry_points(monkeypatch, **values):
    points = [
        importlib.metadata.EntryPoint(name.replace("_", "-"), value, "unmurk.operators")
        for name, value in values.items()
    ]
    real = importlib.metadata.entry_points

    def found(**chosen):
        ours = chosen == {"group": "unmurk.operators"}
        return importlib.metadata.EntryPoints(points) if ours else real(**chosen)

    monkeypatch.setattr(importlib.metadata, "entry_points", found)


def test_entry_points_are_loaded_when_their_name_is_asked_for(registries, monkeypatch):
    entry_points(
        monkeypatch,
        a_gain=f"{__name__}:Gain",
        broken="no_such_package_anywhere:Gain",
        number=f"{__name__}:SHAPES",
    )
    assert parse("identity").spec == "identity"  # the broken one does not matter
    assert "a-gain" not in FAMILIES
    assert parse("a-gain,factor=3").factor == 3 and FAMILIES["a-gain"] is Gain
    with pytest.raises(InputError, match="cannot be loaded from no_such_package_anywhere") as e:
        parse("broken")
    assert "\n" not in str(e.value) and "No module named" in str(e.value)
    with pytest.raises(InputError, match="register a class of Operator"):
        parse("number")
    with pytest.raises(InputError, match="known are a-gain, .*broken"):
        parse("unknown")


def test_a_constructor_that_fails_is_one_line(registries):
    class Bad(Operator):
        def __init__(self):
            raise TypeError("1 + 'a'")

    operators.register("bad")(Bad)
    with pytest.raises(InputError, match="operator bad cannot be made: 1 \\+ 'a'"):
        parse("bad")
