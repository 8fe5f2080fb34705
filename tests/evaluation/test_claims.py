"""Every solver and every preset earns what it claims, on a few of the certification's problems.

Of few draws, so that figures may be off by 3.5 of their standard errors. `unmurk certify` is the
same on more problems, with all draws.
"""

import pytest

from unmurk.evaluation.certify import (
    BIAS,
    COVERAGE,
    LEVEL,
    POINT,
    SPREAD,
    certify,
    default_solvers,
)
from unmurk.solvers import configure

SOME = [
    ("gaussian", "inpaint:box,size=4", 0.3),
    ("gaussian", "inpaint:box,size=4", 0.02),
    ("mixture", "inpaint:random,keep=0.5", 0.3),
    ("gaussian", "blur:gaussian,sigma=1,pad=circular", 0.01),
    ("wavelet-wide", "sr:average,factor=2", 0.05),
]
DRAWS = 64


def claims(name):
    """What a solver says of itself."""
    options = dict(default_solvers()[name])
    return configure(options.pop("method", name), options).claims


CASES = [
    (problem, name)  # problem by problem: the exact answer of the last one is kept
    for problem in SOME
    for name in default_solvers()
    if problem == SOME[0] or claims(name) != "heuristic"  # which has only to run
]


@pytest.mark.parametrize(("problem", "name"), CASES)
def test_solver_earns_what_it_claims(problem, name):
    (row,) = certify({name: default_solvers()[name]}, draws=DRAWS, problems=[problem])
    assert row.error is None and row.evaluations > 0, row
    bias = {"posterior": BIAS, "point": POINT}.get(row.claims)
    if bias is not None:
        assert row.mean_error**2 < bias**2 + 3.5 * row.square_bar, row
    if row.claims == "posterior":
        for spread in (row.spread_observed, row.spread_unobserved):
            assert spread is None or abs(spread - 1) < SPREAD + 3.5 * row.spread_bar, row
        assert abs(row.coverage - LEVEL) < COVERAGE + 0.02, row
