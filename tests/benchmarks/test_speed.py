"""Speed and streaming: what the scripts measure at a toy size."""

import numpy as np
import pytest
import torch

from benchmarks.speed import run as speed
from benchmarks.streaming import run as streaming
from unmurk.errors import InputError
from unmurk.io.images import load_images


def test_ratios_are_medians_over_blocks_in_turn():
    found = {"base": [10.0, 20.0, 40.0], "other": [20.0, 30.0, 20.0]}
    assert speed.speed_ratios(found, "base") == {"base": 1.0, "other": 1.5}
    order = []
    parties = {name: lambda name=name: order.append(name) for name in "ab"}
    options = speed.Options(blocks=2, seconds=0.0)
    assert [len(v) for v in speed.alternate(parties, 4, options).values()] == [2, 2]
    assert "".join(order) == "aabb" + "abab"  # once unseen, once to learn how long, then by turns


def test_both_sides_train_and_sample_the_same_network(monkeypatch, tmp_path):
    """Every party in a step or a draw; the network is evaluated as often by all of them."""
    monkeypatch.setattr(speed, "EVALUATIONS", 5)
    calls = []
    unet = type(speed.Prior.create("tiny", (1, 8, 8)).unet)
    forward = unet.forward
    monkeypatch.setattr(unet, "forward", lambda *a, **k: (calls.append(1), forward(*a, **k))[1])
    options = speed.Options(
        out=tmp_path, networks=("tiny",), side=8, batch=4, blocks=1, seconds=0.0
    )
    rows = speed.measure(options)["rows"]
    assert [row["party"] for row in rows if row["what"] == "sampling"][-1] == "unmurk"
    assert all(row["ratio"] > 0 for row in rows)
    assert rows[0]["ratio"] == 1 and rows[4]["ratio"] == 1
    assert len(calls) == 4 * 3 + 3 * 3 * 5  # parties x (unseen, timed, block) x evaluations
    assert speed.table(rows, "training").startswith(
        "|  | `tiny` |\n| --- | ---: |\n| diffusers, float"
    )


def test_a_step_of_ours_moves_the_prior_as_the_loop_does():
    step = speed.unmurk_step(torch.rand(8, 1, 8, 8), "tiny", "fp32", 4, False)
    trainer = step.__closure__[0].cell_contents
    before = [p.detach().clone() for p in trainer.learner.prior.parameters()]
    step()
    after = list(trainer.learner.prior.parameters())
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert trainer.step == 1 and sum(moved) > len(moved) / 2


def test_the_file_is_what_is_learnt_from(tmp_path):
    options = streaming.Options(images=40, side=8)
    streaming.write(tmp_path / "images.npy", options)
    array = np.load(tmp_path / "images.npy")
    assert array.shape == (40, 8, 8) and 100 < array.mean() < 155
    assert load_images(tmp_path / "images.npy").images.shape == (40, 1, 8, 8)
    how = {"out": tmp_path / "out", "folder_of_file": tmp_path}
    found = streaming.measure(
        streaming.Options(images=40, side=8, batch=4, blocks=1, seconds=0.0, **how)
    )
    assert found["ratios"]["held"] == 1 and set(found["ratios"]) == {
        "held",
        "file",
        "file, not cached",
    }
    assert 50 < found["peak_mib"] < 3072
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images.npy", "out"]
    with pytest.raises(InputError, match="fewer --images"):
        streaming.measure(streaming.Options(images=10**12, **how))
