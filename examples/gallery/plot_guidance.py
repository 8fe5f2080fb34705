"""
Guidance: DPS, PiGDM, TMPD and MMPS
===================================

These solvers run the reverse diffusion and guide it by the gradient of a guess of p(y | x_t),
taken through the network. They differ in the guess: one that ignores the noise level (DPS), a
Gaussian of fixed width (PiGDM), the row sums of the covariance of the denoiser (TMPD), or that
covariance itself (MMPS).
"""

from pictures import show

import unmurk
from unmurk.evaluation.metrics import psnr

truth = unmurk.load_images("digits:test", limit=6).images
prior = unmurk.Prior.load("digits")

problem = unmurk.Problem("blur:gaussian,sigma=1.5", noise=0.05)
y = problem.simulate(truth, seed=0)
images = {"measured": y}
for method, options in {
    "dps": {"steps": 100},
    "pigdm": {},
    "tmpd": {"steps": 50},
    "mmps": {},
}.items():
    result = unmurk.solve(y, problem, prior, method=method, **options)
    images[method] = result.mean
    print(f"{method}: PSNR {psnr(result.mean, truth).mean():.1f} dB, {result.nfe} evaluations")
show(**images, truth=truth)
