"""`unmurk demo`: the small demonstration."""

import io
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from unmurk.cli import demo
from unmurk.io.outputs import output
from unmurk.training import Recipe


@pytest.mark.pages
@pytest.mark.slow
def test_demo_small(tmp_path):
    """The whole demonstration at a toy size: its keys, and what is known whatever the networks."""
    recipe = Recipe(buffer=32)
    options = {"train": 64, "held_out": 8, "kimg": 0.3, "recipe": recipe, "steps": 4}
    options["nuclei"] = 0.1
    result = demo.run(tmp_path / "demo", **options)
    assert 12.5 < result["noisy"]["psnr"] < 14.5  # noise 0.3, clipped on the dark background
    for task in ("inpaint", "deblur"):
        assert math.isfinite(result["solved"][task]["psnr"])
        assert math.isfinite(result["solved"][task]["pseudo_inverse"]["psnr"])
    mean = sum(result["solved"][t]["ssim"] for t in ("inpaint", "deblur")) / 2
    assert result["solved"]["ssim"] == pytest.approx(mean)
    page = Path(result["report"]).read_text()
    assert {"Fill a hole", "Undo a blur", "Restore noisy nuclei"} <= set(
        re.findall(r"<h2>(.*?)</h2>", page)
    )
    assert page.count('type="range"') == 2 and "the noise that was there" in page
    assert 15 < result["nuclei"]["noisy"]["psnr"] < 17  # noise 0.2, clipped too
    for held in (result, result["nuclei"]):
        assert held["filtered"]["psnr"] > held["noisy"]["psnr"] + 3
    words = io.StringIO()
    Console(file=words, width=120).print(demo.table(result))
    assert f"{result['solved']['deblur']['psnr']:.2f}" in words.getvalue()


def test_a_run_with_a_state_stays(tmp_path):
    with pytest.raises(KeyboardInterrupt), output(tmp_path / "runs" / "a"):
        (tmp_path / "runs" / "a" / "state").mkdir(parents=True)
        (tmp_path / "runs" / "a" / "state" / "latest.pt").touch()
        raise KeyboardInterrupt
    assert (tmp_path / "runs" / "a" / "state" / "latest.pt").exists()
    with pytest.raises(KeyboardInterrupt), output(tmp_path / "runs" / "b"):
        (tmp_path / "runs" / "b").mkdir()
        raise KeyboardInterrupt
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["a"]
