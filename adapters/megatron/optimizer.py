"""An optimizer as Megatron's training loop calls it, over the update of a job.

    optimizer = get_mimo_optimizer(function.model, OptimizerConfig(lr=1e-3, bf16=True))
    function(...)                                  # gradients, summed and finite on all ranks or on none
    success, grad_norm, zeros = optimizer.step()   # clips by the norm of all modules, updates, gathers weights

One optimizer of torch updates the main parameters of this rank: all of them, or with the distributed optimizer (ZeRO
stage 1) its shards. Its groups are those of Megatron: by module, those with weight decay and those without (biases and
all weights of one dim). Whether a step is taken is decided by all ranks together in the step itself, before a loss
scale changes. In Megatron each module's scaler changes before the ranks agree, so an overflow in one module leaves the
modules with different scales.

In a distributed checkpoint a weight's states lie like the weight, under ``optimizer.state.STATE.KEY``, and its main
parameter is ``fp32_param``. So a checkpoint loads under any layout that the weights load under, with a distributed
optimizer or without one. Whatever is not a tensor is an object of its own, the same on every rank that has it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from torch import Tensor, nn

from mimogrid.adapters.megatron.loop import LoopModel
from mimogrid.adapters.torch_module import Embedded
from mimogrid.core.base.errors import PlanError, Problem, WorldError
from mimogrid.core.job.precision import HALF
from mimogrid.core.job.spec import LossScaleSpec, OptimizerSpec
from mimogrid.core.update.decision import SkipState
from mimogrid.core.update.reductions import exact_terms, sum_of_terms
from mimogrid.shell.runtime.exchange import gather_values
from mimogrid.shell.runtime.gradients import Buffer
from mimogrid.shell.runtime.rank import RankRuntime, shards_of


MAIN = "fp32_param"
"""Megatron's name for main parameters in a checkpoint."""
_COUNTER = "step"
_STATES = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
_PREFIX = "optimizer.mimo"


def optimizer_spec_of(config: OptimizerConfig) -> OptimizerSpec:
    """Return the `[optimizer]` of a job that is updated by `get_mimo_optimizer` with this configuration.

    It says how the update is shared and how the loss scale moves. (There is no hysteresis: each overflow lowers the
    scale.) Rates are those of the configuration until a scheduler of Megatron sets them.
    """
    return OptimizerSpec(
        name="adamw" if config.optimizer == "adam" else config.optimizer,
        lr=config.lr or 0.0,
        clip_norm=config.clip_grad,
        weight_decay=config.weight_decay,
        sharded=config.use_distributed_optimizer,
        loss_scale=LossScaleSpec(
            initial=config.initial_loss_scale,
            interval=int(config.loss_scale_window),
            minimum=config.min_loss_scale,
        ),
    )


def get_mimo_optimizer(
    mimo_model: LoopModel | Sequence[LoopModel] | None, config: OptimizerConfig
) -> "MimoOptimizer":
    """Return the optimizer of a model that a job trains; every rank of the job calls it.

    `mimo_model` is `ForwardBackward.model`, and None on a rank without a model. From here on a step stops at the
    gradients, and `MimoOptimizer.step` updates the weights.

    Raises PlanError for settings that a job does not have, and for those that differ from the job's.
    """
    models = [mimo_model] if isinstance(mimo_model, nn.Module) else list(mimo_model or ())
    if not models:
        return MimoOptimizer(None, config)
    problems = list(_unable(config)) + list(_different(config, models[0].embedded))
    if problems:
        raise PlanError(problems)
    return MimoOptimizer(models[0].embedded, config)


def _unable(config: OptimizerConfig) -> Iterator[Problem]:
    """Yield settings that a job does not have."""
    if config.optimizer not in _STATES:
        fact = f"is '{config.optimizer}'."
        yield Problem("optimizer.optimizer", fact, f"Take one of {', '.join(_STATES)}.")
    for setting in ("use_precision_aware_optimizer", "optimizer_cpu_offload", "decoupled_lr"):
        if getattr(config, setting, None):
            yield Problem(f"optimizer.{setting}", "is set; a job has no counterpart.", "Leave it out.")


