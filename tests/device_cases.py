"""What the tests of devices and precision walk: ways to learn, operators, small networks."""

import torch

from unmurk.diffusion.networks import Preset
from unmurk.operators.base import per_image
from unmurk.solvers import Draws
from unmurk.training import Recipe, Rounds

SIDE = 8
SMALLEST = Preset((8, 8), 1, False, 8, 8, 1, 8)  # the networks' size plays no part here
BLUR = "blur:gaussian,sigma=0.8"
MASK = "inpaint:random,keep=0.5"
SOON = Recipe(r2r=0.3, e_step=0.5, flow=0.7)  # every phase in a run of five steps
CUT = Draws("diffpir", steps=2)

PROBLEMS = [BLUR + ",pad=reflect", MASK]

LEARNERS = [
    ("flowdiff", "identity", {"recipe": SOON}),
    ("flowdiff", MASK, {"recipe": SOON}),
    ("flowdiff", BLUR + ",pad=reflect", {"recipe": SOON, "solver": CUT}),
    ("flowdiff", "sr:bicubic,factor=2", {"recipe": SOON, "solver": CUT}),
    ("flowdiff", "identity", {"objective": "elbo"}),
    ("em", BLUR, {"rounds": Rounds(2, 8, 0.5, 2), "solver": CUT}),
    ("em", MASK, {"rounds": Rounds(2, 8, 0.5, 2), "e_step": "conditional"}),
    ("ambient", MASK, {}),
    ("sure", BLUR + ",pad=reflect", {}),
    ("sure", "identity", {}),
    ("ambientflow", BLUR, {}),
    ("noisy", BLUR, {}),
    ("clean", BLUR, {}),
]
OPERATORS = [
    "identity",
    MASK,
    "inpaint:box,size=3,seed=1",
    "inpaint:freeform,strokes=2,width=2",
    BLUR,
    BLUR + ",pad=reflect",
    "blur:uniform,size=3",
    "blur:anisotropic,sigma=1,ratio=0.5,angle=30",
    "blur:motion,length=3,angle=20",
    "sr:average,factor=2",
    "sr:bicubic,factor=2",
    "colour:grey",
    "cs:structured,ratio=0.5",
    "mri:cartesian,acceleration=2,channels=1",
    "ct:parallel,angles=6",
    "phase:fourier",
    "hdr:clip,factor=2",
    "blur:nonlinear,length=3",
    "quantise,bits=3",
    "jpeg,quality=20",
    BLUR + "|sr:average,factor=2",
    MASK + "|" + BLUR,
]


def images(n=8, channels=1):
    generator = torch.Generator().manual_seed(0)
    big = torch.rand(n, channels, 2 * SIDE, 2 * SIDE, generator=generator)
    return torch.nn.functional.avg_pool2d(big, 2)


def channels(operator):
    return 3 if operator.startswith(("colour", "jpeg")) else 1


def smooth(x, sigma):
    """A denoiser of few operations: towards the mean of the image."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * 0.04 / (0.04 + per_image(sigma, x) ** 2)
