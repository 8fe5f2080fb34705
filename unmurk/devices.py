"""Device and precision: where tensors are computed, and in which floating-point type.

**Device.** CUDA if there is a GPU, else the CPU. Of several processes each takes the GPU of its
`LOCAL_RANK`. Apple's MPS has no float64, which parts of the physics need, so it is used only on
request. Launchers of accelerate set two variables that count as requests: `ACCELERATE_USE_CPU`
and `ACCELERATE_TORCH_DEVICE`. In Python, the device of the given tensors and models decides.

**Precision.** Networks may run in bfloat16. Everything else (operators, likelihoods, fits, losses)
runs in float32 or float64. CUDA has no `fft_*` and no `linalg_*` for bfloat16, and its autocast
does not convert their inputs; on a CPU, A(x) would silently be rounded to 8 bits. So autocast is
entered around the networks only, by `networks()`, in the precision that `network_precision(...)`
sets. An operator leaves any autocast that its caller has entered (`physics`).

"fp32" means IEEE float32. cuDNN's convolutions use TensorFloat-32 by default (10 bits of
mantissa); `ieee_float32()` turns that off for the time of a run.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .errors import InputError
from .io.locks import local_rank

__all__ = [
    "default_device",
    "device_kind",
    "filled",
    "host_to",
    "ieee_float32",
    "network_precision",
    "networks",
    "no_memory",
    "on_device",
    "out_of_memory",
    "physics",
    "physics_outside_autocast",
    "reader",
    "single_or_double",
]

HALF = (torch.bfloat16, torch.float16)
MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "std::bad_alloc")

_network: ContextVar[torch.dtype | None] = ContextVar("network precision", default=None)


# ---------------------------------------------------------------- the device


def default_device() -> torch.device:
    """Return the device that commands and `learn` use: CUDA or the CPU, or the requested one.

    Raises:
        InputError: LOCAL_RANK or ACCELERATE_TORCH_DEVICE has no valid value.

    >>> default_device().type in ("cpu", "cuda")
    True
    """
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on"):
        return torch.device("cpu")
    asked = os.environ.get("ACCELERATE_TORCH_DEVICE")
    if asked:
        try:
            return torch.device(asked)
        except RuntimeError as error:
            raise InputError(
                f"ACCELERATE_TORCH_DEVICE is '{asked}': give cpu, cuda, cuda:N or mps"
            ) from error
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank())


def device_kind(device: torch.device) -> str:
    """Return a name that differs between devices that round differently: "cpu", or the GPU's name.

    >>> device_kind(torch.device("cpu"))
    'cpu'
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def host_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device; from the host to a GPU by pinned memory, without waiting.

    >>> host_to(torch.ones(2), torch.device("cpu"))
    tensor([1., 1.])
    """
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def filled(value: float | Tensor, like: Tensor) -> Tensor:
    """Convert a number or a tensor to the type and device of another tensor.

    A number becomes a tensor of shape () that the device itself writes: a copy from the host would
    wait for the queue of the GPU.

    >>> filled(2, torch.zeros(3, dtype=torch.float64))
    tensor(2., dtype=torch.float64)
    """
    if isinstance(value, Tensor):
        return value.to(like.device, like.dtype)
    return torch.full((), value, dtype=like.dtype, device=like.device)


# ---------------------------------------------------------------- the precision


@contextmanager
def network_precision(dtype: torch.dtype | None) -> Iterator[None]:
    """Run networks in this type (bfloat16) within the context; None takes that of the weights.

    >>> weight = torch.ones(2, 2)
    >>> with network_precision(torch.bfloat16), networks(torch.device("cpu")):
    ...     (weight @ weight).dtype
    torch.bfloat16
    """
    token = _network.set(dtype)
    try:
        yield
    finally:
        _network.reset(token)


def networks(device: torch.device) -> AbstractContextManager[Any]:
    """Return the context for the call of a network on this device, and for nothing else.

    >>> with networks(torch.device("cpu")):  # without network_precision: as the weights are
    ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    torch.float32
    """
    dtype = _network.get()
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _autocast_on(kind: str) -> bool:
    """Whether the caller has entered an autocast. Some devices ("meta") have none."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


@contextmanager
def physics_outside_autocast(device: torch.device) -> Iterator[None]:
    """Restrict an autocast that the caller has entered to the networks.

    >>> cpu, ones = torch.device("cpu"), torch.ones(2, 2)
    >>> with torch.autocast("cpu", torch.bfloat16), physics_outside_autocast(cpu):
    ...     physical = (ones @ ones).dtype
    ...     with networks(cpu):
    ...         physical, (ones @ ones).dtype
    (torch.float32, torch.bfloat16)
    """
    kind = device.type
    if not _autocast_on(kind):
        yield
        return
    dtype = torch.get_autocast_dtype(kind)
    with network_precision(dtype), torch.autocast(kind, enabled=False):
        yield