def _different(config: OptimizerConfig, embedded: Embedded) -> Iterator[Problem]:
    """Yield settings in which the configuration and the job differ; buffers are made for those of the job."""
    spec = embedded.job.spec
    asked = "bf16" if config.bf16 else "fp16" if config.fp16 else ""
    if asked != (spec.precision if spec.precision in HALF else ""):
        fact = f"is '{spec.precision}', and the optimizer is for {asked or 'full precision'}."
        yield Problem("precision", fact, "Open the job with the same: open_job_of(..., precision=...).")
    if config.use_distributed_optimizer != spec.optimizer.sharded:
        fact = (
            f"is {spec.optimizer.sharded}, and use_distributed_optimizer {config.use_distributed_optimizer}."
        )
        remedy = "Open the job with open_job_of(..., optimizer=optimizer_spec_of(config))."
        yield Problem("optimizer.sharded", fact, remedy)
    scale = config.loss_scale
    if (
        config.fp16
        and scale
        and (spec.optimizer.loss_scale.initial, spec.optimizer.loss_scale.growth) != (scale, 1)
    ):
        fact = f"is fixed at {scale:g}, the job's moves."
        yield Problem(
            "optimizer.loss_scale", fact, "Open the job with an equal initial scale, growth = 1, backoff = 1."
        )


@attrs.frozen(eq=False)
class _Weight:
    """A weight that this rank trains, whole, and its place in the bucket of its gradients."""

    weight: nn.Parameter
    buffer: Buffer
    start: int

    def of(self, flat: Tensor) -> Tensor:
        """Return its part of a flat tensor as long as the bucket."""
        return flat[self.start : self.start + self.weight.numel()].view_as(self.weight)


