"""What learning takes and what it learns from: computed, bounded and looked at before a run."""

import math
import re

import numpy as np
import pytest
import torch

from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.io.datasets import Source
from unmurk.problem import Problem
from unmurk.training import Recipe, Rounds, Settings, learn, memory
from unmurk.training.flowdiff import FlowDiff
from unmurk.training.prior_first import BUFFER
from unmurk.training.replay import LIMIT, Replay, capacity, chunk_size

PROBLEM = Problem("identity", 0.2)
KIMG = "a number from 0.001 to 1e+07"
TINY = Settings(kimg=0.08, batch=8, precision="fp32")


@pytest.fixture
def y():
    clean = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return PROBLEM.simulate(clean)


# -- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [28, 512, 2048])
def test_a_buffer_is_bounded_in_bytes(side):
    shape = (1, side, side)
    rows = capacity(8192, shape)
    assert rows == min(8192, LIMIT // (2 * side * side)) and rows >= 32
    images = Replay(8192, shape).tensors["images"]
    assert len(images) == rows and images.nbytes <= LIMIT
    with torch.device("meta"):
        assert Replay(BUFFER, shape).tensors["images"].nbytes <= LIMIT


def test_one_image_larger_than_the_bound_is_still_held():
    assert capacity(8192, (3, 8192, 8192)) == 1


@pytest.mark.presets
def test_what_is_drawn_together_shrinks_with_the_images():
    prior = Prior.create("tiny", (1, 32, 32))
    assert prior.together(28 * 28) >= 256
    for pixels in (64**2, 512**2, 2048**2):
        assert prior.together(pixels) == max(1, 2**29 // (64 * 16 * pixels))
    assert chunk_size(prior) >= 4 * chunk_size(prior, solver=lambda *_: None)


def test_the_need_grows_with_batch_and_pixels_alone(y):
    learner = FlowDiff().build(y, PROBLEM, (1, 8, 8))
    small = memory.need(learner, TINY, (1, 8, 8), 12)
    more = memory.need(learner, Settings(kimg=0.08, batch=32, precision="fp32"), (1, 16, 24), 12)
    assert more.step == pytest.approx(4 * 6 * small.step, rel=1e-6)
    assert small.weights == 4 * sum(
        p.nbytes for m in learner.modules.values() for p in m.parameters()
    )
    assert small.buffer == sum(b.nbytes for b in learner.buffers.values())


def test_what_autograd_keeps_is_counted(y):
    """A step of the learner itself, held against the sum of its parts."""
    shape = (1, 32, 32)
    clean = torch.rand(8, *shape, generator=torch.Generator().manual_seed(0))
    y = PROBLEM.simulate(clean)
    learner = FlowDiff().build(y, PROBLEM, shape)
    found = {}

    def keep(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = learner.losses(y, torch.arange(8), 1.0, torch.Generator().manual_seed(0))
    kept = sum(tensor.untyped_storage().nbytes() for tensor in found.values())
    del losses
    weights = sum(p.nbytes for m in learner.modules.values() for p in m.parameters())
    step = memory.need(learner, Settings(batch=8, precision="fp32"), shape, 8).step
    assert step == pytest.approx(kept - weights, rel=0.15)


@pytest.mark.parametrize("free, hint", [(2**33, "a batch of"), (2**20, "a machine with more")])
def test_too_much_is_refused_in_one_line_that_names_what_counts(y, monkeypatch, free, hint):
    learner = FlowDiff().build(y, PROBLEM, (1, 8, 8))
    monkeypatch.setattr(memory, "available", lambda: free)
    settings, cpu = Settings(batch=32, precision="fp32"), torch.device("cpu")
    with pytest.raises(InputError) as caught:
        memory.check(learner, settings, (1, 512, 512), 10, cpu)
    text = str(caught.value)
    assert "\n" not in text and hint in text
    assert "batch 32, network tiny, images of 512x512" in text


def test_the_batch_that_is_named_fits(y, monkeypatch):
    learner, cpu = FlowDiff().build(y, PROBLEM, (1, 8, 8)), torch.device("cpu")
    monkeypatch.setattr(memory, "available", lambda: 8 * 2**30)
    with pytest.raises(InputError) as caught:
        memory.check(learner, Settings(batch=64, precision="fp32"), (1, 512, 512), 10, cpu)
    fits = int(str(caught.value).split("a batch of ")[1].split()[0])
    memory.check(learner, Settings(batch=fits, precision="fp32"), (1, 512, 512), 10, cpu)
    with pytest.raises(InputError):
        memory.check(learner, Settings(batch=fits + 1, precision="fp32"), (1, 512, 512), 10, cpu)


def test_a_run_that_does_not_fit_leaves_nothing(y, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "available", lambda: 1000)
    with pytest.raises(InputError, match="GiB are free"):
        learn(y, PROBLEM, out=tmp_path / "run", settings=TINY)
    assert not (tmp_path / "run").exists()
    assert "learning from 12 images of 8x8: about " in capsys.readouterr().err


def test_the_limits_of_a_container_count(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    monkeypatch.setattr(memory, "Path", lambda text: tmp_path if "cgroup" in text else tmp_path)
    assert memory._groups() == [350000]
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._groups() == []


def test_limits_of_the_process_count(monkeypatch):
    monkeypatch.setattr(memory.resource, "getrlimit", lambda _: (2**40, 2**40))
    size = memory._entries(memory.Path("/proc/self/status"), 1024)["VmSize"]
    assert memory._limit() == pytest.approx(2**40 - size, rel=0.01)
    assert memory.available() <= memory._machine()


# -- what is learnt from -------------------------------------------------------------------------


class Broken(Source):
    """Measurements of which one is not finite."""

    shape = (12, 1, 8, 8)

    def read(self, rows):
        y = torch.rand(len(rows), 1, 8, 8)
        for place, row in enumerate(rows):
            if row == 5:
                y[place, 0, 2, 2] = math.nan
        return y

    def fingerprint(self):
        return {"shape": list(self.shape)}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray])
def test_numbers_that_are_not_finite_are_named(y, tmp_path, value, kind):
    y = y.clone()
    y[7, 0, 1, 1] = value
    data = y if kind is torch.Tensor else y.numpy()
    with pytest.raises(InputError, match="(measurement|image number) 7 has values that are not"):
        learn(data, PROBLEM, out=tmp_path / "run", settings=TINY, quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_source_is_looked_at_as_it_is_read(tmp_path):
    with pytest.raises(InputError, match="image number 5 has values that are not finite"):
        learn(Broken(), PROBLEM, out=tmp_path / "run", settings=TINY, quiet=True)
    assert not (tmp_path / "run" / "prior").exists()


@pytest.mark.parametrize("kimg", [0.04, 0.16])
def test_a_run_without_a_finite_step_is_no_run(y, tmp_path, monkeypatch, kimg):
    """Fewer than ten steps never came to the count of ten that stops a run."""
    losses = FlowDiff.losses

    def not_finite(self, *args):
        return {key: value * math.nan for key, value in losses(self, *args).items()}

    monkeypatch.setattr(FlowDiff, "losses", not_finite)
    settings = Settings(kimg=kimg, batch=8, precision="fp32")
    for _ in range(2):  # again: the same
        with pytest.raises(InputError, match="losses are not finite; check the range"):
            learn(y, PROBLEM, out=tmp_path / "run", settings=settings, quiet=True)
        assert not (tmp_path / "run" / "prior").exists()


def test_a_budget_that_trains_no_prior_is_refused(y, tmp_path, capsys):
    short = Settings(kimg=0.008, batch=8, precision="fp32")
    with pytest.raises(InputError, match="is 1 steps, too few to train the prior"):
        learn(y, PROBLEM, out=tmp_path / "run", settings=short)
    assert not (tmp_path / "run").exists()
    few = Settings(network="tiny", kimg=0.032, batch=8, precision="fp32")  # the flow begins at 0.8
    learn(y, PROBLEM, out=tmp_path / "run", settings=few)
    assert "is 4 steps, too few to train all of the posterior" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, value, bounds",
    [(name, value, KIMG) for name, value in (("kimg", math.nan), ("kimg", math.inf), ("kimg", 0))]
    + [("rate", value, "a number from 1e-12 to 10") for value in (-1, math.nan, 11, "5e-3")]
    + [("average", -1, "a number from 0 to 1e+07"), ("average", math.inf, "a number from 0 to")]
    + [("batch", 1, "a whole number from 2 to 65536"), ("batch", 8.5, "a whole number from 2 to")]
    + [("seed", -1, "a whole number from 0 to 9223372036854775807")],
)
def test_settings_out_of_their_bounds(y, tmp_path, name, value, bounds):
    with pytest.raises(InputError, match=f"^{name} must be {re.escape(bounds)}.*got {value!r}$"):
        learn(y, PROBLEM, out=tmp_path / "run", quiet=True, **{name: value})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "make",
    [lambda: Recipe(r2r=1.2), lambda: Recipe(r2r=0.8, e_step=0.5), lambda: Recipe(buffer=0)]
    + [lambda: Recipe(alpha=0), lambda: Recipe(refresh=math.inf)]
    + [lambda: Recipe(hide=-0.1), lambda: Rounds(steps=0), lambda: Rounds(flow=2)],
)
def test_schedules_out_of_their_bounds(make):
    with pytest.raises(InputError, match=r"^(recipe|rounds)\."):
        make()


@pytest.mark.parametrize(
    "method, kind",
    [("flowdiff", "one image"), ("flowdiff", "blank"), ("em", "one image"), ("em", "constant")]
    + [("sure", "one image")],
)
def test_poor_data_is_learnt_from_without_a_crash(tmp_path, method, kind):
    count = 1 if kind == "one image" else 6
    level = {"one image": 0.4, "blank": 0.0, "constant": 0.7}[kind]
    clean = torch.full((count, 1, 8, 8), level)
    y = PROBLEM.simulate(clean) if kind == "one image" else clean
    prior, _ = learn(y, PROBLEM, method, out=tmp_path / "run", settings=TINY, quiet=True)
    assert all(p.isfinite().all() for p in prior.parameters())
