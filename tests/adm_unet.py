"""The U-Net of Dhariwal and Nichol (2021, arXiv 2105.05233, section 3), written for the tests.

Its tensors carry the names of the published checkpoints. With residual resampling, scale-shift
norms and heads of a fixed width only.
"""

import math
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

SETTINGS = dict(size=16, channels=32, multipliers=(1, 2, 2), layers=1, attention=(8,), head=16)


def recipe(shapes):
    """Weights that depend on names and shapes only: numpy's legacy stream never changes."""
    state = {}
    for name, shape in shapes.items():
        shape = tuple(shape)
        draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 100
        norm = len(shape) == 1 and name.endswith("weight")
        state[name] = torch.from_numpy(draw / math.sqrt(fan_in) + norm).float()
    return state


class Residual(nn.Module):
    def __init__(self, c, out, width, resample=lambda h: h):
        super().__init__()
        self.resample = resample
        self.in_layers = nn.ModuleList(
            [nn.GroupNorm(32, c), nn.SiLU(), nn.Conv2d(c, out, 3, 1, 1)]
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * out))
        self.out_layers = nn.ModuleList(
            [nn.GroupNorm(32, out), nn.SiLU(), nn.Dropout(0), nn.Conv2d(out, out, 3, 1, 1)]
        )
        self.skip_connection = nn.Identity() if c == out else nn.Conv2d(c, out, 1)

    def forward(self, h, time):
        norm, act, convolve = self.in_layers
        g = convolve(self.resample(act(norm(h))))
        scale, shift = self.emb_layers(time)[:, :, None, None].chunk(2, 1)
        g = self.out_layers[0](g) * (1 + scale) + shift
        g = self.out_layers[3](F.silu(g))
        return g + self.skip_connection(self.resample(h))


class Attention(nn.Module):
    def __init__(self, c, head, order):
        super().__init__()
        self.head, self.order = head, order
        self.norm = nn.GroupNorm(32, c)
        self.qkv, self.proj_out = nn.Conv1d(c, 3 * c, 1), nn.Conv1d(c, c, 1)

    def forward(self, h, time):
        b, c, height, width = h.shape
        rows = self.qkv(self.norm(h.flatten(2)))
        heads = c // self.head
        if self.order == "legacy":
            rows = rows.view(b, heads, 3, self.head, -1).transpose(1, 2)
        q, k, v = rows.reshape(b, 3, heads, self.head, -1).unbind(1)
        weight = torch.einsum("bhdi,bhdj->bhij", q, k).div(math.sqrt(self.head)).softmax(-1)
        found = torch.einsum("bhij,bhdj->bhdi", weight, v).reshape(b, c, -1)
        return h + self.proj_out(found).view(b, c, height, width)


def down(h):
    return F.avg_pool2d(h, 2)


def up(h):
    return h.repeat_interleave(2, 2).repeat_interleave(2, 3)


class AdmUnet(nn.Module):
    """The network, for images of 3 channels; `out` of them come out."""

    def __init__(
        self, size, channels, multipliers, layers, attention, head=64, order="legacy", out=6
    ):
        super().__init__()
        self.channels, width = channels, 4 * channels
        self.time_embed = nn.Sequential(
            nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width)
        )

        def step(c, out, side):
            parts = [Residual(c, out, width)]
            return parts + [Attention(out, head, order)] if side in attention else parts

        c, side = channels, size
        blocks, skips = [[nn.Conv2d(3, c, 3, 1, 1)]], [c]
        for level, multiplier in enumerate(multipliers):
            for _ in range(layers):
                blocks.append(step(c, multiplier * channels, side))
                c = multiplier * channels
                skips.append(c)
            if level < len(multipliers) - 1:
                blocks.append([Residual(c, c, width, down)])
                skips.append(c)
                side //= 2
        self.input_blocks = nn.ModuleList(map(nn.ModuleList, blocks))
        self.middle_block = nn.ModuleList(
            [Residual(c, c, width), Attention(c, head, order), Residual(c, c, width)]
        )
        blocks = []
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(layers + 1):
                blocks.append(step(c + skips.pop(), multiplier * channels, side))
                c = multiplier * channels
            if level:
                blocks[-1].append(Residual(c, c, width, up))
                side *= 2
        self.output_blocks = nn.ModuleList(map(nn.ModuleList, blocks))
        self.out = nn.Sequential(nn.GroupNorm(32, c), nn.SiLU(), nn.Conv2d(c, out, 3, 1, 1))

    def forward(self, x, t):
        half = self.channels // 2
        angle = t[:, None] * 10000 ** (-torch.arange(half) / half)
        time = self.time_embed(torch.cat([angle.cos(), angle.sin()], 1))
        h, skips = self.input_blocks[0][0](x), []
        skips.append(h)
        for block in self.input_blocks[1:]:
            for part in block:
                h = part(h, time)
            skips.append(h)
        for part in self.middle_block:
            h = part(h, time)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], 1)
            for part in block:
                h = part(h, time)
        return self.out(h)
