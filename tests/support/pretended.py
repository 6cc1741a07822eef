"""A stand-in for CUDA, on a CPU: tensors that say they are on a GPU, and what a GPU would not do.

A tensor that is asked for on CUDA is one of the CPU's that says it is not. Whatever torch is asked for is done on the
CPU, after it was judged as CUDA would: operands on two devices are refused, and so is a tensor of the host's that a
collective is given, because NCCL has none. So a program computes what it always does, to the last bit, if it runs.

What would make the host wait for the device is noted with the place in the shell that asked for it: reading a value,
results whose size hangs on values, copies that are not asked to go on by themselves, and copies to or from memory that
is not pinned. Of the latter torch's own check (`torch.cuda.set_sync_debug_mode`) knows nothing.

To C++ such a tensor is on `meta`, the one device besides the CPU that every build of torch can differentiate on.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from mimogrid.shell.device.device import Device
from mimogrid.shell.device.streams import Streams


MEMORY_BYTES = 80_000_000_000
CUDA, CPU, META = torch.device("cuda", 0), torch.device("cpu"), torch.device("meta")
aten = torch.ops.aten
READING = {
    aten._local_scalar_dense.default,
    aten.bincount.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
}
"""Operations whose results, or their sizes, the host must know to go on."""
MOVING = {aten._to_copy.default, aten.copy_.default}
"""Operations that two devices may take part in."""


class OnCuda(torch.Tensor):
    """A tensor of the CPU's that says it is on a GPU."""

    @staticmethod
    def __new__(cls, plain: torch.Tensor) -> "OnCuda":
        """Return a view of a tensor."""
        return torch.Tensor._make_subclass(cls, plain, False, dispatch_device=True)

    device = property(lambda _: CUDA)
    is_cuda = property(lambda _: True)
    is_cpu = property(lambda _: False)
    is_meta = property(lambda _: False)

    def tolist(self) -> Any:
        """Return the values, which the host waits for."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what C++ asks while nobody watches: where it is."""
        if func is torch.ops.prim.device.default:
            return META
        with Pretending():
            return func(*args, **(kwargs or {}))


class Pretending(TorchDispatchMode):
    """Does on the CPU what is asked of CUDA. `waits` are the places that would wait for the device, and what with."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: dict[str, None] = {}
        self._pinned: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Judge an operation, then call it."""
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return META
        tensors = list(_tensors((args, tuple(kwargs.values()))))
        is_there = any(isinstance(tensor, OnCuda) for tensor in tensors)
        self._refuse(func, tensors, is_there=is_there)
        if is_there and func is aten.resize_.default:
            with torch._C._DisableTorchDispatch():
                return func(*args, **kwargs)
        if is_there or func is aten._to_copy.default:
            self._note(func, args, kwargs)
        to = kwargs.get("device")
        if to is not None:
            is_there, kwargs["device"] = to.type != "cpu", CPU
        is_pinned = kwargs.pop("pin_memory", None)
        named = {name: _mapped(_plain, value) for name, value in kwargs.items()}
        result = func(*_mapped(_plain, args), **named)
        written = _written(func, args, kwargs)
        if written:
            return written[0] if len(written) == 1 else tuple(written)
        if is_pinned:
            ref = StorageWeakRef(result.untyped_storage())
            self._pinned[ref.cdata] = ref
        return _mapped(OnCuda, result) if is_there else result

    def _refuse(self, func: Any, tensors: list[torch.Tensor], *, is_there: bool) -> None:
        """Raise where CUDA, or NCCL, would."""
        of_host = [tensor for tensor in tensors if not isinstance(tensor, OnCuda)]
        if func.namespace == "c10d":
            if of_host and func is not torch.ops.c10d.barrier.default:  # It has a tensor of its backend's.
                raise RuntimeError(f"{func}: NCCL takes no tensor of the host's")
        elif is_there and func not in MOVING and any(tensor.dim() for tensor in of_host):
            raise RuntimeError(f"{func}: operands on cuda and on cpu")

    def _note(self, func: Any, args: Any, kwargs: Any) -> None:
        """Note what the host would wait for."""
        if func in READING or (_is_masking(func, args) and kwargs.get("output_size") is None):
            self._waits(func)
        elif func is aten._to_copy.default and kwargs.get("device") is not None:
            to_host = kwargs["device"].type == "cpu"
            if isinstance(args[0], OnCuda) == to_host:
                # What is made on the host is not pinned unless that is asked for.
                goes_on = kwargs.get("non_blocking") and (
                    kwargs.get("pin_memory") if to_host else self._is_pinned(args[0])
                )
                if not goes_on:
                    self._waits(func)
        elif func is aten.copy_.default and isinstance(args[0], OnCuda) != isinstance(args[1], OnCuda):
            of_host = args[1] if isinstance(args[0], OnCuda) else args[0]
            goes_on = (kwargs.get("non_blocking") or args[2:] == (True,)) and self._is_pinned(of_host)
            if not goes_on:
                self._waits(func)

    def _waits(self, func: Any) -> None:
        self.waits[f"{func} in {_caller()}"] = None

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        ref = self._pinned.get(tensor.untyped_storage()._cdata)
        return ref is not None and not ref.expired()


