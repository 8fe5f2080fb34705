"""The measurements that a run keeps for its page: chosen to differ, and bound to their problem."""

import pytest
import torch

from unmurk.errors import InputError
from unmurk.io.captures import as_captures
from unmurk.io.crops import Crops
from unmurk.problem import Problem
from unmurk.training.examples import FILE, Examples, are_kept, choose_examples, distinct


def test_the_usual_image_comes_first_and_then_the_farthest():
    levels = torch.tensor([0.5, 0.5, 0.52, 0.48, 0.0, 1.0])
    images = levels.view(6, 1, 1, 1).expand(6, 1, 8, 8)
    assert set(distinct(images, 3)[1:]) == {4, 5}
    assert sorted(distinct(images, 9)) == list(range(6))
    assert distinct(images[:1], 4) == [0]


def test_whole_images_are_kept_with_their_numbers(tmp_path):
    problem = Problem("inpaint:random,keep=0.5", 0.1)
    x = torch.rand(10, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    y = problem.simulate(x, 0)
    kept = choose_examples(y, problem)
    assert len(kept.y) == 4 and len(set(kept.numbers)) == 4
    assert torch.equal(kept.y, y[list(kept.numbers)])
    kept.save(tmp_path)
    again = Examples.load(tmp_path)
    assert torch.equal(again.y, kept.y) and list(again.numbers) == list(kept.numbers)
    expected = problem.bind(kept.numbers, (1, 16, 16)).mask
    assert torch.equal(again.problem(problem).mask, expected)


@pytest.mark.parametrize("spec", ["identity", "inpaint:random,keep=0.5", "blur:gaussian,sigma=1"])
def test_parts_of_captures_know_their_place(spec, tmp_path):
    problem = Problem(spec, 0.05)
    draw = torch.Generator().manual_seed(0)
    clean = [0.1 * torch.rand(1, 1, 120, h, generator=draw) for h in (100, 140, 120)]
    for i, x in enumerate(clean):
        x[..., 40 + 8 * i : 90, 30:90] += torch.rand(1, 1, 50 - 8 * i, 60, generator=draw)
    y = [problem.simulate(x, 0, [i])[0] for i, x in enumerate(clean)]
    crops = Crops(as_captures(y), problem.operator, 64)
    choose_examples(crops, problem).save(tmp_path)
    kept = Examples.load(tmp_path)
    side = kept.y.shape[-1]
    assert side == (96 if spec == "identity" else 64) and len(kept.y) == 3
    bound = kept.problem(problem)
    for image, crop, number in zip(kept.y, kept.crops, kept.numbers, strict=True):
        rows, columns = slice(crop.top, crop.top + side), slice(crop.left, crop.left + side)
        assert torch.equal(image, y[number][:, rows, columns])
    x = torch.stack(
        [clean[c.number][0, :, c.top : c.top + side, c.left : c.left + side] for c in kept.crops]
    )
    residual = bound.residual(x, kept.y)
    assert float(residual.std()) == pytest.approx(
        0.05 * float((bound.measurements(kept.y).sum() / kept.y.numel()) ** 0.5), rel=0.05
    )


def test_missing_pixels_of_whole_images_stay_hidden(tmp_path):
    """The zeros in their places are no measurements: the residual is 0 there, whatever x is."""
    problem = Problem("inpaint:random,keep=0.5", 0.1)
    y = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    missing = {1: torch.tensor([0, 9]), 2: torch.tensor([63])}
    choose_examples(y, problem, missing).save(tmp_path)
    kept = Examples.load(tmp_path)
    mask = kept.problem(problem).mask
    plain = problem.bind(kept.numbers, (1, 8, 8)).mask.clone()
    for place, number in enumerate(kept.numbers):
        plain[place].view(-1)[missing.get(number, torch.tensor([], dtype=torch.long))] = 0
    assert sorted(kept.numbers) == [0, 1, 2] and torch.equal(mask, plain)
    alone = Examples(kept.y, kept.numbers, (), kept.hidden).problem(Problem("identity", 0.1))
    assert int((1 - alone.mask).sum()) == 3


def test_large_images_and_damaged_files(tmp_path):
    large = torch.zeros(1, 1, 2048, 1024)
    assert not are_kept(large) and are_kept(large[..., :1024, :512])
    with pytest.raises(InputError, match="larger than"):
        choose_examples(large, Problem("identity", 0.1))
    assert Examples.load(tmp_path) is None
    (tmp_path / FILE).write_bytes(b"not tensors")
    with pytest.raises(InputError, match="damaged"):
        Examples.load(tmp_path)
