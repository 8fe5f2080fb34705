"""Noise in gray levels of a file and in electrons, against arithmetic by hand."""

import pytest

from unmurk.errors import InputError
from unmurk.io.scale import Scale
from unmurk.noise import as_noise
from unmurk.noise_units import in_units
from unmurk.problem import Problem


def test_units_are_those_of_the_file():
    """v = 100 + 4095 x: 12 gray levels are 12/4095; 2.1 electrons a level are 1/(2.1 4095)."""
    scale = Scale.of("uint16", (100, 4195))
    assert as_noise(in_units("12dn", scale)).sigma == pytest.approx(12 / 4095, rel=1e-5)
    noise = as_noise(in_units("poisson-gaussian,gain=2.1e/dn,read=3e,offset=120dn", scale))
    assert noise.gain == pytest.approx(1 / 2.1 / 4095, rel=1e-5)
    assert noise.sigma == pytest.approx(3 / 2.1 / 4095, rel=1e-5)
    assert noise.offset == pytest.approx(20 / 4095, rel=1e-5)
    two = as_noise(in_units("per-channel:12dn:poisson,gain=0.5dn", scale))
    assert two.models[0].sigma == pytest.approx(12 / 4095, rel=1e-5)
    assert two.models[1].gain == pytest.approx(0.5 / 4095, rel=1e-5)
    assert in_units("0.1", None) == "0.1"
    for text, said in {
        "12e": "needs a gain",
        "poisson,gain=3e": "electrons for each gray level",
        "gaussian,sigma=1.2.3dn": "write gray levels",
        "poisson,gain=0e/dn": "electrons for each gray level",
    }.items():
        with pytest.raises(InputError, match=said):
            in_units(text, scale)
    with pytest.raises(InputError, match="no file gives their range"):
        Problem("identity", "12dn")
