"""The run folder: settings, fingerprint and format in `config.json`, and the learned models.

==================  ==============================================================================
`config.json`       format, method and options, settings, problem, data fingerprint, versions
`prior/`            the prior; a `DDPMPipeline` folder of diffusers for networks of a preset
`posterior/`        the posterior
`state/`            the checkpoint
`metrics.jsonl`     losses and checks
==================  ==============================================================================

The format of a run folder is a number. It changes whenever a folder of an older version can no
longer be read, and a folder of another format is refused in one line.
"""

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from .. import __version__
from ..bounds import shown
from ..devices import default_device, device_kind
from ..errors import InputError, remark
from ..io.atomic import place_folder, unwritable, write
from ..io.datasets import Source
from ..io.json_files import read_object

__all__ = ["FORMAT", "fingerprint", "open_run", "read_config", "save_model", "start_of"]

GROUPS = {"options", "problem", "recipe", "rounds", "settings"}  # of config.json
FORMAT = 1
UNSAID = {"start": "none"}  # settings of runs of older versions, which do not state them


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read the settings of a run.

    Args:
        folder: The run folder.

    Returns:
        What its config.json holds.

    Raises:
        InputError: There is none, it cannot be read, or the folder has another format.

    >>> open_run(Path("opened"), {"method": "em"})
    >>> read_config("opened")["method"], read_config("opened")["format"] == FORMAT
    ('em', True)
    """
    config = read_object(Path(folder) / "config.json")
    found = config.get("format")
    if type(found) is not int or found != FORMAT:
        versions = config.get("versions")
        writer = versions.get("unmurk") if isinstance(versions, dict) else None
        text = "no format number" if found is None else f"format {shown(found)}"
        by = "another version" if writer is None else f"version {shown(writer)}"
        raise InputError(
            f"{folder} is a run folder with {text}, written by {by} of unmurk, and this version "
            f"reads format {FORMAT}: use that version, or learn again into another folder"
        )
    return config


def start_of(folder: Path) -> str:
    """Return the name of the start of a run, or "none".

    Raises:
        InputError: See `read_config`.

    >>> open_run(Path("with-start"), {"start": {"name": "generic"}})
    >>> start_of(Path("with-start"))
    'generic'
    """
    found = (UNSAID | read_config(folder))["start"]
    return str(found.get("name")) if isinstance(found, dict) else str(found)


def open_run(folder: Path, config: dict[str, Any]) -> None:
    """Start a run folder, or check that an existing one belongs to the same run.

    Args:
        folder: The run folder.
        config: Everything that tells this run from others.

    Raises:
        InputError: The folder holds another run or other files, has another format, or cannot be
            written.

    >>> open_run(Path("other"), {"method": "em"})
    >>> open_run(Path("other"), {"method": "em"})  # the same run, which continues
    >>> open_run(Path("other"), {"method": "sure"})
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: other holds a run with another method ('em' there, ...
    """
    path = folder / "config.json"
    try:
        if path.exists():
            _check_same(folder, UNSAID | read_config(folder), config)
            return
        if folder.exists() and any(not p.name.startswith(".unmurk-") for p in folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no run: give another folder")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot use {folder} as a run folder: {error}") from error
    versions = {
        "unmurk": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_kind(default_device()),
    }
    text = json.dumps({"format": FORMAT, **config, "versions": versions}, indent=2) + "\n"
    write(path, text.encode())


def raise_kimg(folder: Path, kimg: float) -> None:
    """Write a larger budget into the settings of a run, with those that it had before.

    Args:
        folder: The run folder.
        kimg: The budget in thousands of images.

    Raises:
        InputError: The settings cannot be read or written.
    """
    config = read_config(folder)
    before = config["settings"]["kimg"]
    if kimg > before:
        config["settings"]["kimg"] = kimg
        config["kimg before"] = [*config.get("kimg before", []), before]
        write(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def _same_but_longer(folder: Path, old: Any, settings: dict[str, Any]) -> bool:
    """Whether settings are those of a run, or differ in a larger budget only.

    Settings that the run does not name have their defaults.

    Raises:
        InputError: The budget is smaller.
    """
    if not isinstance(old, dict) or not isinstance(old.get("kimg"), int | float):
        return False
    rest = {key: old.get(key) == value for key, value in settings.items() if key != "kimg"}
    if not all(rest.values()):
        return False
    if settings["kimg"] < old["kimg"]:
        raise InputError(
            f"{folder} holds a run of {old['kimg']:g} kimg, which can be raised and not lowered: "
            f"give {old['kimg']:g} or more, or another folder"
        )
    return True


def _check_same(folder: Path, old: dict[str, Any], config: dict[str, Any]) -> None:
    """Raise InputError if a folder holds another run; warn if it was begun on another device."""
    for key, value in config.items():
        if key == "settings" and _same_but_longer(folder, old.get(key), value):
            continue
        if old.get(key) != value:
            raise InputError(
                f"{folder} holds a run with another {_difference(key, old.get(key), value)}: "
                "give another folder, or the same settings to continue it"
            )
    versions = old.get("versions")
    first = versions.get("device") if isinstance(versions, dict) else None
    here = device_kind(default_device())
    if first not in (None, here):
        remark(
            f"{folder} was started on {first} and continues on {here}: it will not end bit for bit"
            " as on one of them"
        )


def _difference(key: str, old: Any, new: Any) -> str:
    """Return the name of what differs, the innermost one of options, with both values."""
    if key == "data":
        return "data set (its files have other names, sizes, times or numbers; cp -a keeps them)"
    while key in GROUPS and isinstance(old, dict) and isinstance(new, dict):
        names = [name for name in (*new, *old) if old.get(name) != new.get(name)]
        if not names:
            break
        first = next((name for name in names if name != "kimg"), names[0])  # it may be raised
        key, old, new = first, old.get(first), new.get(first)
    if isinstance(old, dict) or isinstance(new, dict):  # hashes
        return key
    return f"{key} ({shown(old)} there, {shown(new)} here)"


def fingerprint(y: Tensor | Source) -> dict[str, Any]:
    """Return shape and hash of measurements, which tell one data set from another.

    >>> y = torch.zeros(2, 1, 4, 4)
    >>> fingerprint(y) == fingerprint(y.clone()), fingerprint(y) == fingerprint(y + 1)
    (True, False)
    """
    if isinstance(y, Source):
        return y.fingerprint()
    digest = hashlib.sha256(y.contiguous().cpu().numpy().data).hexdigest()  # no copy
    return {"shape": list(y.shape), "sha256": digest}


def save_model(folder: Path, model: Any) -> None:
    """Write the files of a model beside the old ones, then put them in their places.

    Args:
        folder: The folder of the model.
        model: An object with `save(folder)`.

    Raises:
        InputError: The files cannot be written.

    >>> from unmurk.flows.posterior import Posterior
    >>> save_model(Path("saved/posterior"), Posterior.create("tiny", (1, 8, 8), 0.1))
    >>> Posterior.load(Path("saved/posterior")).shape
    (1, 8, 8)
    """
    try:
        with place_folder(folder) as part:
            model.save(part)
    except SafetensorError as error:
        raise unwritable(folder, error) from error
