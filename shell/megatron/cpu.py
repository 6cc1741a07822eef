"""CPU: what megatron-core needs CUDA for, and its replacements.

Torch is not patched. While `on_device` is open, a few module globals of megatron-core are replaced. On every device:

- The random-state tracker. On CUDA the replacement is of Megatron's own class, with the state that sequence parallelism
  needs. On the CPU it is one that forks the CPU's generator.
- The global memory buffer, which only Megatron's `initialize_model_parallel` would make.
- A flag that Megatron has warned that CUDA_DEVICE_MAX_CONNECTIONS is not 1. With 1 all streams would share one queue,
  and a receive posted ahead would stop the computing (`shell.device.place.prepare`).

On the CPU only:

- The name ``torch`` in some files. Megatron's sequence-parallel mappings, its buffer and its routers allocate on
  ``torch.cuda.current_device()``; in these files that is the CPU. Its dispatcher copies token counts to the host on
  streams; in these files they do nothing, because the counts are there already.
- The function for such copies. It returns what was not on CUDA unchanged, but torch's collectives take counts as
  numbers, not as tensors.
- Two functions by which recomputation saves and restores the state of the CUDA generator.
- A name that the routers of megatron-core 0.16 look for, and do not find without transformer-engine.
- The norm at the end of a block of layers. Without transformer-engine or Apex it refuses sequence parallelism.
- Two collectives that Megatron imports from torch by names that torch 2.13 deprecates, with a warning at each call.

`checkpoints_on` does the same for the files that write Megatron's distributed checkpoints.

>>> with on_device(torch.device("cpu")):
...     mappings.torch.cuda.current_device()
device(type='cpu')
>>> mappings.torch is torch
True
"""

import contextlib
import copy
import importlib
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, utils
from megatron.core.models.common.embeddings import rotary_pos_embedding
from megatron.core.tensor_parallel import layers, mappings, random
from megatron.core.transformer import transformer_block
from megatron.core.transformer.moe import moe_utils, router, token_dispatcher
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


_ON_CUDA_DEVICE = (layers, mappings, utils, router, token_dispatcher, rotary_pos_embedding)
"""Files of megatron-core that use the current CUDA device, and that stages or a host program's networks run."""


_LINEAR = layers.linear_with_grad_accumulation_and_async_allreduce
_COLLECTIVES = {
    "dist_all_gather_func": "all_gather_single",
    "dist_reduce_scatter_func": "reduce_scatter_single",
}


class NoStream:
    """A stream and an event for a device that works in the order of the calls."""

    def record_event(self) -> "NoStream":
        """Return an event that has already happened."""
        return self

    def synchronize(self) -> None:
        """Return at once."""


class FinalNorm:
    """Megatron's wrapper of torch's norm, with the mark of parameters whose gradients are partial under sp."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float) -> Any:
        """Return the norm that the configuration names."""
        without_sp = copy.copy(config)
        without_sp.sequence_parallel = False
        norm = WrappedTorchNorm(without_sp, hidden_size, eps)
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
        """Whether there are states. Megatron asks before it makes a tracker of its own."""
        return True

    def reset(self) -> None:
        """Forget every state."""
        self._states = {}

    def add(self, name: str, seed: int) -> None:
        """Track one more state."""
        assert name not in self._states, name
        self._states[name] = _seeded_state(seed)

    def get_states(self) -> dict[str, Tensor]:
        """Return every state. Recomputation saves them."""
        return dict(self._states)

    def set_states(self, states: Mapping[str, Tensor]) -> None:
        """Restore saved states."""
        self._states = dict(states)

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Run on a named state. Forks nest: an inner fork leaves the state of the outer one as it is."""
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
    """Let Megatron's modules be built and run on `device` while open.

    Forward *and* backward need it, because sequence parallelism and recomputation run in both.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(random, "_CUDA_RNG_STATE_TRACKER", _random_states(device, seed)))
        stack.enter_context(_replaced(random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True))
        stack.enter_context(_replaced(parallel_state, "_GLOBAL_MEMORY_BUFFER", None))
        parallel_state._set_global_memory_buffer()
        stack.enter_context(_replaced(_LINEAR, "warned", True))
        if device.type == "cpu":
            stack.enter_context(_without_cuda())
        yield


@contextlib.contextmanager
def checkpoints_on(device: torch.device) -> Iterator[None]:
    """Let Megatron's distributed checkpoints be written by ranks on `device` while open.

    Their writer waits for CUDA's copies, and sends a word on the current CUDA device that all ranks have written.
    """
    with contextlib.ExitStack() as stack:
        if device.type == "cpu":
            stand_in = _torch_without_cuda(NoStream())
            for name in ("filesystem_async", "state_dict_saver"):
                module = importlib.import_module(f"megatron.core.dist_checkpointing.strategies.{name}")
                stack.enter_context(_replaced(module, "torch", stand_in))
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
    """Return a copy of torch with another current CUDA device and other streams."""
    cuda = _copy_of(torch.cuda)
    cuda.current_device = lambda: torch.device("cpu")  # type: ignore[attr-defined]
    cuda.Stream = cuda.current_stream = lambda: stream  # type: ignore[attr-defined]
    cuda.stream = contextlib.nullcontext  # type: ignore[attr-defined]
    cuda.synchronize = stream.synchronize  # type: ignore[attr-defined]
    stand_in = _copy_of(torch)
    stand_in.cuda = cuda  # type: ignore[attr-defined]
    return stand_in


def _copy_of(module: ModuleType) -> ModuleType:
    """Return a module with the same contents. Looking up a name costs the same as in the original."""
    copy = ModuleType(module.__name__, module.__doc__)
    copy.__dict__.update(vars(module))
    return copy


def _seeded_state(seed: int) -> Tensor:
    return torch.Generator().manual_seed(seed).get_state()


def _as_counts(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


def _get_state(*_: object, **__: object) -> Tensor:
    # Recomputation itself saves and restores the CPU's state, next to this one.
    return torch.get_rng_state()


def _set_state(state: Tensor, *_: object, **__: object) -> None:
    torch.set_rng_state(state)
