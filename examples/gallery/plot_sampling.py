"""
Posterior sampling: SNIPS and PnP-DM
====================================

SNIPS runs Langevin dynamics on the posterior of the noisy image. PnP-DM alternates a likelihood
step and a reverse diffusion. The standard deviation of their samples is an error bar: large where
the measurement says nothing.
"""

from pictures import show

import unmurk

truth = unmurk.load_images("digits:test", limit=6).images
prior = unmurk.Prior.load("digits")

problem = unmurk.Problem("inpaint:box,size=12", noise=0.05)
y = problem.simulate(truth[:3], seed=0)
for method, options in {"snips": {}, "pnp-dm": {"iterations": 40}}.items():
    result = unmurk.solve(y, problem, prior, method=method, samples=4, **options)
    print(f"{method} claims: {result.claims}")
    show(
        measured=y,
        one_sample=result.samples[0],
        another=result.samples[1],
        three_standard_deviations=3 * result.std,
    )
