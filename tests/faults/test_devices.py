"""What would fail or crawl on a GPU: half precision in the physics, mixed devices, waiting."""

import sys
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from cuda_like import CUDA, CudaKernels, on_stand_in

from unmurk import devices
from unmurk.io import datasets
from unmurk.learn import METHODS, Recipe, Rounds, Settings, em, flowdiff, learn, loop
from unmurk.learn.loop import Trainer
from unmurk.learn.moments import fit
from unmurk.nets import PRESETS, Preset
from unmurk.operators import FAMILIES, parse
from unmurk.operators.base import per_image
from unmurk.prior import Prior
from unmurk.problem import Problem
from unmurk.solve import METHODS as SOLVERS
from unmurk.solve import configure, solve
from unmurk.solve.draws import Draws

SIDE = 8
SMALLEST = Preset((8, 8), 1, False, 8, 8, 1, 8)  # the networks' size plays no part here
BLUR = "blur:gaussian,sigma=0.8"
MASK = "inpaint:random,keep=0.5"
SOON = Recipe(mean=0.3, polish=0.5, flow=0.7, steps=4)  # every phase in a run of five steps
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


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", SMALLEST)


def images(n=8, channels=1):
    generator = torch.Generator().manual_seed(0)
    big = torch.rand(n, channels, 2 * SIDE, 2 * SIDE, generator=generator)
    return torch.nn.functional.avg_pool2d(big, 2)


def channels(operator):
    return 3 if operator.startswith(("colour", "jpeg")) else 1


def smooth(x, sigma):
    """A denoiser of few operations: towards the mean of the image."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * 0.04 / (0.04 + per_image(sigma, x) ** 2)


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
    assert walked == set(FAMILIES) - {"inpaint:file", "blur:file"}


@pytest.mark.parametrize("text", OPERATORS)
def test_operators_leave_an_autocast(text):
    """The caller's autocast changes no bit, and half precision comes in as float32."""
    operator = parse(text)
    x = images(2, channels=channels(text))
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


# -- a device of its own -------------------------------------------------------------------------


class OneProcess:
    """What `processes()` gives on the stand-in: accelerate knows no such device."""

    device, process_index, num_processes, is_main_process = CUDA, 0, 1, True

    def backward(self, loss):
        loss.backward()


class Inline(Executor):
    """A thread that is none: the stand-in is known to the thread that made it alone."""

    def __init__(self, workers):
        pass

    def submit(self, call, *args):
        done = Future()
        done.set_result(call(*args))
        return done


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(loop, "processes", OneProcess)
    monkeypatch.setattr(datasets, "ThreadPoolExecutor", Inline)
    with on_stand_in(monkeypatch) as device:
        yield device


def test_the_stand_in_forbids_mixing_and_counts_waits(stand_in):
    x, host = torch.ones(3, device=CUDA), torch.ones(3)
    assert x.device == CUDA and x.is_cuda and torch.zeros_like(x).device == CUDA
    assert torch.stack([x, 2 * x]).device == CUDA and x.cpu().device.type == "cpu"
    with pytest.raises(RuntimeError, match="same device"):
        x + host
    with pytest.raises(RuntimeError, match="same device"):
        torch.where(x > 0, x, host)
    assert torch.equal((x + torch.tensor(1.0)).cpu(), 2 * host)  # a number may be of the host
    stand_in.waits.clear()
    assert float(x.sum()) == 3 and bool((x > 0).all()) and x.tolist() == [1, 1, 1]
    assert x[x > 0].sum().item() == 3
    assert stand_in.waited == 5
    torch.linalg.inv(torch.eye(2, device=CUDA))
    assert stand_in.waits["_linalg_check_errors"] == 1
    w = torch.full((3,), 2.0, device=CUDA, requires_grad=True)
    (w**2).sum().backward()
    assert w.grad.cpu().tolist() == [4, 4, 4]


