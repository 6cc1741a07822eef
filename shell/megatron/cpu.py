"""CPU: what megatron-core cannot do without CUDA, and what stands in for it.

Nothing of torch is patched. A few of megatron's own module globals are replaced while `on_device` is open. On every
device:

- Its random-state tracker. On CUDA it is one of its own class, which has the state that sequence parallelism asks for;
  without that it would be a host's, or empty. On the CPU it is one that forks the CPU's generator.
- Its global memory buffer, which only its own `initialize_model_parallel` would make.
- A flag that says "already warned" that CUDA_DEVICE_MAX_CONNECTIONS is not 1. That would put all streams on one queue,
  where a receive that is posted ahead stops computing (`shell.device.place.prepare`).

And on the CPU alone:

- The name ``torch`` in some of its files. Its sequence-parallel mappings, its buffer and its routers allocate on
  ``torch.cuda.current_device()``; there, and nowhere else, that is the CPU. So are the streams on which a dispatcher
  copies counts of tokens to the host; what is counted is there already.
- The function that makes such a copy, which all that was not on CUDA comes through unchanged: torch's collectives
  take counts as numbers, not as tensors.
- The two functions by which recomputation saves and restores the CUDA generator's state.
- A name that megatron-core 0.16's routers look for, and do not find without transformer-engine.
- The norm at the end of a block of layers, which without transformer-engine or Apex refuses sequence parallelism.
- Two collectives that it took from torch by names that torch 2.13 calls deprecated, at every call.

>>> with on_device(torch.device("cpu")):
...     mappings.torch.cuda.current_device()
device(type='cpu')
>>> mappings.torch is torch
True
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, utils
from megatron.core.tensor_parallel import layers, mappings, random
from megatron.core.transformer import transformer_block
from megatron.core.transformer.moe import moe_utils, router, token_dispatcher
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


_ON_CUDA_DEVICE = (layers, mappings, utils, router, token_dispatcher)
"""Files of megatron that work on the current CUDA device and that the shell's modules, or a host's, run through."""


_TALKS = layers.linear_with_grad_accumulation_and_async_allreduce
_COLLECTIVES = {
    "dist_all_gather_func": "all_gather_single",
    "dist_reduce_scatter_func": "reduce_scatter_single",
}


class NoStream:
    """A stream, and an event, where all is done in the order in which it is asked for."""

    def record_event(self) -> "NoStream":
        """Return what stands for now."""
        return self

    def synchronize(self) -> None:
        """Wait for nothing."""


class FinalNorm:
    """Megatron's norm of torch's, with the mark that it gives parameters whose gradients are partial under sp."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float) -> Any:
        """Return the norm that the configuration names."""
        of_all = copy.copy(config)
        of_all.sequence_parallel = False
        norm = WrappedTorchNorm(of_all, hidden_size, eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class CpuRandomStates:
    """Megatron's tracker of named random states, on the CPU's generator.

    `fork` runs its body on a named state and leaves the generator as it found it.
    """

    use_cudagraphable_rng = False
    is_inference_rng_tracker = False

    def __init__(self, seeds: Mapping[str, int]) -> None:
        self._states = {name: _seeded_state(seed) for name, seed in seeds.items()}
        self._current: str | None = None

    def is_initialized(self) -> bool:
        """Whether there are states; megatron asks before it makes a tracker of its own."""
        return True

    def reset(self) -> None:
        """Forget every state."""
        self._states = {}

    def add(self, name: str, seed: int) -> None:
        """Track one more state."""
        assert name not in self._states, name
        self._states[name] = _seeded_state(seed)

    def get_states(self) -> dict[str, Tensor]:
        """Return every state; what recomputation saves."""
        return dict(self._states)

    def set_states(self, states: Mapping[str, Tensor]) -> None:
        """Go back to saved states."""
        self._states = dict(states)

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Run on a named state. Forks nest: an inner one leaves the state of the outer one untouched."""
        outer, outer_state = self._current, torch.get_rng_state()
        if outer == name:
            yield
            return
        torch.set_rng_state(self._states[name])
        self._current = name
        try:
            yield
        finally:
            self._states[name] = torch.get_rng_state()
            torch.set_rng_state(outer_state)
            self._current = outer


@contextlib.contextmanager
def on_device(device: torch.device, *, seed: int = 0) -> Iterator[None]:
    """Let megatron's modules be built and run on `device` while open.

    Forward *and* backward need it: sequence parallelism and recomputation work in both.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(random, "_CUDA_RNG_STATE_TRACKER", _random_states(device, seed)))
        stack.enter_context(_replaced(random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True))
        stack.enter_context(_replaced(parallel_state, "_GLOBAL_MEMORY_BUFFER", None))
        parallel_state._set_global_memory_buffer()
        stack.enter_context(_replaced(_TALKS, "warned", True))
        if device.type == "cpu":
            stack.enter_context(_without_cuda())
        yield