Map = TypeVar("Map", bound=Callable[..., Any])


def physics(method: Map) -> Map:
    """Decorate a method of operators: it runs in float32 or float64 under any autocast.

    >>> class Double:
    ...     @physics
    ...     def A(self, x):
    ...         return x @ (2 * torch.eye(2))
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     Double().A(torch.ones(1, 2, dtype=torch.bfloat16))
    tensor([[2., 2.]])
    """

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = [_lifted(a) for a in args]
        named = {key: _lifted(a) for key, a in kwargs.items()}
        kind = next((a.device.type for a in given if isinstance(a, Tensor)), "cpu")
        if not _autocast_on(kind):
            return method(self, *given, **named)
        with torch.autocast(kind, enabled=False):
            return method(self, *given, **named)

    return cast(Map, run)


def single_or_double(tensor: Tensor) -> Tensor:
    """Convert half precision to float32; float32 and float64 stay as they are.

    >>> single_or_double(torch.ones(1, dtype=torch.bfloat16)).dtype
    torch.float32
    >>> single_or_double(torch.ones(1, dtype=torch.float64)).dtype
    torch.float64
    """
    return tensor.float() if tensor.dtype in HALF else tensor


def _lifted(value: Any) -> Any:
    """Convert tensors of half precision to float32; other values stay as they are."""
    return single_or_double(value) if isinstance(value, Tensor) else value


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Compute float32 convolutions and matrix products on CUDA in IEEE float32, not TF32.

    >>> before = torch.backends.cudnn.allow_tf32
    >>> with ieee_float32():
    ...     torch.backends.cudnn.allow_tf32
    False
    >>> torch.backends.cudnn.allow_tf32 == before
    True
    """
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    try:
        before: list[tuple[Any, str, Any]] = [(cudnn, "allow_tf32", cudnn.allow_tf32)]
        before += [(products, "allow_tf32", products.allow_tf32)]
        within: Any = False
    except RuntimeError:  # the caller uses torch's newer settings, which exclude the older ones
        places: list[Any] = [cudnn.conv, cudnn.rnn, products]  # type: ignore[attr-defined]
        before = [(place, "fp32_precision", place.fp32_precision) for place in places]
        within = "ieee"
    try:
        for place, name, _ in before:
            setattr(place, name, within)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


# ---------------------------------------------------------------- memory


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the memory of a GPU or of the host has run out.

    >>> out_of_memory(torch.OutOfMemoryError()), out_of_memory(ValueError())
    (True, False)
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(m in str(error).lower() for m in MEMORY)


def no_memory(error: BaseException, what: str, advice: str) -> InputError:
    """Build the error for a user whose memory has run out.

    Args:
        error: An error that `out_of_memory` recognizes.
        what: What was computed: the batch, the size of the images, the network.
        advice: How to need less.

    >>> no_memory(MemoryError(), "8 images of 4096x4096", "take fewer").args[0]
    'out of memory with 8 images of 4096x4096: take fewer'
    """
    where = "memory of the GPU" if isinstance(error, torch.OutOfMemoryError) else "memory"
    return InputError(f"out of {where} with {what}: {advice}")


def on_device(what: Callable[..., str], advice: str) -> Callable[[Map], Map]:
    """Decorate a public function that computes on a device.

    Inside, float32 is IEEE float32, an autocast of the caller applies to networks only, and a lack
    of memory raises an InputError of one line.

    Args:
        what: Describes the computation, from the same arguments.
        advice: How to need less memory.

    >>> @on_device(lambda x: f"{len(x)} images", "take fewer")
    ... def restore(x):
    ...     raise MemoryError
    >>> restore(torch.ones(8, 1, 4, 4))
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: out of memory with 8 images: take fewer
    """

    def decorate(function: Map) -> Map:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            device = next((a.device for a in args if isinstance(a, Tensor)), torch.device("cpu"))
            with ieee_float32(), physics_outside_autocast(device):
                try:
                    return function(*args, **kwargs)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    raise no_memory(error, what(*args, **kwargs), advice) from error

        return cast(Map, run)

    return decorate


# ---------------------------------------------------------------- threads


def reader() -> ThreadPoolExecutor:
    """Start a thread that reads beside the one that computes, on one processor core.

    A parallel operation of torch in a second thread creates a second team of OpenMP threads. With
    more threads than cores, GNU's OpenMP permanently disables the short wait in which a team stays
    ready, for both teams. Every later operation must wake its threads, and learning took a fifth
    longer.

    >>> pool = reader()
    >>> pool.submit(torch.get_num_threads).result()
    1
    >>> pool.shutdown()
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
    pool.submit(torch.get_num_threads).result()
    torch.set_num_threads(threads)  # the value that new threads start with
    return pool
