"""What would fail or crawl on a GPU: mixed devices, and waiting for it."""

from concurrent.futures import Executor, Future
from functools import partial

import pytest
import torch

from tests.cuda_like import CUDA, on_stand_in
from tests.device_cases import (
    LEARNERS,
    OPERATORS,
    PROBLEMS,
    SIDE,
    SMALLEST,
    channels,
    images,
    smooth,
)
from unmurk.diffusion.networks import PRESETS
from unmurk.gaussian import fit
from unmurk.io import datasets
from unmurk.operators import parse
from unmurk.operators.base import conjugate_gradient
from unmurk.problem import Problem
from unmurk.rng import integers, lent
from unmurk.solvers import METHODS as SOLVERS
from unmurk.solvers import solve
from unmurk.training import METHODS, Settings, ambient, replay
from unmurk.training import learner as base
from unmurk.training import trainer as loop
from unmurk.training.trainer import Trainer


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", SMALLEST)


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
    monkeypatch.setattr(datasets, "reader", lambda: Inline(1))
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
    learner = METHODS[method](**options).build(given, problem, (1, SIDE, SIDE))
    trainer = Trainer(learner, given, settings, tmp_path, quiet=True)
    learner.initialize(trainer.device)
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
    # on a GPU rows of a buffer are drawn on the host
    for module in (replay, ambient):
        monkeypatch.setattr(module, "host_integers", lambda n, s, g: integers(n, s, lent(g)))
    monkeypatch.setattr(base, "fit", partial(fit, rounds=1))
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
# enough for a result that is not refused (`unmurk.checks`): hrdis moves 0.05 a step at most
COUNTS = {"hrdis": (100, 125), "diffpir": (5, 8), "daps": (5, 8)}


@pytest.mark.parametrize("operator", PROBLEMS)
@pytest.mark.parametrize("method", [name for name in SOLVERS if name != "pnp-dm"])
def test_solvers_mix_no_devices_and_hardly_wait(request, method, operator):
    """The same images on the stand-in, and no look at it in a step but where said."""
    problem = Problem(operator, 0.1)
    y = problem.simulate(images(2))
    few, many = COUNTS.get(method, (2, 5))
    expected = solve(y, problem, smooth, method, steps=many)
    device = request.getfixturevalue("stand_in")
    waits = {}
    for count in (few, many):
        device.waits.clear()
        found = solve(y.to(CUDA), problem, smooth, method, steps=count)
        waits[count] = device.waited
    assert found.mean.device == CUDA and found.nfe == expected.nfe
    torch.testing.assert_close(found.mean.cpu(), expected.mean, rtol=1e-4, atol=1e-5)
    assert waits[many] - waits[few] <= (many - few) * WAITS.get(method, 0)


@pytest.mark.parametrize("text", [t for t in OPERATORS if not t.startswith("ct:")])
def test_operators_mix_no_devices(request, text):
    """Every map on the stand-in gives what it gives on the CPU."""
    operator, x = parse(text), images(2, channels=channels(text))

    def maps(device) -> list[torch.Tensor]:
        moved, given = operator.to(device).bind(range(2), x.shape[1:]), x.to(device)
        y = moved.A(given)
        found = [y, moved.apply_mask(y), moved.count(y), moved.A_vjp(given, torch.ones_like(y))]
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


def test_conjugate_gradients_look_every_eighth_step_and_find_the_same(request):
    """Images that are done stay as they are, to the last bit, until the others are."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 12, 12, generator=generator)
    matrix = (
        root @ root.mT / 12
        + torch.eye(12) * torch.tensor([10.0, 1, 0.3, 0.1, 3, 1])[:, None, None]
    )
    b = torch.randn(6, 12, generator=generator)

    def apply(x):
        return (matrix.to(x.device) @ x[..., None])[..., 0]

    expected = conjugate_gradient(apply, b)
    torch.testing.assert_close(expected, torch.linalg.solve(matrix, b), rtol=1e-4, atol=1e-4)
    device = request.getfixturevalue("stand_in")
    given = b.to(CUDA)
    held = matrix.to(CUDA)
    device.waits.clear()
    found = conjugate_gradient(lambda x: (held @ x[..., None])[..., 0], given)
    assert torch.equal(found.cpu(), expected)
    assert device.waited <= 3  # of some 15 steps
