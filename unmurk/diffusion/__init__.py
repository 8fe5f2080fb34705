"""The diffusion prior p(x): networks, preconditioning, losses, noise schedules and samplers."""
