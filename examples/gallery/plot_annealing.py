"""
Nonlinear operators: DAPS, HRDIS and FAST-DIPS
==============================================

These solvers need no linear operator. DAPS draws every noise level anew. FAST-DIPS searches the
image nearest to the denoised one that fits y. HRDIS optimizes one image with noise that follows
the prediction of the network.
"""

from pictures import show

import unmurk
from unmurk.evaluation.metrics import psnr

truth = unmurk.load_images("digits:test", limit=6).images
prior = unmurk.Prior.load("digits")

problem = unmurk.Problem("hdr:clip,factor=2", noise=0.05)
y = problem.simulate(truth, seed=0)
images = {"measured": y}
for method, options in {"daps": {}, "hrdis": {"init": y}, "fast-dips": {}}.items():
    result = unmurk.solve(y, problem, prior, method=method, **options)
    images[method] = result.mean
    print(f"{method}: PSNR {psnr(result.mean, truth).mean():.1f} dB, {result.nfe} evaluations")
show(**images, truth=truth)
