"""Which device, what is said of it and of its memory, and what is moved there."""

import json
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from tests.device_cases import BLUR, MASK, PROBLEMS, SIDE, SMALLEST, images, smooth
from unmurk import devices, gaussian
from unmurk.cli.commands import evaluate
from unmurk.cli.data import place
from unmurk.cli.main import main
from unmurk.diffusion.networks import PRESETS
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.flows.posterior import Posterior
from unmurk.gaussian import Wiener
from unmurk.io import datasets
from unmurk.operators import parse
from unmurk.operators.masks import RandomInpaint
from unmurk.problem import Problem
from unmurk.solvers import solve
from unmurk.training import Settings, learn
from unmurk.training.distributed import lost
from unmurk.training.distributed import processes as learn_processes
from unmurk.training.learner import ProblemBinder
from unmurk.training.trainer import Trainer

learn_module = sys.modules["unmurk.training.run_folder"]


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", SMALLEST)


# -- which device, and what is said of it --------------------------------------------------------


def test_cuda_or_the_cpu_unless_another_is_asked_for(monkeypatch):
    """One function decides for commands and for `learn`; Apple's MPS is taken only on request."""
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *_: True)
    assert devices.default_device() == torch.device("cpu") == learn_processes().device
    assert place(torch.ones(1))[0].device.type == "cpu"
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "mps")
    assert devices.default_device() == torch.device("mps")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert devices.default_device() == torch.device("cpu")
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "gpu?")
    with pytest.raises(InputError, match="ACCELERATE_TORCH_DEVICE is 'gpu"):
        devices.default_device()
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert devices.default_device() == torch.device("cuda", 3)
    monkeypatch.setenv("LOCAL_RANK", "x")
    with pytest.raises(InputError, match="LOCAL_RANK=x: give a number of 0 or more"):
        devices.default_device()


def test_evaluate_works_where_the_other_commands_do(monkeypatch, tmp_path):
    """Its images and samples go through `place`."""
    placed = []
    monkeypatch.setattr(evaluate, "place", lambda *t: placed.append(len(t)) or list(t))
    np.save(tmp_path / "x.npy", images(4).repeat(1, 1, 2, 2).numpy())
    np.save(tmp_path / "s.npy", images(8).repeat(1, 1, 2, 2).view(2, 4, 1, 16, 16).numpy())
    x = tmp_path / "x.npy"
    evaluate.Evaluate(x, x, samples=tmp_path / "s.npy").run()
    assert placed == [2, 1]


def test_fp32_is_ieee_float32_while_we_compute():
    """TensorFloat-32 is off within, and afterwards as the caller had it."""

    def modes():
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    seen = []

    def denoiser(x, sigma):
        seen.append(modes())
        return smooth(x, sigma)

    before = modes()
    assert before[0]  # torch's own choice for convolutions
    problem = Problem(BLUR, 0.1)
    solve(problem.simulate(images(2)), problem, denoiser, "ddnm", steps=2)
    assert set(seen) == {(False, False)} and modes() == before
    with pytest.raises(ZeroDivisionError), devices.ieee_float32():
        raise ZeroDivisionError
    assert modes() == before


def test_a_folder_names_the_device_it_was_made_on(tmp_path, monkeypatch, capsys):
    problem = Problem("identity", 0.1)
    y, settings = problem.simulate(images()), Settings(kimg=0.016, batch=8, precision="fp32")
    learn(y, problem, "noisy", out=tmp_path, settings=settings, quiet=True)
    assert json.loads((tmp_path / "config.json").read_text())["versions"]["device"] == "cpu"
    assert "was started on" not in capsys.readouterr().err
    monkeypatch.setattr(learn_module, "device_kind", lambda device: "NVIDIA H200")
    learn(y, problem, "noisy", out=tmp_path, settings=settings, quiet=True)
    assert "was started on cpu and continues on NVIDIA H200" in capsys.readouterr().err


def test_restored_images_of_two_devices_do_not_mix(tmp_path, monkeypatch, capsys):
    """`restore` records the kind of device, and refuses a folder begun on another."""
    command = ["restore", f"{tmp_path}/in", "--prior", "digits", "--out", f"{tmp_path}/out"]
    noisy = (images(2).repeat(1, 1, 4, 4).clamp(0, 1) * 255).byte().numpy()[:, 0]
    (tmp_path / "in").mkdir()
    for name, pixels in zip("ab", noisy, strict=True):
        Image.fromarray(pixels).save(tmp_path / "in" / f"{name}.png")
    assert main([*command, "--noise", "0.1", "--samples", "2"]) == 0
    lines = map(json.loads, (tmp_path / "out" / "unmurk.jsonl").read_text().splitlines())
    made = [line["settings"]["device"] for line in lines if "settings" in line]
    assert made == ["cpu", "cpu"]
    monkeypatch.setattr(devices, "device_kind", lambda device: "NVIDIA H200")
    assert main([*command, "--noise", "0.1", "--samples", "2"]) == 2
    assert "made with another device" in capsys.readouterr().err


# -- memory that runs out ------------------------------------------------------------------------

FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


def failing(error):
    def fails(*_, **__):
        raise error

    return fails


