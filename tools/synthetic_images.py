"""Synthetic images for the generic prior: no photograph, no capture, only formulas.

An image is one or two layers, each one of

    dead leaves   opaque shapes in front of each other, radii r with density r^-3
                  (Lee, Mumford and Huang, 2001, "Occlusion models for natural images")
    blobs         soft ellipses that add up, on a dark or bright ground
    filaments     smooth random curves with a Gaussian or flat profile
    texture       Gaussian random fields with power spectrum f^-a, isotropic or oriented, also
                  thresholded; gratings
    gradient      linear and radial ramps, vignettes
    strokes       short polylines and arcs of constant width, as in writing

then a blur of random width, a gamma curve, and a random black and white point. Scales, contrasts
and counts are drawn log-uniformly. Shapes are rendered at twice the size and averaged, so edges
are antialiased. Image `i` depends on (seed, i) alone.

    python tools/synthetic_images.py --count 40000 --side 64 --out images.npy
    python tools/synthetic_images.py --count 20000 --side 64 --channels 3 --out colour.npy
"""

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from scipy.ndimage import gaussian_filter

__all__ = ["KINDS", "image"]

Layer = tuple[np.ndarray, np.ndarray]
"""Values (H, W, C) in [0, 1] and how much of each pixel they cover (H, W, 1)."""

OVER = 2  # shapes are rendered at this multiple of the size
CHUNK = 256  # images in a task of a process


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number between low and high whose logarithm is uniform."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates y, x (side, side) in units of the image's side, pixel centers."""
    at = (np.arange(side) + 0.5) / side
    y, x = np.meshgrid(at, at, indexing="ij")
    return y, x


def color(rng: np.random.Generator, channels: int) -> np.ndarray:
    """A color (C,): mostly grey, at times saturated."""
    level = rng.uniform(0, 1)
    spread = rng.choice([0.05, 0.2, 0.6], p=[0.4, 0.4, 0.2])
    return np.clip(level + spread * rng.standard_normal(channels), 0, 1)


# ---------------------------------------------------------------- layers