def _random_states(device: torch.device, seed: int) -> Any:
    if device.type == "cpu":
        return CpuRandomStates({"model-parallel-rng": seed})
    tracker = random.CudaRNGStatesTracker()
    tracker.add("model-parallel-rng", seed)
    return tracker


@contextlib.contextmanager
def _without_cuda() -> Iterator[None]:
    stream = NoStream()
    stand_in = _torch_without_cuda(stream)
    alltoall = token_dispatcher.MoEAlltoAllTokenDispatcher
    with contextlib.ExitStack() as stack:
        for module in _ON_CUDA_DEVICE:
            stack.enter_context(_replaced(module, "torch", stand_in))
        for old, new in _COLLECTIVES.items():
            for module in (layers, mappings):
                function = getattr(dist, new, getattr(module, old))  # Older torch has the old one only.
                stack.enter_context(_replaced(module, old, function))
        stack.enter_context(_replaced(random, "_get_cuda_rng_state", _get_state))
        stack.enter_context(_replaced(random, "_set_cuda_rng_state", _set_state))
        stack.enter_context(_replaced(alltoall, "cuda_dtoh_stream", stream))
        if not hasattr(moe_utils, "te_general_gemm"):
            stack.enter_context(_lent(moe_utils, "te_general_gemm", None))
        stack.enter_context(_replaced(transformer_block, "LayerNormImpl", FinalNorm))
        stack.enter_context(_replaced(token_dispatcher, "maybe_move_tensor_to_cpu", _as_counts))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _lent(owner: Any, name: str, value: object) -> Iterator[None]:
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)


def _torch_without_cuda(stream: NoStream) -> ModuleType:
    """Return a module that is torch in everything but the current CUDA device and its streams."""
    cuda = _copy_of(torch.cuda)
    cuda.current_device = lambda: torch.device("cpu")  # type: ignore[attr-defined]
    cuda.Stream = cuda.current_stream = lambda: stream  # type: ignore[attr-defined]
    cuda.stream = contextlib.nullcontext  # type: ignore[attr-defined]
    stand_in = _copy_of(torch)
    stand_in.cuda = cuda  # type: ignore[attr-defined]
    return stand_in


def _copy_of(module: ModuleType) -> ModuleType:
    """Return a module with the same contents: looking a name up in it costs what it costs in the original."""
    copy = ModuleType(module.__name__, module.__doc__)
    copy.__dict__.update(vars(module))
    return copy


def _seeded_state(seed: int) -> Tensor:
    return torch.Generator().manual_seed(seed).get_state()


def _as_counts(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


def _get_state(*_: object, **__: object) -> Tensor:
    # The CPU's state is saved and restored by recomputation itself, next to this one.
    return torch.get_rng_state()


def _set_state(state: Tensor, *_: object, **__: object) -> None:
    torch.set_rng_state(state)