@pytest.mark.parametrize("error", FULL, ids=["cuda", "cpu", "python"])
def test_memory_that_runs_out_is_said_so(tmp_path, monkeypatch, error):
    """While learning, solving, sampling and restoring: one line with batch, size and network."""
    problem = Problem("identity", 0.1)
    y = problem.simulate(images())
    where = "out of memory of the GPU" if error is FULL[0] else "out of memory"
    with pytest.raises(
        InputError, match=f"{where} with method ddnm on batches of 5 samples.*1x8x8"
    ):
        solve(y, problem, failing(error), "ddnm", batch=5)
    prior = Prior.create("tiny", (1, SIDE, SIDE))
    monkeypatch.setattr(prior.unet, "forward", failing(error))
    with pytest.raises(InputError, match=f"{where} with 3 images 1x8x8 drawn together"):
        prior.sample(3)
    flow = Posterior.create("tiny", (1, SIDE, SIDE))
    monkeypatch.setattr(flow.mean_net, "forward", failing(error))
    with pytest.raises(InputError, match=f"{where} with 8 measurements of images 1x8x8"):
        flow.mean_std(y, problem)
    settings = Settings(kimg=0.04, batch=8, precision="fp32")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", failing(error))
        said = f"{where} with a batch of 8 measurements 1x8x8 and the tiny networks"
        with pytest.raises(InputError, match=said):
            learn(y, problem, "clean", out=tmp_path, settings=settings, quiet=True)
    with monkeypatch.context() as patch:  # neither is the state called damaged
        patch.setattr(torch, "load", failing(error))
        with pytest.raises(InputError, match=where):
            learn(y, problem, "clean", out=tmp_path, settings=settings, quiet=True)


def test_memory_that_runs_out_is_no_lost_process():
    with pytest.raises(torch.OutOfMemoryError), lost():
        raise FULL[0]
    with pytest.raises(InputError, match="another process"), lost():
        raise RuntimeError("Connection closed by peer")
    for other in (RuntimeError("shape mismatch"), ValueError("out of memory")):
        assert not devices.out_of_memory(other)


def test_states_are_loaded_on_the_host(tmp_path, monkeypatch):
    """Two copies of the networks may not fit into a GPU."""
    problem, places, load = Problem("identity", 0.1), [], torch.load
    y, settings = problem.simulate(images()), Settings(kimg=0.016, batch=8, precision="fp32")
    learn(y, problem, "noisy", out=tmp_path, settings=settings, quiet=True)

    def noted(*args, **kwargs):
        places.append(kwargs["map_location"])
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", noted)
    learn(y, problem, "noisy", out=tmp_path, settings=settings, quiet=True)
    assert places == ["cpu"]


# -- the fits of the moment prior ----------------------------------------------------------------


def test_the_first_grey_is_fitted_where_channels_cannot_be_told_apart():
    """y = the mean of three channels: of all greys with that mean the one of smallest norm."""
    problem = Problem("colour:grey", 0.01)
    x = torch.full((4, 3, SIDE, SIDE), 0.25) + 0.5 * torch.eye(3)[0].view(3, 1, 1)
    model = Wiener((3, SIDE, SIDE))
    gaussian._first_guess(model, problem.A(x), problem, seed=0)
    expected = torch.full((3, SIDE, SIDE), 0.25 + 0.5 / 3)
    torch.testing.assert_close(model.mean, expected, atol=1e-6, rtol=0)


def test_a_fit_moves_the_images_of_a_round_alone(monkeypatch):
    """Of 4,000 images in memory no more than 64 at a time go to the device."""
    moved = []

    def noted(tensor, device):
        moved.append(len(tensor))
        return tensor.to(device)

    monkeypatch.setattr(gaussian, "host_to", noted)
    problem = Problem("identity", 0.1)
    y = problem.simulate(images(4000))
    gaussian.fit(y, problem, (1, SIDE, SIDE), rounds=1, values=0, device=torch.device("cpu"))
    assert moved == [64, 32, 32]


# -- bound once ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*PROBLEMS, "sr:bicubic,factor=2", BLUR + "|sr:average,factor=2"])
def test_what_an_operator_keeps_outlives_a_move_that_is_none(text):
    """`to` the device it is on is the operator itself, with its decompositions."""
    operator = parse(text)
    bound = operator.bind(range(2), (1, SIDE, SIDE))
    bound.svd(images(2))
    assert bound.to("cpu") is bound
    if text not in (MASK,):  # masks differ from image to image
        assert bound.bind(range(2), (1, SIDE, SIDE)) is bound
        assert bound.bind([7, 9], (1, SIDE, SIDE)).svd(images(2)) is bound.svd(images(2))


def test_masks_are_bound_by_the_thread_that_reads(monkeypatch):
    """The step finds them drawn, and they are those of the images' numbers bit for bit."""
    drawn, draw = [], RandomInpaint._draw
    own = threading.get_ident()

    def noted(self, index, height, width):
        drawn.append((threading.get_ident() == own, tuple(index)))
        return draw(self, index, height, width)

    monkeypatch.setattr(RandomInpaint, "_draw", noted)
    problem = Problem(MASK, 0.1)
    y = images(20)
    binding = ProblemBinder(problem, (1, SIDE, SIDE))

    def choose(step):
        return torch.arange(4) + 4 * step

    batches = datasets.Batches(y, choose, torch.device("cpu"), binding.prepare)
    found = []
    for step in range(3):
        rows, given = batches.batch_at(step)
        assert torch.equal(given, y[rows])
        found.append(binding.bind(rows, torch.device("cpu")).mask)
    batches.close()
    assert not any(here for here, _ in drawn)
    for step, mask in enumerate(found):
        numbers = choose(step).tolist()
        assert torch.equal(mask, problem.bind(numbers, (1, SIDE, SIDE)).mask)
