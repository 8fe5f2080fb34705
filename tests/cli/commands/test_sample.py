"""`unmurk sample`: new images of a prior."""

import numpy as np

from tests.cli.calls import unmurk
from unmurk.diffusion.prior import Prior


def test_sample_writes_the_priors_images(trained, tmp_path):
    out = tmp_path / "new.npy"
    assert unmurk("sample", "--prior", trained, "--out", out, "-n", 3, "--steps", 3) == 0
    expected = Prior.load(trained).sample(3, steps=3, seed=0)
    np.testing.assert_allclose(np.load(out).squeeze(), expected[:, 0].numpy(), atol=1e-5)