def _tensors(of: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of lists within lists, which is all that operations are given."""
    if isinstance(of, torch.Tensor):
        yield of
    elif isinstance(of, (list, tuple)):
        for part in of:
            yield from _tensors(part)


def _mapped(change: Callable[[torch.Tensor], torch.Tensor], of: Any) -> Any:
    """Change every tensor of lists within lists."""
    if isinstance(of, torch.Tensor):
        return change(of)
    return type(of)(_mapped(change, part) for part in of) if isinstance(of, (list, tuple)) else of


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the device's as the CPU's that it is."""
    if not isinstance(tensor, OnCuda):
        return tensor
    storage, offset = tensor.untyped_storage(), tensor.storage_offset()
    return torch.empty(0, dtype=tensor.dtype).set_(storage, offset, tensor.size(), tensor.stride())


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """Return those arguments that an operation writes to and returns."""
    names, written = _names(func)
    named = dict(zip(names, args, strict=False)) | kwargs if written else {}
    return [named[name] for name in written if name in named]


@functools.cache
def _names(func: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of all arguments of an operation, and of those that it writes to and returns."""
    arguments, returns = func._schema.arguments, func._schema.returns
    returns_written = func.namespace != "c10d" and any(
        r.alias_info and r.alias_info.is_write for r in returns
    )
    written = (a.name for a in arguments if returns_written and a.alias_info and a.alias_info.is_write)
    return tuple(a.name for a in arguments), tuple(written)


def _is_masking(func: Any, args: Any) -> bool:
    """Whether an operation takes what a mask says: how much that is, the host must know."""
    if func in {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}:
        is_filling = func is not aten.index.Tensor and not args[2].dim()  # with a number, which is the host's
        return not is_filling and any(i is not None and i.dtype is torch.bool for i in args[1])
    return func is aten.repeat_interleave.Tensor


def _caller() -> str:
    """Return where in the shell an operation was asked for."""
    frame: FrameType | None = sys._getframe(1)
    while frame and "/shell/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}" if frame else "a test"


class PretendedStreams(Streams):
    """The streams of such a device, which does everything at once; its host memory is pinned."""

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return what counts as pinned memory."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)


def device() -> Device:
    """Return a device with what NCCL can and cannot do that needs no other backend."""
    return Device(CUDA, "gloo", PretendedStreams(), is_asynchronous=True)


@contextlib.contextmanager
def pretending() -> Iterator[Pretending]:
    """Let CUDA be there: in this process its random states are the CPU's."""
    cuda: Any = torch.cuda
    replaced: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "_initialized": True,
        "current_device": lambda: CUDA,
        "default_generators": {0: torch.default_generator, CUDA: torch.default_generator},
        "manual_seed": torch.default_generator.manual_seed,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "pretended",
        "max_memory_allocated": lambda *_: 0,
        "get_device_properties": lambda *_: SimpleNamespace(total_memory=MEMORY_BYTES),
        "synchronize": lambda *_: None,
    }
    objects = patch.object(dist.distributed_c10d, "_get_object_coll_device", lambda _: "cuda:0")
    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(patch.object(cuda, name, value))
        stack.enter_context(patch.object(cuda.random, "current_device", lambda: 0))
        stack.enter_context(patch.object(cuda.random, "_lazy_init", lambda: None))
        stack.enter_context(objects)
        # A module's parameters become others of a class of their own, which `Tensor.data` cannot change.
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, before)
        # So that `torch.tensor` makes a tensor of the host's and then moves it, where a mode can see it.
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        yield stack.enter_context(Pretending())
