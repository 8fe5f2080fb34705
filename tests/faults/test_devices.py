"""What would fail or crawl on a GPU: half precision in the physics, mixed devices, waiting."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from cuda_like import CudaKernels

from unmurk import devices
from unmurk.learn import Recipe, Rounds, Settings, learn
from unmurk.operators import FAMILIES, parse
from unmurk.operators.base import per_image
from unmurk.prior import Prior
from unmurk.problem import Problem
from unmurk.solve import METHODS as SOLVERS
from unmurk.solve import configure, solve
from unmurk.solve.draws import Draws

SIDE = 8
BLUR = "blur:gaussian,sigma=0.8"
MASK = "inpaint:random,keep=0.5"
SOON = Recipe(mean=0.3, polish=0.5, flow=0.7)  # every phase in a run of ten steps
CUT = Draws("diffpir", steps=2)

LEARNERS = [
    ("flowdiff", "identity", {"recipe": SOON}),
    ("flowdiff", MASK, {"recipe": SOON}),
    ("flowdiff", BLUR + ",pad=reflect", {"recipe": SOON, "solver": CUT}),
    ("flowdiff", "sr:bicubic,factor=2", {"recipe": SOON, "solver": CUT}),
    ("flowdiff", "identity", {"objective": "elbo"}),
    ("em", BLUR, {"rounds": Rounds(2, 8, 0.5, 2), "solver": CUT}),
    ("em", MASK, {"rounds": Rounds(2, 8, 0.5, 2), "e_step": "conditional"}),
    ("ambient", MASK, {}),
    ("sure", BLUR + ",pad=reflect", {}),
    ("sure", "identity", {}),
    ("ambientflow", BLUR, {}),
    ("noisy", BLUR, {}),
    ("clean", BLUR, {}),
]
OPERATORS = [
    "identity",
    MASK,
    "inpaint:box,size=3,seed=1",
    "inpaint:freeform,strokes=2,width=2",
    BLUR,
    BLUR + ",pad=reflect",
    "blur:uniform,size=3",
    "blur:anisotropic,sigma=1,ratio=0.5,angle=30",
    "blur:motion,length=3,angle=20",
    "sr:average,factor=2",
    "sr:bicubic,factor=2",
    "colour:grey",
    "cs:structured,ratio=0.5",
    "mri:cartesian,acceleration=2,channels=1",
    "ct:parallel,angles=6",
    "phase:fourier",
    "hdr:clip,factor=2",
    "blur:nonlinear,length=3",
    "quantise,bits=3",
    "jpeg,quality=20",
    BLUR + "|sr:average,factor=2",
    MASK + "|" + BLUR,
]


def images(n=8, channels=1):
    generator = torch.Generator().manual_seed(0)
    big = torch.rand(n, channels, 2 * SIDE, 2 * SIDE, generator=generator)
    return torch.nn.functional.avg_pool2d(big, 2)


def smooth(x, sigma):
    """A denoiser of few operations: towards the mean of the image."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * 0.04 / (0.04 + per_image(sigma, x) ** 2)


# -- half precision ------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "operator", "options"), LEARNERS)
def test_learning_in_bf16_takes_no_bf16_into_the_physics(tmp_path, method, operator, options):
    problem = Problem(operator, 0.1)
    given = images() if method == "clean" else problem.simulate(images())
    settings = Settings(kimg=0.08, batch=8, precision="bf16")
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
    assert walked == set(FAMILIES) - {"inpaint:file", "blur:file"}


@pytest.mark.parametrize("text", OPERATORS)
def test_operators_leave_an_autocast(text):
    """The caller's autocast changes no bit, and half precision comes in as float32."""
    operator = parse(text)
    x = images(2, channels=3 if text == "colour:grey" or text.startswith("jpeg") else 1)
    bound = operator.at(range(2), x.shape[1:])

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
    few = {"steps": 2} if "steps" in configure(method, {}).__dataclass_fields__ else {}
    with torch.autocast("cpu", torch.bfloat16), CudaKernels():
        cast = solve(y, problem, prior, method, **few).mean
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    assert torch.equal(cast, solve(y, problem, prior, method, **few).mean)
    assert set(seen) == {torch.float32}
