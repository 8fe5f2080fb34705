"""
Learning: SURE-Score
====================

A denoiser is trained with Stein's unbiased estimate of its error, and the score is learned from
what it denoises (arXiv 2305.01166).
"""

from pictures import show

import unmurk
from unmurk.evaluation.metrics import psnr

clean = unmurk.load_images("digits", limit=2000).images
problem = unmurk.Problem("identity", noise=0.3)
y = problem.simulate(clean, seed=0)
prior, posterior = unmurk.learn(
    y, problem, method="sure", out="runs/gallery-sure", kimg=5, quiet=True
)

# %%
# Held-out digits, restored in one pass, and new ones drawn from the prior. The run is short; the
# guide says which budgets give good results.
truth = unmurk.load_images("digits:test", limit=6).images
measured = problem.simulate(truth, seed=1)
mean, std = posterior.mean_std(measured, problem)
print(f"restored: PSNR {psnr(mean, truth).mean():.1f} dB")
show(
    measured=measured,
    restored=mean,
    four_standard_deviations=4 * std,
    truth=truth,
    new=prior.sample(6, seed=0),
)