def shape_mask(
    rng: np.random.Generator, y: np.ndarray, x: np.ndarray, radius: float
) -> np.ndarray:
    """A disc, an ellipse, a rectangle, a polygon or a wavy disc, (H, W) bool."""
    cy, cx = rng.uniform(-0.1, 1.1, 2)
    turn = rng.uniform(0, np.pi)
    c, s = np.cos(turn), np.sin(turn)
    dy, dx = y - cy, x - cx
    u, v = c * dx + s * dy, -s * dx + c * dy
    aspect = log_uniform(rng, 1, 4)
    kind = rng.integers(5)
    if kind == 0:
        return u**2 + v**2 < radius**2
    if kind == 1:
        return (u / aspect) ** 2 + (v * aspect) ** 2 < radius**2
    if kind == 2:
        return (abs(u) < radius * np.sqrt(aspect)) & (abs(v) < radius / np.sqrt(aspect))
    if kind == 3:
        sides = int(rng.integers(3, 8))
        angles = np.sort(rng.uniform(0, 2 * np.pi, sides))
        inside = np.ones_like(u, dtype=bool)
        for a in angles:
            inside &= np.cos(a) * u + np.sin(a) * v < radius * rng.uniform(0.5, 1.1)
        return inside & (u**2 + v**2 < 4 * radius**2)
    angle = np.arctan2(v, u)
    edge = radius * np.ones_like(u)
    for k in range(2, 6):
        edge += radius * rng.normal(0, 0.3 / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
    return np.hypot(u, v) < edge


def dead_leaves(rng: np.random.Generator, side: int, channels: int) -> Layer:
    """Opaque shapes, drawn from the front, each with a color, a ramp and at times a texture."""
    y, x = grid(side)
    values = np.zeros((side, side, channels)) + color(rng, channels)
    free = np.ones((side, side), dtype=bool)
    smallest, largest = log_uniform(rng, 0.01, 0.1), rng.uniform(0.15, 0.6)
    texture = random_field(rng, side) if rng.uniform() < 0.5 else None
    strength = log_uniform(rng, 0.02, 0.3)
    for _ in range(int(log_uniform(rng, 10, 150))):
        # inverse transform of the density r^-3 between the two radii
        q = rng.uniform()
        radius = (smallest**-2 - q * (smallest**-2 - largest**-2)) ** -0.5
        mask = shape_mask(rng, y, x, radius) & free
        if not mask.any():
            continue
        ramp = rng.normal(0, 0.3) * (y - 0.5) + rng.normal(0, 0.3) * (x - 0.5)
        fill = color(rng, channels) + ramp[..., None]
        if texture is not None and rng.uniform() < 0.5:
            fill = fill + strength * texture[..., None]
        values = np.where(mask[..., None], fill, values)
        free &= ~mask
        if not free.any():
            break
    return values, np.ones((side, side, 1))


def blobs(rng: np.random.Generator, side: int, channels: int) -> Layer:
    """Soft ellipses that add up."""
    y, x = grid(side)
    ground, peak = color(rng, channels), color(rng, channels)
    light = np.zeros((side, side))
    size = log_uniform(rng, 0.015, 0.2)
    sharp = log_uniform(rng, 1, 12)
    for _ in range(int(log_uniform(rng, 1, 60))):
        cy, cx, turn = *rng.uniform(-0.05, 1.05, 2), rng.uniform(0, np.pi)
        c, s = np.cos(turn), np.sin(turn)
        r = size * log_uniform(rng, 0.5, 2)
        aspect = log_uniform(rng, 1, 2.5)
        u = (c * (x - cx) + s * (y - cy)) / (r * aspect)
        v = (-s * (x - cx) + c * (y - cy)) / r
        distance = np.hypot(u, v)
        soft = 1 / (1 + np.exp(np.clip(sharp * (distance**2 - 1), -50, 50)))
        light += log_uniform(rng, 0.2, 1) * soft
    if rng.uniform() < 0.3:
        light *= 1 + 0.3 * random_field(rng, side)
    light = np.clip(light / max(1e-6, np.quantile(light, 0.995)), 0, 1.2)
    cover = np.clip(light, 0, 1)[..., None]
    return ground + (peak - ground) * light[..., None], cover


def curve(rng: np.random.Generator, bends: float) -> np.ndarray:
    """Points (N, 2) of a smooth random curve across the image."""
    steps = 160
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, bends, steps))
    length = rng.uniform(0.3, 1.6) / steps
    path = np.cumsum(length * np.stack([np.sin(heading), np.cos(heading)], 1), 0)
    return path - path.mean(0) + rng.uniform(0, 1, 2)


def draw_path(image: np.ndarray, path: np.ndarray, width: float, flat: bool, level: float) -> None:
    """Adds a curve of a Gaussian or flat profile to `image` (H, W), the maximum of both."""
    side = len(image)
    reach = max(2, int(np.ceil((1 if flat else 3) * width * side)) + 1)
    for py, px in path * side:
        y0, y1 = max(0, int(py) - reach), min(side, int(py) + reach + 1)
        x0, x1 = max(0, int(px) - reach), min(side, int(px) + reach + 1)
        if y0 >= y1 or x0 >= x1:
            continue
        dy = np.arange(y0, y1)[:, None] + 0.5 - py
        dx = np.arange(x0, x1)[None, :] + 0.5 - px
        square = (dy**2 + dx**2) / (width * side) ** 2
        spot = (square < 1) * 1.0 if flat else np.exp(-square / 2)
        image[y0:y1, x0:x1] = np.maximum(image[y0:y1, x0:x1], level * spot)


