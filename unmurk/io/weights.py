"""Files of weights: safetensors, and torch's own format with `weights_only`; no unpickling.

Sizes are checked before memory is taken. A network is first built without memory (on the device
"meta"), and with memory only if the file holds exactly its weights.
"""

import hashlib
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor, nn

from ..bounds import check_fields, check_total_memory
from ..errors import InputError, reason
from .json_files import read_object, typed
from .limits import quiet

__all__ = [
    "check_finite_weights",
    "count_weights",
    "digest",
    "load_model",
    "opened",
    "read_settings",
    "read_weights",
    "unpacked",
    "weight_names",
]

Settings = TypeVar("Settings")
Model = TypeVar("Model", bound=nn.Module)


def read_settings(kind: type[Settings], path: Path) -> Settings:
    """Read settings from a JSON file: a dataclass of whole numbers, each within its bounds.

    Args:
        kind: The dataclass.
        path: The file.

    Raises:
        InputError: There is no such file; or it is not a JSON object, or has entries that are
            missing (those without a default), unknown, of another type or out of bounds.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Sizes:
    ...     width: int
    ...     depth: int = 2
    >>> Path("sizes.json").write_text('{"width": 16}')
    13
    >>> read_settings(Sizes, Path("sizes.json"))
    Sizes(width=16, depth=2)
    """
    values = read_object(path)
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - names)
    if unknown:
        raise InputError(
            f"{path} has an unknown entry {unknown[0]!r:.60}: it may have {', '.join(names)}"
        )
    needed = {field.name for field in fields(kind) if field.default is MISSING}  # type: ignore[arg-type]
    given = names & (needed | set(values))
    found = kind(**{name: typed(values, name, int, path) for name in given})
    check_fields(found, {name: f"{path}: {name}" for name in names})
    return found


def weight_names(path: Path) -> set[str]:
    """Return the names of the tensors in a safetensors file. Raises InputError.

    >>> import safetensors.torch
    >>> safetensors.torch.save_file({"w": torch.zeros(2, 3)}, "a.safetensors")
    >>> weight_names(Path("a.safetensors")), count_weights(Path("a.safetensors"))
    ({'w'}, 6)
    """
    return set(_shapes(path))


def count_weights(path: Path) -> int:
    """Count the numbers in a safetensors file without reading them. Raises InputError.

    >>> import safetensors.torch
    >>> weights = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}
    >>> safetensors.torch.save_file(weights, "b.safetensors")
    >>> count_weights(Path("b.safetensors"))
    8
    """
    return sum(shape.numel() for shape in _shapes(path).values())


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file, after its size and kind were checked: the library would wait for a
    FIFO for ever. Raises InputError, and the errors of the library.

    >>> import safetensors.torch
    >>> safetensors.torch.save_file({"w": torch.zeros(2)}, "c.safetensors")
    >>> with opened(Path("c.safetensors")) as file:
    ...     file.get_tensor("w")
    tensor([0., 0.])
    """
    from safetensors import safe_open

    _regular(path)
    with safe_open(path, framework="pt") as file:
        yield file


def _shapes(path: Path) -> dict[str, torch.Size]:
    try:
        with opened(path) as file:
            return {key: torch.Size(file.get_slice(key).get_shape()) for key in file.keys()}
    except InputError:
        raise
    except Exception as error:  # the library's errors have no common class
        raise InputError(f"cannot read the weights in {path}: {reason(error)}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, or of torch's own format, to the CPU.

    Raises:
        InputError: There is no such file; or it is larger than this machine's memory, damaged, or
            holds anything but named tensors.

    >>> import safetensors.torch
    >>> safetensors.torch.save_file({"w": torch.ones(2)}, "a.safetensors")
    >>> read_weights(Path("a.safetensors"))
    {'w': tensor([1., 1.])}
    """
    size = _regular(path)
    state = _loaded(path, size)
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise InputError(
            f"{path} holds more than tensors and is not opened: save its state dict by itself"
        )
    # views of a few numbers may claim to be gigabytes
    if sum(value.numel() * value.element_size() for value in state.values()) > 2 * size + 4096:
        raise InputError(
            f"cannot read the weights in {path}: its tensors are larger than the file"
        )
    return state


def _regular(path: Path) -> int:
    """Return the size of a file that fits into memory. Raises InputError."""
    try:
        if not path.is_file():
            raise InputError(f"no checkpoint {path}: check the path")
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read the weights in {path}: {reason(error)}") from error
    check_total_memory(
        f"the weights in {path}", size, "they are damaged, or need a larger machine"
    )
    return size


def _loaded(path: Path, size: int) -> Any:
    import pickle

    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > size:
                    raise ValueError("it unpacks to more than its own size")
        return unpacked(path)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors and is not opened: save its state dict by itself"
        ) from error
    except Exception as error:  # damaged files raise errors of many classes
        raise InputError(f"cannot read the weights in {path}: {reason(error)}") from error


def unpacked(file: Path | IO[bytes]) -> Any:
    """Return what a file in torch's own format holds, on the CPU.

    No code of the file is run (`weights_only`). A damaged file raises errors of many classes.

    >>> torch.save({"w": torch.ones(2)}, "a.pt")
    >>> unpacked(Path("a.pt"))
    {'w': tensor([1., 1.])}
    """
    with quiet:
        return torch.load(file, map_location="cpu", weights_only=True)


def digest(model: nn.Module) -> str:
    """Return the SHA-256 hash of the weights of a module, in hexadecimal digits.

    >>> digest(nn.Identity())[:8]
    'e3b0c442'
    """
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().float().numpy().tobytes())
    return found.hexdigest()


def check_finite_weights(state: dict[str, Tensor], path: Path) -> None:
    """Raise InputError for weights that are not finite.

    >>> check_finite_weights({"w": torch.tensor([float("nan")])}, Path("a.safetensors"))
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: ...
    """
    for name, value in state.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise InputError(
                f"the weights in {path} are not finite ({name}): train again, or use another file"
            )


def load_model(path: Path, build: Callable[[], Model], what: str) -> Model:
    """Return a module with the weights of a safetensors file, in evaluation mode.

    Args:
        path: The file; it holds exactly the module's state dict.
        build: Builds the module with any weights. It is first called on the device "meta".
        what: The name of the module in messages.

    Raises:
        InputError: The file cannot be read, or its weights have other shapes or are not finite.

    >>> import safetensors.torch
    >>> safetensors.torch.save_file({"weight": torch.tensor([[2.0]])}, "c.safetensors")
    >>> net = load_model(Path("c.safetensors"), lambda: nn.Linear(1, 1, bias=False), "the net")
    >>> net(torch.tensor([3.0])).item(), net.training
    (6.0, False)
    """
    there = _shapes(path)
    try:
        with torch.device("meta"):
            wanted = {name: value.shape for name, value in build().state_dict().items()}
        odd = sorted(there.keys() ^ wanted.keys())
        odd += [name for name in wanted if name in there and wanted[name] != there[name]]
        if odd:
            raise ValueError(f"its weights have other sizes than its settings say ({odd[0]:.60})")
        state = read_weights(path)
        check_finite_weights(state, path)
        model = build()
        model.load_state_dict(state)
    except InputError:
        raise
    except Exception as error:  # foreign settings may break a module in any way
        raise InputError(f"cannot load {what} in {path.parent}: {reason(error)}") from error
    return model.eval()
