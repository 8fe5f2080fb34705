"""The benchmark of choosing weights: its rules by hand, its figures against an oracle's own."""

import pytest

from benchmarks.choice import run as benchmark
from tests.benchmarks.test_common import header
from tests.benchmarks.test_learn import data  # noqa: F401, a fixture
from unmurk.errors import InputError


def check(share, elbo, distance, chi2, posterior, denoiser, swd):
    held = {"elbo'": -elbo, "measurement_swd'": distance}
    oracle = {"posterior": posterior, "denoiser": denoiser, "swd": swd}
    return (
        {"share": share, "elbo": elbo, "measurement_swd": distance, "chi2": chi2} | held | oracle
    )


CHECKS = [
    check(0.5, elbo=1.0, distance=0.1, chi2=0.2, posterior=20.0, denoiser=25.0, swd=3.0),
    check(0.8, elbo=3.0, distance=0.2, chi2=1.2, posterior=24.0, denoiser=24.0, swd=2.0),
    check(1.0, elbo=2.0, distance=0.3, chi2=0.9, posterior=23.0, denoiser=23.5, swd=2.5),
]


def test_regrets_by_hand():
    found = benchmark.regrets(CHECKS)
    shares = {rule: row["share"] for rule, row in found.items()}
    assert shares == {
        "last": 1.0, "ELBO": 0.8, "ELBO'": 0.5, "measurement SWD": 0.5, "measurement SWD'": 0.5,
    "chi-square": 1.0, }  # fmt: skip
    assert found["last"] == {"share": 1.0, "posterior": 1.0, "denoiser": 1.5, "swd": 0.5}
    assert found["ELBO"] == {"share": 0.8, "posterior": 0.0, "denoiser": 1.0, "swd": 0.0}
    assert found["measurement SWD"] == {
        "share": 0.5,
        "posterior": 4.0,
        "denoiser": 0.0,
        "swd": 1.0,
    }


@pytest.mark.slow
def test_a_run_is_watched_and_not_made_again(data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(benchmark, "SHARES", (0.5, 1.0))
    how = benchmark.Options(
        data=data, out=tmp_path, profile="toy", rows=("noisy",), amounts=("500",)
    )
    benchmark.run("noisy", "500", how)  # measure has a process of its own for each
    result = benchmark.measure(how)
    (checks,) = result["runs"].values()
    assert [c["share"] for c in checks] == [0.5, 1.0]
    keys = {
        "elbo",
        "elbo'",
        "measurement_swd",
        "measurement_swd'",
        "chi2",
        "posterior",
        "denoiser",
        "swd",
    }
    assert all(keys <= set(c) for c in checks)
    assert all(abs(c["denoiser"]) < 60 and c["swd"] > 0 for c in checks)
    stamp = (tmp_path / "noisy-500.json").stat().st_mtime_ns
    assert benchmark.measure(how) == result
    assert (tmp_path / "noisy-500.json").stat().st_mtime_ns == stamp
    other = benchmark.replace(how, seed=1)
    with pytest.raises(InputError, match="other settings"):
        benchmark.measure(other)
    with pytest.raises(InputError, match="give --out OUT"):
        benchmark.measure(benchmark.Options())
    with pytest.raises(InputError, match="give --data"):
        benchmark.run("noisy", "500", benchmark.Options(out=tmp_path))


def test_the_page_is_made_of_the_figures():
    runs = {"em-500": CHECKS, "sure-500": CHECKS[::-1]}
    text = benchmark.SUITE.render([header({"profile": "small"}) | {"runs": runs}])
    assert "| measurement SWD | 4.00, 4.00 | 0.00, 0.00 | 1.00, 1.00 |" in text
    assert (
        "| `sure` | 0.8 | 24.00 | 24.00 | 2.00 | 3.000 | -3.000 | 0.2000 | 0.2000 | 1.200 |"
        in text
    )
    assert "ELBO' at the end is that of `sure` (20.00 dB)" in benchmark.across_methods(
        {"sure-500": [CHECKS[0] | {"elbo'": 9.0}], "em-500": [CHECKS[1]]}
    )
    assert "c0ffee" in text and "### 20,000 images" not in text