def filaments(rng: np.random.Generator, side: int, channels: int) -> Layer:
    """Smooth curves of one width and several intensities."""
    light = np.zeros((side, side))
    width, bends = log_uniform(rng, 0.006, 0.03), log_uniform(rng, 0.01, 0.2)
    flat = bool(rng.uniform() < 0.4)
    for _ in range(int(log_uniform(rng, 2, 25))):
        draw_path(light, curve(rng, bends), width, flat, rng.uniform(0.3, 1))
    ground, peak = color(rng, channels), color(rng, channels)
    return ground + (peak - ground) * light[..., None], light[..., None]


def strokes(rng: np.random.Generator, side: int, channels: int) -> Layer:
    """Characters that mean nothing: a few lines and arcs each, on a jittered grid."""
    light = np.zeros((side, side))
    size = log_uniform(rng, 0.12, 0.7)
    width = size * rng.uniform(0.04, 0.12)
    lines = np.arange(size / 2, 1 + size / 2, size * rng.uniform(1.1, 1.6))
    for cy in lines:
        for cx in np.arange(size / 2, 1 + size / 2, size * rng.uniform(0.7, 1.1)):
            if rng.uniform() < 0.15:
                continue
            middle = np.array([cy, cx]) + size * rng.normal(0, 0.03, 2)
            for _ in range(int(rng.integers(1, 5))):
                a, b = rng.uniform(-0.45, 0.45, (2, 2)) * size
                t = np.linspace(0, 1, 24)[:, None]
                bow = rng.normal(0, 0.4) * np.array([b[1] - a[1], a[0] - b[0]])
                draw_path(
                    light, middle + a + t * (b - a) + 4 * t * (1 - t) * bow, width, True, 1.0
                )
    ground, ink = color(rng, channels), color(rng, channels)
    return ground + (ink - ground) * light[..., None], light[..., None]


def random_field(rng: np.random.Generator, side: int) -> np.ndarray:
    """A Gaussian field (H, W) of variance 1 with power spectrum f^-a, at times oriented."""
    fy, fx = np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij")
    turn, stretch = rng.uniform(0, np.pi), log_uniform(rng, 1, 8) if rng.uniform() < 0.4 else 1.0
    u = (np.cos(turn) * fx + np.sin(turn) * fy) * stretch
    v = (-np.sin(turn) * fx + np.cos(turn) * fy) / stretch
    f = np.sqrt(u**2 + v**2 + (log_uniform(rng, 0.5, 8) / side) ** 2)
    noise = np.fft.rfft2(rng.standard_normal((side, side)))
    field = np.fft.irfft2(noise * f ** (-rng.uniform(0.5, 3.5) / 2), s=(side, side))
    field -= field.mean()
    return field / max(1e-9, field.std())


def texture(rng: np.random.Generator, side: int, channels: int) -> Layer:
    """A random field, a thresholded one, or a grating."""
    kind = rng.choice(["field", "threshold", "grating"], p=[0.5, 0.25, 0.25])
    if kind == "grating":
        y, x = grid(side)
        turn, frequency = rng.uniform(0, np.pi), log_uniform(rng, 2, side / 8)
        warp = rng.uniform(0, 0.5) * random_field(rng, side) / frequency
        phase = frequency * (np.cos(turn) * x + np.sin(turn) * y + warp) + rng.uniform()
        field = 2 * np.sin(2 * np.pi * phase)
        if rng.uniform() < 0.4:
            field = np.sign(field)
    else:
        field = random_field(rng, side)
        if kind == "threshold":
            field = 2.0 * (field > rng.uniform(-1, 1)) - 1
    low, high = color(rng, channels), color(rng, channels)
    light = np.clip(0.5 + 0.25 * field, -0.2, 1.2)[..., None]
    if channels > 1 and kind == "field" and rng.uniform() < 0.3:
        others = [np.clip(0.5 + 0.25 * random_field(rng, side), 0, 1) for _ in range(channels)]
        light = 0.6 * light + 0.4 * np.stack(others, -1)
    return low + (high - low) * light, np.ones((side, side, 1))


