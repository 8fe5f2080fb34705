"""Restore a folder of noisy images, with nothing but these images to learn from.

    python examples/restore_your_images.py                                # digits, made noisy here
    python examples/restore_your_images.py scans/ --noise 0.1 --kimg 400  # your own

The script writes the restored images and the standard deviation of every pixel. `--noise` is the
standard deviation of the noise, where black is 0 and white is 1: 0.1 is 25.5 of the 255 levels of
an 8-bit image; `unmurk noise scans/` estimates it. The images need one size, with sides that are
multiples of 4. For captures of any and mixed sizes use the commands `unmurk learn` and `unmurk
restore`. The default budget gives rough results within a minute or two; for good ones use
`--kimg 100` or more. The same command resumes a stopped run.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import unmurk

__all__: list[str] = []


def main() -> None:
    """Load, learn, restore and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="?", type=Path, help="folder, picture, npy, npz or idx")
    parser.add_argument("--noise", type=float, default=0.3)
    parser.add_argument("--kimg", type=float, default=4.0, help="budget, thousands of images seen")
    parser.add_argument("--out", type=Path, default=Path("runs/restore_your_images"))
    args = parser.parse_args()

    problem = unmurk.Problem("identity", noise=args.noise)  # y = x + noise n
    data = unmurk.load_images(args.images or "digits:test")
    y = data.images
    if args.images is None:  # the digits are clean: add noise, and do not use the clean ones again
        y = problem.simulate(y)

    y = y.to("cuda" if torch.cuda.is_available() else "cpu")
    _, posterior = unmurk.learn(y, problem, out=args.out / "run", kimg=args.kimg)

    batches = torch.arange(len(y)).split(256)
    pairs = [posterior.mean_std(y[i], problem, index=i.tolist()) for i in batches]
    mean, std = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    kind = "png" if args.images is None else None  # None: the format of the input
    unmurk.save_images(mean, args.out / "restored", data.names, data.scale, format=kind)
    np.save(args.out / "std.npy", std.cpu().numpy())
    print(f"{len(y)} images in {args.out}/restored; mean standard deviation {std.mean():.3f}")


if __name__ == "__main__":
    main()