def trained(tmp_path, method, operator, options):
    """The losses of a run of five steps, and how often each of them waited for the device."""
    problem = Problem(operator, 0.1)
    given = images() if method == "clean" else problem.simulate(images())
    settings = Settings(kimg=0.04, batch=8, precision="fp32")
    torch.manual_seed(0)
    learner = METHODS[method](given, problem, (1, SIDE, SIDE), **options)
    trainer = Trainer(learner, given, settings, tmp_path, quiet=True)
    found = []
    while trainer.step < trainer.steps:
        learner.before(trainer, trainer.step, trainer.step / trainer.steps)
        found.append(trainer.update())
        trainer.step += 1
    trainer.batches.close()
    return found


ONE_EACH = [LEARNERS[i] for i in (0, 2, 6, 7, 8, 10, 11, 12)]


@pytest.mark.parametrize(("method", "operator", "options"), ONE_EACH)
def test_learning_mixes_no_devices_and_waits_once_a_step(
    tmp_path, monkeypatch, request, method, operator, options
):
    """The same losses on the stand-in, and one look at it a step: at the losses themselves.

    Conjugate gradients look at it every eighth step: 3 times in the 24 of a Wiener solution.
    """
    for module in (flowdiff, em):
        monkeypatch.setattr(module, "fit", partial(fit, rounds=1))
    expected = trained(tmp_path / "cpu", method, operator, options)
    device = request.getfixturevalue("stand_in")
    update, waits = Trainer.update, []

    def counted(trainer):
        device.waits.clear()
        losses = update(trainer)
        waits.append(device.waited)
        return losses

    monkeypatch.setattr(Trainer, "update", counted)
    found = trained(tmp_path / "gpu", method, operator, options)
    for a, b in zip(expected, found, strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    solves = method in ("flowdiff", "em") and operator != "identity"
    # what an operator keeps for later (small matrices) is made in one step of the first
    assert waits[-1] <= (4 if solves else 1) and sorted(waits)[2] <= (4 if solves else 1)


# -- solvers and operators on it -----------------------------------------------------------------

WAITS = {"snips": 4}  # a step: its polynomials; the others never
PROBLEMS = [BLUR + ",pad=reflect", MASK]


@pytest.mark.parametrize("operator", PROBLEMS)
@pytest.mark.parametrize("method", [name for name in SOLVERS if name != "pnp-dm"])
def test_solvers_mix_no_devices_and_hardly_wait(request, method, operator):
    """The same images on the stand-in, and no look at it in a step but where said."""
    problem = Problem(operator, 0.1)
    y = problem.simulate(images(2))
    expected = solve(y, problem, smooth, method, steps=5)
    device = request.getfixturevalue("stand_in")
    waits = {}
    for count in (2, 5):
        device.waits.clear()
        found = solve(y.to(CUDA), problem, smooth, method, steps=count)
        waits[count] = device.waited
    assert found.mean.device == CUDA and found.nfe == expected.nfe
    torch.testing.assert_close(found.mean.cpu(), expected.mean, rtol=1e-4, atol=1e-5)
    assert waits[5] - waits[2] <= 3 * WAITS.get(method, 0)


@pytest.mark.parametrize("text", [t for t in OPERATORS if not t.startswith("ct:")])
def test_operators_mix_no_devices(request, text):
    """Every map on the stand-in gives what it gives on the CPU."""
    operator, x = parse(text), images(2, channels=channels(text))

    def maps(device) -> list[torch.Tensor]:
        moved, given = operator.to(device).at(range(2), x.shape[1:]), x.to(device)
        y = moved.A(given)
        found = [y, moved.seen(y), moved.count(y), moved.A_vjp(given, torch.ones_like(y))]
        if moved.linear:
            gamma = torch.tensor([0.5, 2.0]).to(device)
            found += [moved.A_adjoint(y), moved.A_dagger(y), moved.prox_l2(given, y, gamma)]
            found += [moved.normal(given), moved.norm(given)]
        return found

    expected = maps(torch.device("cpu"))
    request.getfixturevalue("stand_in")
    for a, b in zip(expected, maps(CUDA), strict=True):
        assert b.device == CUDA
        torch.testing.assert_close(b.cpu(), a, rtol=1e-4, atol=1e-5)
