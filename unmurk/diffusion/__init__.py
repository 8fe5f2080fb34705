"""The diffusion prior p(x): network, preconditioning, noise schedules and samplers."""
