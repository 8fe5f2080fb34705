"""Run folders, one file of which is damaged or odd, through every command that reads them.

`prepare` learns a tiny run once, cuts another one short, and restores with the first.
"""

import functools
import json
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .commands import call
from .mutate import mutated, odd_json, structured

SECONDS = 10.0  # of CPU time: some of this is real work
SIDE = 16
LEARN = ["--noise", "0.2", "--kimg", "0.128", "--precision", "fp32"]
COPIED = (
    2**16
)  # bytes up to which a file is copied; larger ones are linked, never changed in place

TARGETS = {
    "config.json": ["restore", "report", "learn"],
    "prior/model_index.json": ["sample", "solve", "report"],
    "prior/scheduler/scheduler_config.json": ["sample", "sample", "solve"],
    "prior/unet/config.json": ["sample", "sample", "solve", "report"],
    "prior/unet/diffusion_pytorch_model.safetensors": ["sample", "solve"],
    "posterior/config.json": ["restore", "start"],
    "posterior/model.safetensors": ["restore", "start"],
    "metrics.jsonl": ["report", "report", "learn"],
    "state/latest.pt": ["learn"],
    "unmurk.jsonl": ["restore"],
}


@functools.cache
def room() -> Path:
    """Where the sound runs are."""
    return Path(os.environ["FUZZ_FOLDER"]) / "runs"


def prepare() -> None:
    """Learn the runs, in a process of their own: threads that they start must not be forked."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _learn()
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("the runs that are to be damaged could not be made")


def _learn() -> None:
    from unmurk.training.trainer import Trainer

    room().mkdir()
    os.chdir(room())
    Path("data").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (SIDE, SIDE), np.uint8)
        Image.fromarray(pixels).save(f"data/{i}.png")
    if call(["learn", "data", "--out", "whole", *LEARN]):
        raise RuntimeError("learning failed")
    if call(["restore", "data", "--prior", "whole", "--out", "out", "--samples", "2"]):
        raise RuntimeError("restoring failed")
    update = Trainer.update

    def ends(self: Trainer) -> Any:
        if self.step == 2:
            raise KeyboardInterrupt
        return update(self)

    Trainer.update = ends  # type: ignore[method-assign]
    from unmurk.cli import main as cli

    if cli.main(["learn", "data", "--out", "cut", *LEARN]) != 130:
        raise RuntimeError("cutting a run short failed")


def run(draws: random.Random, folder: Path) -> None:
    """Damage one file of a run and use the run."""
    target = draws.choice(list(TARGETS))
    command = draws.choice(TARGETS[target])
    shutil.copytree(room() / "data", "data")
    shutil.copytree(
        room() / ("cut" if command == "learn" else "whole"), "run", copy_function=_copy
    )
    if target == "unmurk.jsonl":
        shutil.copytree(room() / "out", "out")
    file = Path("out" if target == "unmurk.jsonl" else "run") / target
    if file.exists():
        damage(draws, file)
    argv = {
        "restore": ["restore", "data", "--prior", "run", "--out", "out", "--samples", "2"],
        "report": ["report", "run"],
        "learn": ["learn", "data", "--out", "run", *LEARN],
        "sample": ["sample", "--prior", "run", "-n", "1", "--steps", "2", "--out", "new"],
        "solve": [*SOLVE, "--method", draws.choice(["red-diff", "diffpir", "ddnm"]), "--out", "s"],
        "start": [*SOLVE, "--init", "posterior", "--out", "s"],
    }
    call(argv[command], Path("data"))


SOLVE = [
    "solve",
    "data",
    "--prior",
    "run",
    "--operator",
    "identity",
    "--noise",
    "0.2",
    "--steps",
    "2",
]


def _copy(source: str, target: str) -> None:
    small = os.path.getsize(source) <= COPIED
    (shutil.copy if small else os.link)(source, target)


def damage(draws: random.Random, file: Path) -> None:
    """Make something else of a file."""
    data = file.read_bytes()
    file.unlink()
    if draws.random() < 0.04:
        what = draws.choice(["missing", "folder", "dangling", "loop", "pipe", "zero"])
        if what == "folder":
            file.mkdir()
        elif what == "pipe":
            os.mkfifo(file)
        elif what != "missing":
            os.symlink({"dangling": "no", "loop": file.name, "zero": "/dev/zero"}[what], file)
        return
    known = {".json": _json, ".jsonl": _lines, ".safetensors": _tensors, ".pt": _state}
    if draws.random() < 0.2:
        file.write_bytes(mutated(draws, data, data[::-1]))
    else:
        file.write_bytes(known[file.suffix](draws, data))


def _json(draws: random.Random, data: bytes) -> bytes:
    return odd_json(draws, json.loads(data))


def _lines(draws: random.Random, data: bytes) -> bytes:
    lines = data.splitlines()
    at = draws.randrange(len(lines))
    lines[at] = draws.choice(
        [odd_json(draws, json.loads(lines[at])), b"", b"x", b"\xff\xfe", b"[]"]
    )
    if draws.random() < 0.2:
        draws.shuffle(lines)
    return b"\n".join(lines) + draws.choice([b"\n", b"\n", b"", b"\r\n"])


def _tensors(draws: random.Random, data: bytes) -> bytes:
    return structured(draws, "x.safetensors", data)


def _state(draws: random.Random, data: bytes) -> bytes:
    """A state with a value of another kind in it."""
    with tempfile.TemporaryFile(dir=".") as stream:
        stream.write(data)
        stream.seek(0)
        state = torch.load(stream, weights_only=True)
        held, key = draws.choice(list(_places(state)))
        odd = [
            None,
            -1,
            0,
            10**6,
            2**70,
            float("nan"),
            "x",
            [],
            {},
            torch.zeros(3),
            torch.tensor(1),
        ]
        if draws.random() < 0.2:
            del held[key]
        else:
            held[key] = draws.choice(odd)
        stream.seek(0)
        stream.truncate()
        torch.save(state, stream)
        stream.seek(0)
        return stream.read()


def _places(value: Any) -> Any:
    """Every dictionary or list in a state, with every key."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        yield value, key
        yield from _places(value[key])
