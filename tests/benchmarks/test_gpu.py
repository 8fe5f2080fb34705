"""What a GPU has to show, at toy size on a CPU: every piece runs, and a run goes on."""

import json

import pytest
import torch

from benchmarks.gpu import run as gpu
from unmurk.diffusion.networks import PRESETS, Preset
from unmurk.errors import InputError


@pytest.mark.slow
def test_every_piece_runs_at_toy_size_and_within_its_budget(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", Preset((8, 8), 1, False, 8, 8, 1, 8))
    monkeypatch.setattr(gpu.overhead, "COUNT", 2)
    monkeypatch.setattr(gpu.overhead, "STEPS", 2)
    monkeypatch.setattr(gpu.speed, "EVALUATIONS", 3)
    monkeypatch.setattr(gpu, "METHODS", {k: gpu.METHODS[k] for k in ("red-diff", "ddnm")})
    monkeypatch.setattr(
        gpu, "LEARNING", {k: gpu.LEARNING[k] for k in ("flowdiff, blur", "sure, blur")}
    )
    options = gpu.Options(toy=True, out=tmp_path)
    ticks = iter([0.0, *range(100, 400, 100), *[1000.0] * 99])  # four pieces, then it is spent
    gpu.measure(options, clock=lambda: next(ticks))
    first = json.loads((tmp_path / "gpu.json").read_text())["pieces"]
    assert list(first) == [name for name, _ in gpu.pieces(gpu.toy_sizes(options))][: len(first)]
    assert len(first) == 3
    found = gpu.measure(options)
    assert found == json.loads((tmp_path / "gpu.json").read_text())
    assert list(found["pieces"]) == [name for name, _ in gpu.pieces(gpu.toy_sizes(options))]
    assert {k: found["pieces"][k] for k in first} == first  # what was there is left as it was
    errors = {k: p["figures"] for k, p in found["pieces"].items() if "error" in p["figures"]}
    assert errors == {}
    assert found["pieces"]["training/tiny/unmurk, bf16"]["figures"]["images_per_second"] > 0
    assert found["pieces"]["largest/solving"]["figures"]["side"] == 32
    assert found["pieces"]["waits/ddnm"]["figures"] == {"waits": None}
    assert found["seed"] == 0 and found["device"] == "cpu"
    assert set(found["hardware"]) >= {"cpu", "gpu"}
    with pytest.raises(InputError, match="another seed"):
        gpu.measure(gpu.replace(options, seed=1))


def test_the_largest_image_is_the_last_that_fits(monkeypatch):
    """Doubled until memory runs out; another error is named."""
    tried = []

    def one(what, side, options):
        tried.append(side)
        if side > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "_one", one)
    found = gpu.largest("training", gpu.Options(side=16))
    assert tried == [16, 32, 64, 128] and (found["side"], found["ended"]) == (64, "memory")

    def broken(what, side, options):
        raise RuntimeError("shape mismatch\nmore")

    monkeypatch.setattr(gpu, "_one", broken)
    assert gpu.largest("training", gpu.Options())["ended"] == "shape mismatch more"
