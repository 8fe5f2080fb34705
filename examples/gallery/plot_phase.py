"""
Phase retrieval: DDiff with restarts
====================================

The magnitude of the Fourier transform fixes an image up to a shift and a rotation by 180 degrees.
Restarts keep the run that fits best, and the prior chooses among the images that are symmetric to
it.
"""

from pictures import show

import unmurk

truth = unmurk.load_images("digits:test", limit=6).images
prior = unmurk.Prior.load("digits")

problem = unmurk.Problem("phase:fourier", noise=0.01)
y = problem.simulate(truth, seed=0)
result = unmurk.solve(y, problem, prior, method="auto")
print(f"{result.method}: {result.nfe} evaluations")
show(restored=result.mean, truth=truth)
