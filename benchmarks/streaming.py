"""Learning from a data set in a file: its speed beside one held in memory, and its memory.

A million images of 1 x 64 x 64, 8 bits, random, in a .npy file of 4 GB that this writes; as a
float32 tensor they would take 16 GB. The parties train the prior of a preset by the same steps:

    held                 4096 of the images as a float32 tensor
    file                 the file, as far as the system has cached it
    file, not cached     the file, of which the system was told to forget what it has cached

They take turns in blocks of some steps; ratios are medians over blocks, of one process. Its
largest memory is taken over the blocks of the file.

    python benchmarks/streaming.py                                          as documented
    python benchmarks/streaming.py --images 20000 --blocks 3 --seconds 2    a minute or two
    python benchmarks/streaming.py --table             write docs/benchmark_streaming.md again
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from provenance import ROOT, forget_peak, machine, markdown, status, write_json
from speed import PriorAlone
from torch import Tensor

from unmurk.errors import InputError
from unmurk.io.atomic import write as write_atomically
from unmurk.io.datasets import Source, open_source
from unmurk.training.trainer import Settings, Trainer

__all__: list[str] = []

FIGURES = ROOT / "benchmarks" / "results" / "streaming.json"
PAGE = ROOT / "docs" / "benchmark_streaming.md"
HELD = 4096
CHUNK = 8192  # images written at once
PARTIES = ("held", "file", "file, not cached")


@dataclass(frozen=True)
class Options:
    """Measure learning from a file."""

    images: int = 1_000_000
    """Images in the file."""
    side: int = 64
    """Their height and width."""
    network: str = "tiny"
    """Preset of the network."""
    batch: int = 32
    """Images in a step."""
    blocks: int = 7
    """Turns of every party."""
    seconds: float = 5.0
    """About how long a turn is."""
    folder: Path = Path(tempfile.gettempdir())
    """Where the file is written, and removed at the end."""
    out: Path = FIGURES
    """File for the figures."""
    table: bool = False
    """Write the page from the figures kept and run nothing."""


def write(path: Path, options: Options) -> None:
    """The file of images, written piece by piece."""
    shape = (options.images, options.side, options.side)
    draw = np.random.default_rng(0)
    with open(path, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, options.images, CHUNK):
            count = min(CHUNK, options.images - start)
            file.write(draw.bytes(count * options.side**2))
        file.flush()
        os.fsync(file.fileno())


def forget(path: Path) -> None:
    """Tells the system to drop what it has cached of a file."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def trainer(y: Tensor | Source, options: Options) -> Trainer:
    """What trains the prior on images in memory or in a file."""
    settings = Settings(options.network, 1e6, options.batch, precision="fp32")
    return Trainer(PriorAlone.of(y, options.network), y, settings, Path("unused"), quiet=True)


def block(party: Trainer, seconds: float) -> float:
    """Images per second over about so long."""
    began, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds or not count:
        party.update()
        party.step += 1
        count += 1
    return count * party.settings.batch / spent


def measure(options: Options) -> dict[str, Any]:
    """Ratios of speed and the largest memory."""
    need, free = options.images * options.side**2, shutil.disk_usage(options.folder).free
    if free < 1.1 * need:
        raise InputError(f"{options.folder} has {free / 1e9:.1f} GB free: take fewer --images")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "images.npy"
        write(path, options)
        source = open_source(path)
        parties = {"held": trainer(source[:HELD], options)}
        parties |= {name: trainer(source, options) for name in PARTIES[1:]}
        speeds, most = {name: list[float]() for name in parties}, 0.0
        for party in parties.values():
            block(party, 0)  # what is made once is not counted
        for _ in range(options.blocks):
            for name, party in parties.items():
                if name == "file, not cached":
                    forget(path)
                forget_peak()
                speeds[name].append(block(party, options.seconds))
                most = max(most, status("VmHWM") if name != "held" else 0.0)
                print(name, f"{speeds[name][-1]:.1f}/s", f"{most:.0f} MiB", file=sys.stderr)
        for party in parties.values():
            party.batches.close()
    ratios = {
        name: statistics.median(a / b for a, b in zip(found, speeds["held"], strict=True))
        for name, found in speeds.items()
    }
    how = {"images": options.images, "side": options.side, "network": options.network}
    how |= {"batch": options.batch, "blocks": options.blocks, "held": min(HELD, options.images)}
    return {"settings": how, "machine": machine(), "ratios": ratios, "peak_mib": round(most)}


def table(found: dict[str, Any]) -> str:
    """Ratios as Markdown."""
    return markdown([["data", "speed"], *([k, f"{v:.2f}"] for k, v in found["ratios"].items())])


def page() -> str:
    """The page of the figures kept."""
    found = json.loads(FIGURES.read_text())
    made, how = found["machine"], found["settings"]
    size = how["images"] * how["side"] ** 2
    parts = [
        "# Benchmark: learning from a data set in a file",
        "Written by `python benchmarks/streaming.py --table`; that file says what is measured. "
        f"{how['images']:,} images of 1 x {how['side']} x {how['side']} in a file of "
        f"{size / 1e9:.1f} GB, the prior of network `{how['network']}`, {how['batch']} images in "
        f"a step. Speed over that with {how['held']} of the images held in memory, median of "
        f"{how['blocks']} blocks in which the parties take turns.",
        table(found),
        f"Largest memory of the process while it learnt from the file: {found['peak_mib']} MiB; "
        f"the images alone would take {4 * size / 2**20:,.0f} MiB as float32.",
        f"{made['cpu']}, {made['threads']} threads, {made['gpu'] or 'no GPU'}, torch "
        f"{made['torch']}, commit {made['commit']}.",
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    options = tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,))
    if options.table:
        write_atomically(PAGE, page().encode())
        return 0
    found = measure(options)
    write_json(options.out, found)
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