class MimoOptimizer:
    """Megatron's optimizer of a `MimoModel`, over the update of a job (`get_mimo_optimizer`).

    `param_groups` are those of torch's optimizer, for Megatron's scheduler, which sets ``lr`` and ``weight_decay``.
    Each also has the name of its `module` and Megatron's ``wd_mult``, ``max_lr`` and ``min_lr``.
    """

    def __init__(self, embedded: Embedded | None, config: OptimizerConfig) -> None:
        self.config = config
        self._embedded = embedded
        self._runtime: RankRuntime | None = None
        if embedded is not None:
            embedded.defer_updates()
            self._runtime = embedded.runtime
        self.param_groups: list[dict[str, Any]] = []
        if self._runtime is not None:
            self.param_groups = list(_groups(self._runtime, config))
            some = any(group["params"] for group in self.param_groups)
            self._runtime.optimizer = self.optimizer = (
                _torch_optimizer(self.param_groups, config) if some else None
            )
            if self.optimizer is not None:
                self.param_groups = self.optimizer.param_groups
        self.is_stub_optimizer = not any(group["params"] for group in self.param_groups)

    # -- a step ------------------------------------------------------------------------------------------------

    def prepare_grads(self) -> bool:
        """Return whether a gradient or a loss of any rank was not finite in the last step."""
        outcome = self._embedded.outcome if self._embedded else None
        return outcome is not None and not outcome.taken

    def get_grad_norm(self) -> float:
        """Return the norm of the gradients of all modules and ranks; every rank of the job calls it."""
        if self._runtime is None:
            return 0.0
        mine = exact_terms(part for buffer in self._runtime.buffers.values() for part in buffer.partials())
        terms = torch.tensor(mine, dtype=torch.float64, device=self._runtime.device.torch)
        return float(sum_of_terms(gather_values(self._runtime, terms).flatten().tolist()) ** 0.5)

    def count_zeros(self) -> int:
        """Return how many values of the gradients of all modules are 0; every rank of the job calls it."""
        if self._runtime is None:
            return 0
        zeros = [
            (part == 0).sum()
            for of_stage in self._runtime.buffers.values()
            for buffer in of_stage.buffers
            for part in buffer.parts(of_stage.counted)
        ]
        mine = torch.tensor(
            [sum(int(each) for each in zeros)], dtype=torch.float64, device=self._runtime.device.torch
        )
        return int(gather_values(self._runtime, mine).sum())

    def step(self) -> tuple[bool, float | None, int | None]:
        """Clip and update; return whether the weights were updated, the grad norm, and how many gradients are 0.

        All ranks update, or none does. The norm is None if none does, and the count unless `log_num_zeros_in_grad` asks
        for it, as in Megatron.
        """
        if self.prepare_grads():
            return False, None, None
        if self._embedded is None or self._runtime is None:
            return True, None, None
        norm = self.get_grad_norm()
        if norm in (
            float("inf"),
            float("nan"),
        ):  # Gradients were scaled since all of them were seen to be finite.
            return False, None, None
        zeros = self.count_zeros() if self.config.log_num_zeros_in_grad else None
        self._embedded.update(norm, limit=self.config.clip_grad)
        return True, norm, zeros

    def step_with_ready_grads(self) -> bool:
        """Update without clipping; every rank of the job calls it."""
        if self._embedded is not None:
            self._embedded.update(0.0, limit=0.0)
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to zero. None is left without: they are parts of buffers."""
        for buffer in self._runtime.buffers.values() if self._runtime else ():
            buffer.clear()

    def get_loss_scale(self) -> Tensor:
        """Return what the losses of the next step are multiplied by, float32 [1]."""
        scale = self._runtime.skip_state.scale if self._runtime else 1.0
        return torch.tensor([scale], dtype=torch.float32)

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Return the loss: a step multiplies it by the loss scale itself."""
        return loss

    def get_parameters(self) -> list[nn.Parameter]:
        """Return the main parameters that this rank updates, flat."""
        return [main for group in self.param_groups for main in group["params"]]

    def prepare_model_params_for_param_sync(self) -> None:
        """Do nothing: an update ends with the weights of all ranks."""

    def reload_model_params(self, state_dict: Mapping[str, Any] | None = None) -> None:
        """Take over weights that were loaded into the model: main parameters are copies of them in half precision."""
        for of_stage in self._runtime.buffers.values() if self._runtime else ():
            for buffer in of_stage.buffers:
                buffer.copy_model_to_main()

    # -- checkpoints -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state with the tensors of this rank's weights, whole; all ranks of the job call it.

        The weights are numbered through the rank, so this state loads under the same layout only.
        """
        if self._runtime is None:
            return {}
        groups = {module: _without_params(of) for module, of in self._by_module().items()}
        return {"facts": self._facts(), "param_groups": groups, "state": self._tensors()}

    def sharded_state_dict(
        self,
        model_sharded_state_dict: Mapping[str, Any],
        is_loading: bool = False,
        **options: Any,
    ) -> dict[str, Any]:
        """Return the state for Megatron's distributed checkpoints; all ranks of the job call it.

        `model_sharded_state_dict` has the shards of the model's weights (`LoopModel.sharded_state_dict`), and any other
        entries. What is loaded goes to `load_state_dict`. Raises WorldError for weights that are not among the shards.
        """
        if self._runtime is None:
            return {}
        shards = {
            id(shard.data): shard
            for shard in nested_values(dict(model_sharded_state_dict))
            if isinstance(shard, ShardedTensor | ShardedTensorFactory)
        }
        weights = self._weights()
        lacking = [i for i, each in enumerate(weights) if id(each.weight) not in shards]
        if lacking:
            raise WorldError(
                f"{len(lacking)} of {len(weights)} trained weights of rank {self._runtime.rank} are not in the sharded "
                "state of the model: give the whole of model.sharded_state_dict(), of every chunk."
            )
        rank, topology = self._runtime.rank, self._runtime.topology
        state = {
            number: {
                name: make_sharded_optimizer_tensor(
                    shards[id(weight.weight)], tensor, f"optimizer.state.{name}"
                )
                for name, tensor in tensors.items()
            }
            for (number, tensors), weight in zip(self._tensors().items(), weights, strict=True)
        }
        groups = {
            module: _object(
                f"{_PREFIX}.{module}.param_groups",
                _without_params(of),
                topology.modules[module].grid.ranks.index(rank),
            )
            for module, of in self._by_module().items()
        }
        facts = _object(f"{_PREFIX}.facts", self._facts(), topology.ranks.index(rank))
        return {"facts": facts, "param_groups": groups, "state": state}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state of `state_dict`, or a loaded one of `sharded_state_dict`; all ranks of the job call it.

        The weights are then those of the main parameters in it.
        """
        if self._runtime is None or self._embedded is None:
            return
        facts = state_dict["facts"]
        self._begin_states()
        for module, loaded in state_dict["param_groups"].items():
            for group, values in zip(self._by_module()[module], loaded, strict=True):
                group.update(values)
        for number, weight in enumerate(self._weights()):
            for name, tensor in state_dict["state"][number].items():
                for main, part in self._parts(weight, tensor):
                    (main.data if name == MAIN else self._states(main)[name]).copy_(part)
        for main in self.get_parameters():
            counter = self._states(main).get(_COUNTER)
            if counter is not None:
                counter.fill_(facts["steps_taken"])
        self._runtime.steps_taken = facts["steps_taken"]
        self._runtime.skip_state = SkipState.of(facts["watch"])
        self._embedded.index = facts["index"]
        for of_stage in self._runtime.buffers.values():
            of_stage.copy_main_to_model()
        self._runtime.complete_weights()

    def _facts(self) -> dict[str, Any]:
        """Return what is no tensor and no rate; the same on every rank."""
        assert self._runtime is not None
        assert self._embedded is not None
        return {
            "index": self._embedded.index,
            "steps_taken": self._runtime.steps_taken,
            "watch": attrs.asdict(self._runtime.skip_state),
        }

    def _by_module(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for group in self.param_groups:
            found.setdefault(group["module"], []).append(group)
        return found

    def _weights(self) -> list[_Weight]:
        """Return the weights that this rank trains, in one order."""
        assert self._runtime is not None
        return [
            _Weight(of_stage.weights[span.name], buffer, span.start)
            for of_stage in self._runtime.buffers.values()
            for buffer in of_stage.buffers
            for span in buffer.bucket.spans
        ]

    def _tensors(self) -> dict[int, dict[str, Tensor]]:
        """Return the main parameter and the states of each weight, whole, by its number."""
        self._begin_states()
        flat: dict[tuple[int, str], Tensor] = {}
        found: dict[int, dict[str, Tensor]] = {}
        for number, weight in enumerate(self._weights()):
            for name in (MAIN, *_STATES[self.config.optimizer]):
                key = id(weight.buffer), name
                if key not in flat:
                    flat[key] = self._whole(weight.buffer, name)
                found.setdefault(number, {})[name] = weight.of(flat[key])
        return found

    def _whole(self, buffer: Buffer, name: str) -> Tensor:
        """Return a state of a bucket, or its main parameters, put together from all ranks that share its update."""
        mine = torch.zeros_like(buffer.main)
        for shard, start in _places(buffer):
            mine[start : start + shard.numel()] = (
                shard.detach() if name == MAIN else self._states(shard)[name]
            )
        if not buffer.shared or buffer.shard_group.size() == 1:
            return mine
        every = [torch.empty_like(mine) for _ in range(buffer.shard_group.size())]
        dist.all_gather(every, mine, group=buffer.shard_group)
        return torch.cat(every)

    def _parts(self, weight: _Weight, tensor: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield the main parameters of this rank that are parts of a weight, each with its part of a whole tensor."""
        flat = tensor.to(weight.buffer.main.device).reshape(-1)
        for main, start in _places(weight.buffer):
            begin = start + weight.buffer.own.start - weight.start
            if 0 <= begin < len(flat):
                yield main, flat[begin : begin + main.numel()]

    def _states(self, main: nn.Parameter) -> dict[str, Any]:
        assert self.optimizer is not None
        kept: dict[str, Any] = self.optimizer.state[main]
        return kept

    def _begin_states(self) -> None:
        """Let the states be what torch makes of them before the first update: zeros."""
        for main in self.get_parameters():
            kept = self._states(main)
            for name in _STATES[self.config.optimizer]:
                if kept.get(name) is None:
                    kept[name] = torch.zeros_like(main)
            if self.config.optimizer == "adam":
                kept.setdefault(_COUNTER, torch.zeros((), dtype=torch.float32, device=main.device))


def _places(buffer: Buffer) -> Iterator[tuple[nn.Parameter, int]]:
    """Yield the main parameters of a bucket that this rank updates, and where each begins among them."""
    starts = {span.name: span.start for span in buffer.bucket.spans}
    for shard in buffer.shards:
        yield shard.main, starts[shard.part.name] + shard.part.start - buffer.own.start


def _groups(runtime: RankRuntime, config: OptimizerConfig) -> Iterator[dict[str, Any]]:
    """Yield two groups for each module of this rank: its main parameters with weight decay, and those without.

    A group may be empty, so that all ranks of a module have the same groups.
    """
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for stage in runtime.stages:
        for decays in (True, False):
            members.setdefault((stage.module, decays), [])
    shapes = {
        (stage.module, name): weight.dim()
        for stage, of in runtime.buffers.items()
        for name, weight in of.weights.items()
    }
    for module, shard in shards_of(runtime.buffers):
        name = shard.part.name
        decays = shapes[module, name] > 1 and not name.endswith(".bias")
        members[module, decays].append(shard.main)
    for (module, decays), mains in members.items():
        yield {
            "params": mains,
            "module": module,
            "lr": config.lr or 0.0,
            "max_lr": config.lr or 0.0,
            "min_lr": config.min_lr or 0.0,
            "weight_decay": config.weight_decay if decays else 0.0,
            "wd_mult": 1.0 if decays else 0.0,
        }


def _torch_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr or 0.0, momentum=config.sgd_momentum, fused=True)
    kind = torch.optim.AdamW if config.decoupled_weight_decay else torch.optim.Adam
    betas = config.adam_beta1, config.adam_beta2
    return kind(groups, lr=config.lr or 0.0, betas=betas, eps=config.adam_eps, fused=True)


def _without_params(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


def _object(key: str, value: Any, replica: int) -> ShardedObject:
    """Return an object of a distributed checkpoint; replica 0 writes it."""
    return ShardedObject(key, value, (1,), (0,), replica_id=replica)
