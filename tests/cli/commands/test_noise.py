"""`unmurk noise`: mixed sizes, scenes, chosen channels, hidden pixels, and the text to paste."""

import numpy as np
import pytest
import tifffile

from tests.cli.calls import capture, numbers, unmurk
from unmurk.problem import Problem

SIZES = [(131, 96), (64, 150), (70, 71), (20, 120)]  # the last is smaller than a tile


@pytest.mark.parametrize("repeats", [1, 3])
def test_noise_of_images_of_several_sizes(repeats, tmp_path, capsys):
    """Sigma to 5 % from all images, also over time; a few of the pixels hold no measurement."""
    for i, size in enumerate(SIZES):
        for j in range(repeats):
            y = capture(size, 0.05, 10 * i + j)
            y[10:12, 40:60] = np.nan
            tifffile.imwrite(tmp_path / f"{i}-{j}.tif", y)
    more = ["--repeats", repeats] if repeats > 1 else []
    assert unmurk("noise", tmp_path, "--nan", "mask", "--json", *more) == 0
    found = numbers(capsys)
    assert found["images"] == len(SIZES) * repeats
    assert found["sigma"] == pytest.approx(0.05, rel=0.05)
    if repeats > 1:
        assert found["repeats"]["middle"]["sigma over time"] == pytest.approx(0.05, rel=0.05)
        (tmp_path / "3-2.tif").unlink()
        assert unmurk("noise", tmp_path, "--nan", "mask", *more) == 2
        assert "scenes of 3" in capsys.readouterr().err


@pytest.mark.parametrize("scenes", [1, 2])
def test_captures_of_different_scenes_are_noticed(scenes, tmp_path, capsys):
    """Two captures that differ by a step of 0.2, four times the noise, are not of one scene."""
    y = np.stack([capture((96, 96), 0.05, seed) for seed in range(4)])
    y[1::2] += 0.2 * (scenes - 1)
    np.save(tmp_path / "y.npy", y[:, None])
    assert unmurk("noise", tmp_path / "y.npy", "--repeats", 2) == 0
    assert ("are they of one scene" in capsys.readouterr().err) == (scenes == 2)


def test_noise_in_gray_levels_is_written_without_a_power_of_ten(tmp_path, capsys):
    """A noise of 0.05 of the 40000 levels between black and white is 2000 of them, to 5 %."""
    np.save(tmp_path / "y.npy", 40000 * capture((96, 96), 0.05, 0)[None, None])
    assert unmurk("noise", tmp_path / "y.npy", "--range", 0, 40000, "--json") == 0
    sigma, unit = numbers(capsys)["in gray levels"].removeprefix("sigma ").split()
    assert unit == "dn" and sigma.isdigit() and int(sigma) == pytest.approx(2000, rel=0.05)


def test_hidden_pixels_do_not_lower_the_noise_over_time(tmp_path, capsys):
    """A quarter of each image is not finite: counted as 0 it would give 0.043 in place of 0.05."""
    y = np.stack([capture((96, 96), 0.05, seed) for seed in range(6)])
    y[:, :48, :48] = np.nan
    tifffile.imwrite(tmp_path / "y.tif", y, photometric="minisblack")
    argv = ["noise", tmp_path / "y.tif", "--repeats", 3, "--nan", "mask", "--json"]
    assert unmurk(*argv) == 0
    over_time = numbers(capsys)["repeats"]
    assert over_time["middle"]["sigma over time"] == pytest.approx(0.05, rel=0.05)


def test_noise_of_a_chosen_channel(tmp_path, capsys):
    """Two channels with noise of 0.02 and 0.08: each is measured alone, in any order of axes."""
    y = [np.stack([capture((96, 80), s, 7 * t + c) for c, s in enumerate((0.02, 0.08))])
         for t in range(2)]  # fmt: skip
    np.save(tmp_path / "y.npy", np.stack(y).transpose(1, 2, 0, 3))  # C Y T X
    for channel, sigma in ((0, 0.02), (1, 0.08)):
        argv = ["noise", tmp_path / "y.npy", "--axes", "CYTX", "--channel", channel, "--json"]
        assert unmurk(*argv) == 0
        found = numbers(capsys)
        assert found["images"] == 2 and found["sigma"] == pytest.approx(sigma, rel=0.05)


def test_noise_of_images_without_a_measured_pixel_is_one_line(tmp_path, capsys):
    tifffile.imwrite(tmp_path / "y.tif", np.full((40, 50), np.nan, np.float32))
    assert unmurk("noise", tmp_path / "y.tif", "--nan", "mask") == 2
    said = capsys.readouterr().err.strip()
    assert "has no finite value" in said and "\n" not in said


def test_what_noise_prints_to_paste_says_that_no_model_fits(tmp_path, capsys):
    """Noise that is cut at black: the text to paste refers to the warning."""
    draw = np.random.default_rng(0)
    y = (0.02 + 0.1 * draw.standard_normal((6, 64, 64))).clip(0, 1).astype(np.float32)
    np.save(tmp_path / "y.npy", y)
    assert unmurk("noise", tmp_path / "y.npy") == 0
    shown = capsys.readouterr()
    assert "warning: the noise is clipped" in shown.err
    (paste,) = [line for line in shown.out.splitlines() if line.startswith("paste:")]
    assert paste.endswith("(the warning above says why it does not fit)")
    assert Problem("identity", paste.split()[2]).level > 0


def test_what_noise_prints_to_paste_has_the_options_that_were_given(tmp_path, capsys):
    """They decide what the number is of; a range given twice is the same noise twice as strong."""
    draw = np.random.default_rng(0)
    y = (1000 + 50 * draw.standard_normal((4, 64, 64))).astype(np.float32)
    np.save(tmp_path / "y.npy", y)
    assert unmurk("noise", tmp_path / "y.npy", "--range", 0, 4000, "--nan", "mask") == 0
    (paste,) = [s for s in capsys.readouterr().out.splitlines() if s.startswith("paste:")]
    words = paste.split()
    assert words[3:] == ["--range", "0", "4000", "--nan", "mask"]
    assert Problem("identity", words[2]).level == pytest.approx(50 / 4000, rel=0.05)
