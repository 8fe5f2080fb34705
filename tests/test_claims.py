"""Every solver and every preset earns what it claims, on a few of the certification's problems.

Of few draws, so that figures may be off by 3.5 of their standard errors. `unmurk certify` is the
same on all problems, with all draws.
"""

import pytest

from unmurk.certify import BIAS, COVERAGE, LEVEL, POINT, SPREAD, certify, default_solvers
from unmurk.solve import configure

SOME = [
    ("gaussian", "inpaint:box,size=4", 0.3),
    ("mixture", "inpaint:random,keep=0.5", 0.3),
    ("mixture", "sr:average,factor=2", 0.05),
]
DRAWS = 64


@pytest.mark.parametrize("name", default_solvers())
def test_solver_earns_what_it_claims(name):
    options = dict(default_solvers()[name])
    claims = configure(options.pop("method", name), options).claims
    some = SOME[:1] if claims == "heuristic" else SOME  # which has only to run
    for row in certify({name: default_solvers()[name]}, draws=DRAWS, problems=some):
        assert row.error is None and row.evaluations > 0, row
        bias = {"posterior": BIAS, "point": POINT}.get(row.claims)
        if bias is not None:
            assert row.mean_error**2 < bias**2 + 3.5 * row.square_bar, row
        if row.claims == "posterior":
            for spread in (row.spread_observed, row.spread_unobserved):
                assert abs(spread - 1) < SPREAD + 3.5 * row.spread_bar, row
            assert abs(row.coverage - LEVEL) < COVERAGE + 0.02, row
