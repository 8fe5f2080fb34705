"""Double precision through every operator: types, the adjoint to 1e-10, and single precision."""

import numpy as np
import pytest
import torch

from unmurk.operators import Weighted, as_operator, parse
from unmurk.operators.base import CACHED
from unmurk.operators.registry import BUILT_IN
from unmurk.problem import Problem

FORMS = [
    "identity",
    "inpaint:random,keep=0.5",
    "inpaint:box,size=2",
    "inpaint:freeform,strokes=1,width=2",
    "blur:gaussian,sigma=1",
    "blur:gaussian,sigma=1,pad=circular",
    "blur:uniform,size=3",
    "blur:anisotropic,sigma=1,ratio=0.5,angle=30",
    "blur:anisotropic,sigma=1,ratio=0.5,angle=30,pad=circular",
    "blur:motion,length=4,angle=30",
    "sr:average,factor=2",
    "sr:bicubic,factor=2",
    "colour:grey",
    "cs:structured,ratio=0.5",
    "mri:cartesian,acceleration=2,channels=1",
    "mri:cartesian,acceleration=2,channels=2",
    "mri:cartesian,acceleration=2,coils=3",
    "ct:parallel,angles=6",
    "phase:fourier",
    "hdr:clip",
    "blur:nonlinear,length=3",
    "quantise,bits=3",
    "jpeg,quality=50",
    "blur:gaussian,sigma=1|sr:average,factor=2",
    "colour:grey|blur:motion,length=3,angle=20|ct:parallel,angles=4",
]
OTHERS = {
    "matrix": lambda: as_operator(torch.randn(9, 192, generator=torch.manual_seed(0))),
    "function": lambda: as_operator(lambda x: 2 * x[..., ::2] - x[..., 1::2]),
    "weighted blur": lambda: Weighted(
        parse("blur:gaussian,sigma=1"),
        0.5 + torch.rand(1, 3, 8, 8, generator=torch.manual_seed(1)),
    ),
    "weighted mask": lambda: Weighted(
        parse("inpaint:box,size=2").bind(range(2), (3, 8, 8)),
        0.5 + torch.rand(2, 3, 8, 8, generator=torch.manual_seed(1)),
    ),
}


def test_every_family_is_walked():
    walked = {part.split(",")[0] for form in FORMS for part in form.split("|")}
    assert walked | {"inpaint:file", "blur:file", "mri:file"} >= BUILT_IN


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "masks.npy", rng.random((2, 8, 8)) < 0.5)
    np.save(tmp_path / "kernels.npy", rng.random((2, 3, 5)))
    return [f"inpaint:file,path={tmp_path}/masks.npy", f"blur:file,path={tmp_path}/kernels.npy"]


def draw(*shape, seed=0):
    return 0.5 + 0.4 * torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def check(op, shape, noise=0.1):
    op = op.bind(range(2), shape)
    before = {name: value for name, value in vars(op).items() if name != "_cache"}
    x, z = draw(2, *shape), draw(2, *shape, seed=1)
    y = op.A(x)
    maps = {"A": y, "A_vjp": op.A_vjp(x, y), "mask": op.apply_mask(y)}
    if op.linear:
        v = op.apply_mask(draw(*y.shape, seed=2))
        back = op.A_adjoint(v)
        one, other = (y * v).sum(), (x * back).sum()
        assert abs(one - other) <= 1e-10 * y.norm() * v.norm()
        maps |= {"A_adjoint": back, "A_dagger": op.A_dagger(y), "normal": op.normal(x)}
        maps |= {"norm": op.norm(x)}
    if op.proximal:
        maps["prox_l2"] = op.prox_l2(z, y, torch.tensor([0.5, 20.0]))
        single = op.prox_l2(z.float(), y.float(), torch.tensor([0.5, 20.0]))
        assert single.dtype == torch.float32
    problem = Problem(op, noise)
    maps |= {"simulate": problem.simulate(x), "residual": problem.residual(x, y)}
    maps |= {"log_likelihood": problem.log_likelihood(x, y)}
    if op.linear:
        maps["prox"] = problem.prox(z, y, torch.tensor([0.1, 1.0]))
    assert {name: value.dtype for name, value in maps.items()} == dict.fromkeys(
        maps, torch.float64
    )
    assert all(bool(value.isfinite().all()) for value in maps.values())
    # operators are values: no call changes one
    after = {name: value for name, value in vars(op).items() if name != "_cache"}
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    single = op.A(x.float())
    assert single.dtype == torch.float32
    assert ((single - y).abs() > 1e-4).double().mean() < 0.05  # rounding may fall the other way


@pytest.mark.parametrize("form", FORMS)
def test_double_precision_stays(form):
    channels = 1 if "channels=1" in form else 2 if form.startswith("mri") else 3
    check(parse(form), (channels, 8, 8))


def test_double_precision_stays_with_files(files):
    for form in files:
        check(parse(form), (3, 8, 8))


@pytest.mark.parametrize("name", OTHERS)
def test_double_precision_stays_with_own_operators(name):
    check(OTHERS[name](), (3, 8, 8))


@pytest.mark.parametrize(
    "noise", [0.1, "poisson,gain=0.01", "poisson-gaussian,gain=0.01,sigma=0.02"]
)
def test_double_precision_stays_with_every_noise(noise):
    x = draw(2, 3, 8, 8).abs()
    problem = Problem("identity", noise)
    y = problem.simulate(x)
    assert y.dtype == problem.log_likelihood(x, y).dtype == torch.float64
    spread = problem.deviation(y)
    assert isinstance(spread, float) or spread.dtype == torch.float64


def test_caches_are_bounded_and_never_change_a_result():
    op = parse("blur:gaussian,sigma=1")
    for side in range(5, 5 + 2 * CACHED):
        x = draw(1, 1, side, 6)
        assert torch.equal(op.A(x), parse("blur:gaussian,sigma=1").A(x))
        assert len(op._cache) <= CACHED
    function = as_operator(lambda x: 2 * x)
    for side in range(1, 2 * CACHED):
        assert function.bind([0], (1, side, 2)).linear
    assert len(function._probed) <= CACHED


def test_a_torch_module_is_copied_to_another_device_and_stays_where_it_is():
    class Physics(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.ones(1))

        def A(self, x):
            return self.weight * x

    module = Physics()
    op = as_operator(module)
    assert op.to("cpu") is op
    moved = op.to("meta")
    assert op.to("meta").obj is moved.obj
    assert module.weight.device.type == "cpu" and moved.obj.weight.device.type == "meta"


def test_double_precision_is_used():
    """The product with a matrix is exact in double precision, not only in single precision."""
    m = torch.randn(5, 64, generator=torch.manual_seed(0), dtype=torch.float64)
    op, x = as_operator(m, shape=(1, 8, 8)), draw(1, 1, 8, 8)
    assert float((op.A(x)[0] - m @ x.flatten()).abs().max()) < 1e-13
