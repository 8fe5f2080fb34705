"""The figures of the generic model: against restoring by hand, and the page against figures."""

import json

import pytest
import torch

from benchmarks.captures import methods as filters
from benchmarks.generic import run as benchmark
from benchmarks.generic.run import Options
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.flows.posterior import Config, Posterior
from unmurk.io.images import load_images
from unmurk.problem import Problem


@pytest.fixture
def options(tmp_path):
    """A small untrained model in a folder, and where the results go."""
    torch.manual_seed(0)
    folder = tmp_path / "model"
    Prior.create("tiny", (1, 64, 64)).save(folder / "prior")
    config = Config(1, 64, 64, 8, 8, couplings=1, hidden=8, many_levels=1)
    posterior = Posterior(config, spread=0.01)
    with torch.no_grad():
        posterior.mean_net.head.bias.fill_(0.5)  # m(y) = y + sigma / 2
    posterior.save(folder / "posterior")
    (folder / "config.json").write_text(json.dumps({"method": "generic"}))
    return Options(out=tmp_path / "out", model=str(folder), images=3)


def decibel(x, clean):
    return (-10 * (x.clamp(0, 1) - clean).square().mean((1, 2, 3)).log10()).tolist()


def test_a_row_is_what_restoring_by_hand_gives(options):
    row = benchmark.denoising_row("nuclei", 0.1, options, model=True)
    clean = load_images("nuclei:val").images[[0, 49, 99]]
    y = Problem("identity", 0.1).simulate(clean)
    assert row["psnr"]["restore"] == pytest.approx(decibel(y + 0.05, clean), abs=1e-3)
    prior = Prior.load(options.model)
    with torch.no_grad():
        expected = decibel(prior.denoise(y, 0.1), clean)
    assert row["psnr"]["denoiser of the prior"] == pytest.approx(expected, abs=1e-3)
    assert len(list((options.folder / "pictures").rglob("*.png"))) == 1


def test_the_filters_remove_noise_and_leave_flat_images_flat():
    clean = torch.full((1, 3, 24, 24), 0.5)
    y = Problem("identity", 0.1).simulate(clean)
    x = filters.non_local_means(y, 0.1)
    assert x.shape == y.shape and (x - clean).square().mean() < 0.1 * (y - clean).square().mean()
    gray = filters.non_local_means(clean[:, :1], 0.1)
    torch.testing.assert_close(gray, clean[:, :1], atol=1e-6, rtol=0)


def test_the_middle_is_cut_out():
    x = torch.arange(35.0).reshape(1, 1, 5, 7)
    assert benchmark.middle(x, 3).tolist() == [[[[9, 10, 11], [16, 17, 18], [23, 24, 25]]]]
    assert benchmark.middle(x, 6).shape == (1, 1, 5, 6)


def test_finished_rows_are_kept_and_rows_of_other_weights_refused(options, monkeypatch):
    count = []

    def run(name, value, how):
        count.append(name)
        return {"set": name, "sigma": value, "psnr": {}}

    for _ in range(2):
        rows = benchmark.rows_of(options, [("nuclei", 0.1)], run, True)
        assert rows == [{"set": "nuclei", "sigma": 0.1, "psnr": {}}]
    assert count == ["nuclei"]
    Prior.create("tiny", (1, 64, 64)).save(options.model + "/prior")
    with pytest.raises(InputError, match="made with other settings"):
        benchmark.rows_of(options, [("nuclei", 0.1)], run, True)


def test_the_page_shows_means_and_differences():
    rows = [
        {"set": "a", "sigma": 0.1, "psnr": {"BM3D": [30.0, 32.0], "restore": [30.5, 30.5]}},
        {"set": "b", "sigma": 0.0, "psnr": {"BM3D": [20.0, 22.0], "restore": [21.5, 22.5]}},
    ]
    lines = benchmark.differences(rows, ["BM3D", "restore"])
    assert lines[2] == ["restore", "", "", "+0.25", "-0.50"]
    result = {"settings": {"profile": "denoising", "images": 2, "side": 64}, "rows": rows}
    shown = benchmark.view(result)
    assert "| b | its own | 21.00 | 22.00 |" in shown["table"]
    starts = [{"start": "none", "kimg": 2.0, "seconds": 41.6, "psnr": [38.0, 39.0]}]
    shown = benchmark.view({"settings": {"profile": "starts"}, "rows": starts})
    assert "| none | 2 | 42 | 38.50 |" in shown["table"]
    header = {
        "commit": "0",
        "date": "2000-01-01",
        "seed": 0,
        "software": {"torch": "2", "python": "3"},
    }
    header |= {"hardware": {"cpu": "one", "threads": 1, "gpu": None}, "command": "run"}
    page = benchmark.SUITE.render([result | header])
    assert "The generic model" in page and "+0.25" in page
