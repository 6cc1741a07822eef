"""The model of this rank as Megatron's training loop holds it: with the methods of its data-parallel wrappers.

A step of a job sums gradients and gathers weights by its own program, so the calls by which a loop starts and ends
these find nothing left to do. What changes values does so here, too: `zero_grad_buffer` and `scale_gradients`.

State dicts and parameters have the names of the model inside, as with Megatron's wrappers. Its `unwrap_model` returns
this object, whose other attributes are those of the model inside.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from mimogrid.adapters.megatron.grids import LANGUAGE
from mimogrid.adapters.megatron.states import sharded_model
from mimogrid.adapters.torch_module import Embedded
from mimogrid.shell.megatron.names import ProcessGroupCollection
from mimogrid.shell.runtime.gradients import StageBuffer


class LoopModel(nn.Module):
    """A `MimoStages` or `MimoModel` of this rank (`module`) in a training loop of Megatron.

    `embedded` is the job that trains it, and `chunk` the number of the model on a rank with several (virtual stages).
    `collections` has the groups of the modules that this rank hosts.
    """

    force_all_reduce = False
    """Set by Megatron's loop; gradients are all-reduced in any case."""

    def __init__(
        self,
        module: nn.Module,
        embedded: Embedded,
        chunk: int,
        collections: Mapping[str, ProcessGroupCollection],
    ) -> None:
        super().__init__()
        self.module = module
        self.embedded = embedded
        self._chunk = chunk
        self._collections = collections

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Call the model inside."""
        return self.module(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the model inside."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    @property
    def pg_collection(self) -> ProcessGroupCollection:
        """The groups of the language model where this rank has a stage of it, or of the first module here."""
        return self._collections.get(LANGUAGE) or next(iter(self._collections.values()))

    def _stage_buffers(self) -> Iterator[StageBuffer]:
        runtime = self.embedded.runtime
        for stage, buffer in runtime.buffers.items() if runtime else ():
            if stage.chunk == self._chunk:
                yield buffer

    # -- gradients ---------------------------------------------------------------------------------------------

    def zero_grad_buffer(self) -> None:
        """Set all gradients of this rank to zero, as a step does when it begins."""
        for buffer in self._stage_buffers():
            buffer.clear()

    def scale_gradients(self, scaling_factor: float | Tensor) -> None:
        """Multiply all gradients of this rank by a factor; the norm by which the optimizer clips is then theirs."""
        for buffer in self._stage_buffers():
            buffer.scale(scaling_factor)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Do nothing: a step all-reduces a bucket once, after its last backward."""
        yield

    def start_grad_sync(self, *unused: Any) -> None:
        """Do nothing: the program of a step posts its all-reduces."""

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Do nothing: gradients are complete when a step returns."""

    # -- weights -----------------------------------------------------------------------------------------------

    def start_param_sync(self, *unused: Any, force_sync: bool = False, force_dispatch: bool = False) -> None:
        """Do nothing: an update ends with the weights of all ranks."""

    def enable_forward_pre_hook(self) -> None:
        """Do nothing: no forward waits for weights."""

    def disable_forward_pre_hook(self, param_sync: bool = True) -> None:
        """Do nothing: no forward waits for weights."""

    def free_overlap_buffers(self) -> None:
        """Do nothing: there are no such buffers."""

    def broadcast_params(self) -> None:
        """Do nothing: all dp ranks begin with the weights of the first, and take the same steps."""

    # -- names -------------------------------------------------------------------------------------------------

    def named_parameters(self, *arguments: Any, **named: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters by their names in the model inside."""
        return self.module.named_parameters(*arguments, **named)

    def state_dict(self, *arguments: Any, **named: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the state dict of the model inside: this rank's parts."""
        return self.module.state_dict(*arguments, **named)

    def state_dict_for_save_checkpoint(self, *arguments: Any, **named: Any) -> dict[str, Any]:
        """Return the state dict of the model inside, under the name by which Megatron's checkpoints ask for it."""
        return self.state_dict(*arguments, **named)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return this rank's parts for Megatron's distributed checkpoints, under Megatron's names."""
        return sharded_model(self.module, self._collections, prefix, sharded_offsets, metadata or {})

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load this rank's parts; in half precision `MimoOptimizer.reload_model_params` takes them over."""
        return self.module.load_state_dict(state_dict, strict=strict, assign=assign)
