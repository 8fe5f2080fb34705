"""Measure learning from a data set in a file: its speed and its memory.

The script writes a .npy file of 4 GB with a million random images of 1 x 64 x 64, 8 bits; as a
float32 tensor they would take 16 GB. The parties train the prior of a preset by the same steps:

    in memory            4096 of the images as a float32 tensor
    file                 the file, as far as the system has cached it
    file, not cached     the file, after the system dropped it from its cache

They alternate in blocks of some steps; the ratios are medians over blocks, of one process. The
peak memory is taken over the blocks that read the file.

    python benchmarks/streaming/run.py --out OUT                        # as published
    python benchmarks/streaming/run.py --out OUT --images 20000 --blocks 3 --seconds 2
    python benchmarks/streaming/run.py --table
"""

import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import common
from benchmarks.common import CommonOptions, Row, Suite, markdown
from benchmarks.speed.run import prior_trainer, speed_ratios
from unmurk.errors import InputError
from unmurk.io.datasets import open_source
from unmurk.training.trainer import Trainer

__all__: list[str] = []

HELD = 4096
CHUNK = 8192  # images written at once
LABELS = {"held": "in memory"}


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Measure learning from a file."""

    images: int = 1_000_000
    """Images in the file."""
    side: int = 64
    """Height and width of the images."""
    network: str = "tiny"
    """Preset of the network."""
    batch: int = 32
    """Images in a step."""
    blocks: int = 7
    """Blocks of every party."""
    seconds: float = 5.0
    """Approximate length of a block."""
    folder_of_file: Path = Path(tempfile.gettempdir())
    """Folder in which the file is written; it is removed at the end."""


def write(path: Path, options: Options) -> None:
    """Write the file of images in chunks."""
    shape = (options.images, options.side, options.side)
    draw = np.random.default_rng(options.seed)
    with open(path, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, options.images, CHUNK):
            count = min(CHUNK, options.images - start)
            file.write(draw.bytes(count * options.side**2))
        file.flush()
        os.fsync(file.fileno())


def drop_cache(path: Path) -> None:
    """Ask the system to drop a file from its cache."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def block(party: Trainer, seconds: float) -> float:
    """Images per second over approximately this time."""
    began, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds or not count:
        party.update()
        party.step += 1
        count += 1
    return count * party.settings.batch / spent


def measure(options: Options) -> Row:
    """Speed ratios and peak memory; writes OUT/streaming.json."""
    place = options.folder_of_file
    need, free = options.images * options.side**2, shutil.disk_usage(place).free
    if free < 1.1 * need:
        raise InputError(
            f"{place} has {free / 1e9:.1f} GB free, {1.1 * need / 1e9:.1f} GB are needed: give "
            "fewer --images"
        )
    with tempfile.TemporaryDirectory(dir=place) as folder:
        path = Path(folder) / "images.npy"
        write(path, options)
        source = open_source(path)
        data = {"held": source[:HELD], "file": source, "file, not cached": source}
        parties = {
            name: prior_trainer(y, options.network, "fp32", options.batch)
            for name, y in data.items()
        }
        speeds, peak = {name: list[float]() for name in parties}, 0.0
        for party in parties.values():
            block(party, 0)  # the first step includes work that is done once
        for _ in range(options.blocks):
            for name, party in parties.items():
                if name == "file, not cached":
                    drop_cache(path)
                common.reset_peak_memory()
                speeds[name].append(block(party, options.seconds))
                if name != "held":
                    peak = max(peak, common.process_status("VmHWM"))
                print(name, f"{speeds[name][-1]:.1f}/s", f"{peak:.0f} MiB", file=sys.stderr)
        for party in parties.values():
            party.batches.close()
    settings = {"images": options.images, "side": options.side, "network": options.network}
    settings |= {"batch": options.batch, "blocks": options.blocks}
    settings |= {"held": min(HELD, options.images)}
    ratios = speed_ratios(speeds, "held")
    return SUITE.store(options, settings, ratios=ratios, peak_mib=round(peak))


def view(result: Row) -> Row:
    """What the page shows: the ratios, and the sizes."""
    lines = [[LABELS.get(k, k), f"{v:.2f}"] for k, v in result["ratios"].items()]
    size = result["settings"]["images"] * result["settings"]["side"] ** 2
    return {"table": markdown([["data", "speed"], *lines]), "bytes": size}


SUITE = Suite("streaming", view, "streaming")

if __name__ == "__main__":
    sys.exit(SUITE.main(Options, measure))
