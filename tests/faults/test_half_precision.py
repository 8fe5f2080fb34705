"""The physics runs in float32, whatever precision the networks run in."""

import pytest
import torch

from tests.cuda_like import CudaKernels
from tests.device_cases import BLUR, LEARNERS, OPERATORS, SIDE, SMALLEST, channels, images, smooth
from unmurk import devices
from unmurk.diffusion.networks import PRESETS
from unmurk.diffusion.prior import Prior
from unmurk.operators import parse
from unmurk.operators.registry import BUILT_IN
from unmurk.problem import Problem
from unmurk.solvers import METHODS as SOLVERS
from unmurk.solvers import configure, solve
from unmurk.training import Settings, learn


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", SMALLEST)


# -- half precision ------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "operator", "options"), LEARNERS)
def test_learning_in_bf16_takes_no_bf16_into_the_physics(tmp_path, method, operator, options):
    problem = Problem(operator, 0.1)
    given = images() if method == "clean" else problem.simulate(images())
    settings = Settings(kimg=0.04, batch=8, precision="bf16")
    with CudaKernels() as kernels:
        learn(given, problem, method, out=tmp_path, settings=settings, quiet=True, **options)
    assert kernels.met["special_ndtri"] or kernels.met["linalg_inv_ex"] or method == "ambientflow"
    if operator.endswith("reflect") or operator.startswith("sr:bicubic"):
        assert kernels.met["linalg_svd"] or kernels.met["fft_rfft2"]


def test_the_mode_sees_what_cuda_would_refuse():
    x = torch.rand(2, 1, 8, 8)
    with CudaKernels() as kernels:
        torch.fft.rfft2(x)
        with pytest.raises(RuntimeError, match="fft_rfft2_cuda.* not implemented for 'BFloat16'"):
            torch.fft.rfft2(x.bfloat16())
        with pytest.raises(RuntimeError, match="linalg_svd_cuda"):
            torch.linalg.svd(x.half())
        with torch.autocast("cpu"), pytest.raises(AssertionError, match="inside an autocast"):
            torch.fft.rfft2(x)
        assert torch.linalg.vector_norm(x.bfloat16()) > 0
    assert kernels.met == {"fft_rfft2": 3, "linalg_svd": 1}


def test_every_family_is_walked():
    walked = {part.split(",")[0] for text in OPERATORS for part in text.split("|")}
    assert walked == BUILT_IN - {"inpaint:file", "blur:file", "mri:file"}


@pytest.mark.parametrize("text", OPERATORS)
def test_operators_leave_an_autocast(text):
    """The caller's autocast changes no bit, and half precision comes in as float32."""
    operator = parse(text)
    x = images(2, channels=channels(text))
    bound = operator.bind(range(2), x.shape[1:])

    def maps() -> list[torch.Tensor]:
        y = bound.A(x)
        found = [y, bound.A_vjp(x, torch.ones_like(y))]
        if bound.linear:
            gamma = torch.tensor([0.5, 2.0])
            found += [bound.A_adjoint(y), bound.A_dagger(y), bound.prox_l2(x, y, gamma)]
            found += [bound.normal(x), bound.norm(x)]
        return found

    plain = maps()
    with torch.autocast("cpu", torch.bfloat16), CudaKernels():
        cast = maps()
        halved = bound.A(x.bfloat16())
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert halved.dtype == plain[0].dtype
    torch.testing.assert_close(halved, bound.A(x.bfloat16().float()))


@pytest.mark.parametrize("method", SOLVERS)
def test_solvers_use_a_callers_autocast_for_the_network_alone(method):
    """A network within `torch.autocast` runs in bf16; what the solver does does not."""
    network = torch.nn.Conv2d(1, 1, 1, bias=False)
    seen = []

    class Tiny(Prior):
        def denoise(self, x, sigma):
            with devices.networks(x.device), torch.no_grad():
                seen.append(network(x).dtype)
            return smooth(x, sigma)

    prior = Tiny.create("tiny", (1, SIDE, SIDE))
    problem = Problem(BLUR, 0.1)
    y = problem.simulate(images(2))
    steps = {"hrdis": 100, "diffpir": 5, "daps": 5}.get(method, 2)  # fewer would be refused
    few = {"steps": steps} if "steps" in configure(method, {}).__dataclass_fields__ else {}
    with torch.autocast("cpu", torch.bfloat16), CudaKernels():
        cast = solve(y, problem, prior, method, **few).mean
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    assert torch.equal(cast, solve(y, problem, prior, method, **few).mean)
    assert set(seen) == {torch.float32}