def gradient(rng: np.random.Generator, side: int, channels: int) -> Layer:
    """A linear ramp, a radial one, or both."""
    y, x = grid(side)
    turn = rng.uniform(0, 2 * np.pi)
    ramp = 0.5 + np.cos(turn) * (x - 0.5) + np.sin(turn) * (y - 0.5)
    cy, cx = rng.uniform(0, 1, 2)
    radial = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * log_uniform(rng, 0.1, 1) ** 2))
    mix = rng.uniform()
    low, high = color(rng, channels), color(rng, channels)
    light = (mix * ramp + (1 - mix) * radial)[..., None]
    return low + (high - low) * light, np.ones((side, side, 1))


KINDS: dict[str, Callable[[np.random.Generator, int, int], Layer]] = {
    "dead leaves": dead_leaves,
    "blobs": blobs,
    "filaments": filaments,
    "texture": texture,
    "gradient": gradient,
    "strokes": strokes,
}
GROUNDS = {"dead leaves": 0.45, "texture": 0.3, "gradient": 0.25}
FRONTS = {"blobs": 0.4, "filaments": 0.35, "strokes": 0.25}


def pick(rng: np.random.Generator, weights: dict[str, float]) -> str:
    """A name drawn by its weight."""
    return str(rng.choice(list(weights), p=list(weights.values())))


# ---------------------------------------------------------------- images


def image(seed: int, number: int, side: int = 64, channels: int = 1) -> np.ndarray:
    """Image `number` of a seed, (side, side, channels), float64 in [0, 1]."""
    rng = np.random.default_rng([seed, number])
    large = OVER * side
    values, _ = KINDS[pick(rng, GROUNDS)](rng, large, channels)
    if rng.uniform() < 0.55:
        front, cover = KINDS[pick(rng, FRONTS)](rng, large, channels)
        if rng.uniform() < 0.5:  # alone on an even ground, as in a microscope
            values = front
        else:
            values = values + rng.uniform(0.3, 1) * cover * (front - values)
    if rng.uniform() < 0.6:
        width = OVER * log_uniform(rng, 0.3, 4)
        values = gaussian_filter(values, (width, width, 0), mode="reflect")
    values = values.reshape(side, OVER, side, OVER, channels).mean((1, 3))
    return tone(rng, values)


def tone(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """A gamma curve between a random black and a random white point."""
    low, high = np.quantile(values, [0.002, 0.998])
    values = np.clip((values - low) / max(high - low, 1e-3), 0, 1)
    values = values ** log_uniform(rng, 0.4, 2.5)
    black = rng.uniform(0, 0.3) if rng.uniform() < 0.6 else 0.0
    white = black + (1 - black) * (1 - rng.uniform(0, 0.8) ** 2)
    return black + (white - black) * values


def chunk(seed: int, side: int, channels: int, numbers: range) -> np.ndarray:
    """Images of these numbers as (N, side, side, C), 8 bits."""
    found = [image(seed, number, side, channels) for number in numbers]
    return np.round(255 * np.stack(found)).astype(np.uint8)


def main() -> None:
    """Write the images as an array (N, side, side) or (N, side, side, C) of 8 bits."""
    parser = argparse.ArgumentParser(description="Write synthetic images as a .npy array.")
    parser.add_argument("--count", type=int, default=40_000)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--channels", type=int, choices=(1, 3), default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    how = parser.parse_args()
    shape = (how.count, how.side, how.side) + ((how.channels,) if how.channels > 1 else ())
    part = how.out.with_name(how.out.name + ".part")
    array = open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
    starts = range(0, how.count, CHUNK)
    tasks = [range(start, min(start + CHUNK, how.count)) for start in starts]
    with ProcessPoolExecutor(how.jobs) as pool:
        made = pool.map(partial(chunk, how.seed, how.side, how.channels), tasks)
        for numbers, images in zip(tasks, made, strict=True):
            array[numbers.start : numbers.stop] = images.reshape(len(numbers), *shape[1:])
            print(f"\r{numbers.stop} of {how.count} images", end="", flush=True)
    array.flush()
    part.replace(how.out)
    print()


if __name__ == "__main__":
    main()
