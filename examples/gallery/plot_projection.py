"""
Projection and splitting: DDRM, DDNM+, DiffPIR, ProjDiff and DDiff
==================================================================

At every noise level these solvers denoise the image and then bring it into agreement with the
measurement: in the basis of the singular vectors (DDRM), by projection (DDNM+, ProjDiff), or by a
proximal step (DiffPIR, DDiff). None needs a gradient through the network.
"""

from pictures import show

import unmurk
from unmurk.evaluation.metrics import psnr

truth = unmurk.load_images("digits:test", limit=6).images
prior = unmurk.Prior.load("digits")

problem = unmurk.Problem("inpaint:random,keep=0.4", noise=0.05)
y = problem.simulate(truth, seed=0)
images = {"measured": y}
for method in ("ddrm", "ddnm", "diffpir", "projdiff", "ddiff"):
    result = unmurk.solve(y, problem, prior, method=method)
    images[method] = result.mean
    print(f"{method}: PSNR {psnr(result.mean, truth).mean():.1f} dB, {result.nfe} evaluations")
show(**images, truth=truth)
