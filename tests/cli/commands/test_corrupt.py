"""`unmurk corrupt`: its numbers are those of `Problem.simulate`."""

import numpy as np
import torch

from tests.cli.calls import unmurk
from unmurk.problem import Problem


def test_corrupt_is_simulate(data, tmp_path, capsys):
    """The file holds A x + sigma n as `Problem.simulate` draws it, unclipped, float32."""
    out = tmp_path / "deep" / "y.npy"
    text = "blur:gaussian,sigma=1"
    assert unmurk("corrupt", data, "--operator", text, "--noise", 2, "--out", out) == 0
    expected = Problem(text, 2.0).simulate(torch.from_numpy(np.load(data))[:, None])
    written = np.load(out)
    assert written.dtype == np.float32
    np.testing.assert_array_equal(written.squeeze(), expected.numpy().squeeze())
    assert written.min() < -1 and written.max() > 2


def test_corrupt_to_a_folder_clips_to_eight_bits(data, tmp_path):
    from PIL import Image

    out = tmp_path / "folder"
    assert unmurk("corrupt", data, "--noise", "0.5", "--out", out) == 0
    files = sorted(out.glob("*.png"))
    assert len(files) == 5
    y = Problem("identity", 0.5).simulate(torch.from_numpy(np.load(data))[:, None])
    read = np.stack([np.asarray(Image.open(f)) for f in files])
    np.testing.assert_allclose(read / 255, y[:, 0].clamp(0, 1).numpy(), atol=0.5 / 255 + 1e-6)
