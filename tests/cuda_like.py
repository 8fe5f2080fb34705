"""What CUDA refuses and what it makes wait, shown on a CPU.

`CudaKernels`   functions that have no kernel for bfloat16 on CUDA raise when they meet it, and
                those of the physics when they run inside an autocast at all.
`StandIn`       tensors that say that they are on "cuda:0" and keep their values on the CPU. Under
                `on_stand_in(...)` whatever is made for or moved to a CUDA device is one of them.
                Mixing them with tensors of the CPU raises, as there; what makes the host wait for
                the device is counted (`Device.waits`).

What the stand-in does not show: kernels that CUDA lacks for float32, its rounding, its memory,
streams, sparse matrices (tomography), and generators of several processes.
Random numbers are those of the CPU.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

__all__ = ["CUDA", "CudaKernels", "Device", "StandIn", "on_stand_in"]

HALF = (torch.bfloat16, torch.float16)
FAMILIES = ("fft_fft", "fft_rfft", "fft_ifft", "fft_irfft", "fft_hfft", "fft_ihfft", "linalg_")
OTHERS = {"cholesky", "inverse", "logdet", "lu", "pinverse", "svd", "special_ndtri", "binomial"}
WITH_HALF = {  # CUDA has these for bfloat16
    "linalg_norm",
    "linalg_vector_norm",
    "linalg_matrix_norm",
    "linalg_vecdot",
    "linalg_multi_dot",
    "linalg_matmul",
    "linalg_diagonal",
    "linalg_cross",
}


class CudaKernels(TorchFunctionMode):
    """Raises where CUDA would for bfloat16, and where physics runs inside an autocast.

    Attributes:
        met: How often each function of the families was called: that a test met some at all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.met: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if (name.startswith(FAMILIES) or name in OTHERS) and name not in WITH_HALF:
            self.met[name] += 1
            given = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, torch.Tensor)]
            if any(v.dtype in HALF for v in given):
                raise RuntimeError(f"\"{name}_cuda\" not implemented for 'BFloat16'")
            if torch.is_autocast_enabled("cpu"):
                raise AssertionError(f"{name} runs inside an autocast")
        return func(*args, **kwargs or {})


# ---------------------------------------------------------------- a device of its own

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select, aten._unique2}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
CHECKED = {aten._linalg_check_errors}


class StandIn(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, requires_grad: bool = False):
        # to autograd it is on "meta", which needs no thread and no stream
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",
            requires_grad=requires_grad,
        )
        made.held = held
        return made

    @property
    def device(self):
        return CUDA

    @property
    def is_cuda(self):
        return True

    def get_device(self):
        return 0

    def tolist(self):
        return self.cpu().tolist()

    def new_tensor(self, data, **kwargs):
        return torch.tensor(data, dtype=kwargs.get("dtype", self.dtype)).to(CUDA)

    def __getitem__(self, key):
        return super().__getitem__(_places(key))

    def __setitem__(self, key, value):
        super().__setitem__(_places(key), value)

    def __repr__(self):
        return f"StandIn({self.held})"

    def __reduce_ex__(self, protocol):
        return self.held.detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, None)


class Device(TorchDispatchMode):
    """The stand-in device: makes its tensors, forbids mixing, counts what the host waits for.

    Attributes:
        waits: How often the host waited for the device, by reason.
        uploads: Copies from the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()

    @property
    def waited(self) -> int:
        """How often the host waited."""
        return sum(self.waits.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, self)


def _places(key):
    """An index without lists, whose numbers torch would put on "meta" and lose."""
    if isinstance(key, tuple):
        return tuple(map(_places, key))
    if isinstance(key, list | range):
        return torch.tensor(list(key)).to(CUDA)
    return key


def _run(func, args, kwargs, device):
    leaves = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, torch.Tensor)]
    ours = [v for v in leaves if isinstance(v, StandIn)]
    if any(v.is_meta for v in leaves if not isinstance(v, StandIn)):
        raise AssertionError(f"the stand-in lost values on their way to {func}")
    packet = func.overloadpacket
    target = kwargs.get("device")
    target = None if target is None else torch.device(target)
    # torch's own code makes further tensors where it takes these to be: on "meta"
    here = bool(ours) if target is None else target.type in ("cuda", "meta")
    if packet is aten.copy_:
        here = isinstance(args[0], StandIn)
    moves = packet in (aten._to_copy, aten.copy_, aten.set_)
    if ours and not moves:
        _same_device(func, packet, args, leaves)
    if device is not None:
        _count(device, packet, args, leaves, ours, here)
    plain = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
    plain = tree_map(lambda v: v.held if isinstance(v, StandIn) else v, plain)
    if target is not None:
        plain["device"] = torch.device("cpu")
    given = tree_map(lambda v: v.held if isinstance(v, StandIn) else v, args)
    out = func(*given, **plain)
    if not here:
        return out
    known = {id(v.held): v for v in ours}

    def wrapped(v):
        if not isinstance(v, torch.Tensor):
            return v
        same = known.get(id(v))  # what was changed in place is what was given
        return StandIn(v) if same is None else same

    return tree_map(wrapped, out)


def _same_device(func, packet, args, leaves):
    """Raises if tensors of both devices meet; numbers of the CPU and its indices may."""
    allowed = set()
    if packet in INDEXED and isinstance(args[0], StandIn):
        allowed = {id(v) for v in args[1] if v is not None}
    strangers = [
        v for v in leaves if not isinstance(v, StandIn) and v.ndim and id(v) not in allowed
    ]
    if strangers:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found cuda:0 and cpu in {func}"
        )


def _count(device, packet, args, leaves, ours, here):
    name = str(packet).removeprefix("aten.")
    if ours and (packet in WAITING or packet in CHECKED):
        device.waits[name] += 1
    if packet in INDEXED and ours:
        indices = [v for v in args[1] if v is not None]
        if any(v.dtype in (torch.bool, torch.uint8) for v in indices):
            device.waits[name + " by a mask"] += 1
        if any(not isinstance(v, StandIn) for v in indices):
            device.uploads[name] += 1
    if packet in (aten._to_copy, aten.copy_):
        source = args[1] if packet is aten.copy_ else args[0]
        if isinstance(source, StandIn) and not here:
            device.waits["copy to the host"] += 1
        if here and not isinstance(source, StandIn):
            device.uploads["copy"] += 1


class Generator(torch.Generator):
    """A generator that says it is on the device it was made for."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.said = torch.device(device)
        return made

    @property
    def device(self):
        return CUDA if self.said.type == "cuda" else self.said

    def manual_seed(self, seed):
        super().manual_seed(seed)
        return self


def _by_a_copy(make):
    """`torch.tensor` and `torch.as_tensor`, which copy to a device past any mode."""

    def made(data, *args, device=None, **kwargs):
        if device is None or torch.device(device).type != "cuda":
            return make(data, *args, device=device, **kwargs)
        if isinstance(data, StandIn):
            return data.to(kwargs.get("dtype", data.dtype))
        return make(data, *args, **kwargs).to(CUDA)

    return made


@contextmanager
def on_stand_in(monkeypatch) -> Iterator[Device]:
    """A CUDA device that stands in for one, until the end of the block."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_name", lambda device=None: "stand-in")
        patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        patch.setattr(torch.Tensor, "pin_memory", lambda self, device=None: self)
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch, "tensor", _by_a_copy(torch.tensor))
        patch.setattr(torch, "as_tensor", _by_a_copy(torch.as_tensor))
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            with Device() as device:
                yield device
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)
