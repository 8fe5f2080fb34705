"""
Optimization: RED-diff
======================

RED-diff optimizes one image for each measurement, with the denoiser as regularizer (Mardani et
al. 2023, arXiv 2305.04391). It is the default: one best image, no error bars.
"""

from pictures import show

import unmurk
from unmurk.evaluation.metrics import psnr

truth = unmurk.load_images("digits:test", limit=6).images
prior = unmurk.Prior.load("digits")

problem = unmurk.Problem("inpaint:box,size=10", noise=0.05)
y = problem.simulate(truth, seed=0)
result = unmurk.solve(y, problem, prior, method="red-diff")
print(f"PSNR {psnr(result.mean, truth).mean():.1f} dB, {result.nfe} evaluations")
show(measured=y, restored=result.mean, truth=truth)

# %%
# Fewer steps are faster and lose some decibels.
for steps in (10, 20, 50):
    result = unmurk.solve(y, problem, prior, method="red-diff", steps=steps)
    print(f"{steps} steps: PSNR {psnr(result.mean, truth).mean():.1f} dB")
