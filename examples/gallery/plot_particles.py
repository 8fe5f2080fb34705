"""
Particles: TDS
==============

TDS sends a set of particles down the reverse diffusion and reweighs them, so that no guess biases
the samples (Wu et al. 2023, arXiv 2306.17775). Every sample costs as many evaluations as there are
particles and steps.
"""

from pictures import show

import unmurk

truth = unmurk.load_images("digits:test", limit=6).images
prior = unmurk.Prior.load("digits")

problem = unmurk.Problem("sr:average,factor=2", noise=0.1)
y = problem.simulate(truth[:1], seed=0)
result = unmurk.solve(y, problem, prior, method="tds", samples=6, particles=4, steps=20)
print(f"{result.nfe} evaluations for each sample")
show(measured=y, samples=result.samples[:, 0], truth=truth[:1])
