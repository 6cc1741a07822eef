"""Megatron loops: steps of a job in the hands of a training loop of Megatron's, ``megatron_loops:function``."""

import itertools
import multiprocessing
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor

import loops
import megatrons
from hosts import host
from mimogrid.adapters.megatron import (
    Blocks,
    ForwardBackward,
    MimoOptimizer,
    forward_backward_func,
    get_mimo_optimizer,
)
from mimogrid.core.base.errors import WorldError
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.megatron.cpu import checkpoints_on


@attrs.frozen
class Looped:
    """What a loop saw on a rank: of each step what the optimizer returned, and full states on the first rank."""

    steps: list[tuple[bool, float | None, int | None]]
    state: Mapping[str, Any]
    groups: list[dict[str, Any]]


def function_of(
    job: Job, config: Mapping[str, Any], weights: Mapping[str, Any], rank: int
) -> ForwardBackward:
    """Return a step of the job with the networks of a `MimoModel`, and these weights of a whole one."""
    hosted = {info.stage.module: len(info.layers) for info in job.topology.role(rank).stages}
    made = megatrons.config_of(**config, here=hosted)
    function = forward_backward_func(job, made, encoder_inputs={"vision": _argument(config)})
    if weights:
        function.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
    return function


def _argument(config: Mapping[str, Any]) -> Any:
    return Blocks("pixels", mask="attention_mask") if config.get("eye") else "pixels"


def state_of(function: ForwardBackward) -> dict[str, Any]:
    """Return the whole state on the first rank, as arrays."""
    state = function.embedded.state_dict()
    return {name: tensor.float().numpy() for name, tensor in state.items() if isinstance(tensor, Tensor)}


def models_of(function: ForwardBackward) -> list[Any]:
    """Return the models of this rank as loops hold them."""
    return function.loop_models


def scheduler_of(optimizer: MimoOptimizer, config: OptimizerConfig) -> OptimizerParamScheduler:
    """Return Megatron's scheduler, with a warm-up and a decay."""
    return OptimizerParamScheduler(
        optimizer,  # type: ignore[arg-type]
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=0.0,
        lr_warmup_steps=2,
        lr_decay_steps=8,
        lr_decay_style="linear",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=8,
        wd_incr_style="constant",
    )


def _stepped(
    function: ForwardBackward, optimizer: MimoOptimizer, batches: Any
) -> tuple[bool, float | None, int | None]:
    """Take a step in Megatron's order."""
    models = models_of(function)
    for model in models:
        model.zero_grad_buffer()
    optimizer.zero_grad()
    function(
        **loops.STEP, forward_step_func=loops.step_with(loops.of_tokens), data_iterator=batches, model=models
    )
    return optimizer.step()


def by_job(
    place: RankPlace, job: Job, config: Mapping[str, Any], weights: Mapping[str, Any], steps: int
) -> Looped:
    """Train with the update of the job itself."""
    with host(place):
        function = function_of(job, config, weights, place.rank)
        batches, found = loops.batches(steps=steps), []
        for _ in range(steps):
            function(
                **loops.STEP,
                forward_step_func=loops.step_with(loops.of_tokens),
                data_iterator=batches,
                model=models_of(function),
            )
            assert function.outcome is not None
            found.append((function.outcome.taken, function.outcome.gradient_norm, None))
        state = state_of(function)
        function.embedded.close()
        return Looped(found, state, [])


def by_optimizer(  # noqa: PLR0917 -- what a pool calls has no keywords
    place: RankPlace,
    job: Job,
    config: Mapping[str, Any],
    weights: Mapping[str, Any],
    steps: int,
    options: Mapping[str, Any],
) -> Looped:
    """Train with the optimizer that Megatron's loop has."""
    with host(place):
        function = function_of(job, config, weights, place.rank)
        optimizer = get_mimo_optimizer(function.model, OptimizerConfig(**options))
        batches = loops.batches(steps=steps)
        found = [_stepped(function, optimizer, batches) for _ in range(steps)]
        state, groups = state_of(function), optimizer.param_groups
        function.embedded.close()
        return Looped(found, state, [{**group, "params": len(group["params"])} for group in groups])


def handled(
    place: RankPlace, job: Job, config: Mapping[str, Any], weights: Mapping[str, Any]
) -> dict[str, Any]:
    """Do with a model and its optimizer what a loop may do; return what each rank sees of it."""

    def gradients() -> list[Tensor]:
        return [w.grad.clone() for w in function.embedded.parameters() if w.grad is not None]

    def step(factor: float) -> None:
        function(
            **loops.STEP,
            forward_step_func=loops.step_with(partial(_times, factor)),
            data_iterator=loops.batches(),
            model=function.model,
        )

    with host(place):
        function = function_of(job, config, weights, place.rank)
        made = OptimizerConfig(
            optimizer="sgd", lr=1.0, sgd_momentum=0.0, clip_grad=0.0, log_num_zeros_in_grad=True
        )
        optimizer, model = get_mimo_optimizer(function.model, made), function.loop_models[0]
        step(1.0)
        whole, norm = gradients(), optimizer.get_grad_norm()
        with model.no_sync():
            model.start_grad_sync()
        model.finish_grad_sync(force_all_reduce=False)
        unchanged = all(map(torch.equal, whole, gradients()))
        model.scale_gradients(0.5)
        halved = all(torch.equal(0.5 * one, other) for one, other in zip(whole, gradients(), strict=True))
        before = state_of(function)
        success, half, zeros = optimizer.step()
        after = state_of(function)
        # A local state comes back as it was.
        kept = {
            **optimizer.state_dict(),
            "state": {
                n: {k: t.clone() for k, t in of.items()} for n, of in optimizer.state_dict()["state"].items()
            },
        }
        step(1.0)
        optimizer.step()
        optimizer.load_state_dict(kept)
        back = state_of(function)
        step(float("nan"))
        lost = optimizer.step()
        same = state_of(function)
        model.zero_grad_buffer()
        found = {
            "unchanged": unchanged,
            "halved": halved,
            "norms": (norm, half),
            "zeros": zeros,
            "success": success,
            "moved": [name for name in before if not (before[name] == after[name]).all()],
            "lost": lost,
            "back": [name for name in after if not (back[name] == after[name]).all()],
            "same": [name for name in after if not (same[name] == after[name]).all()],
            "cleared": not any(map(torch.any, gradients())),
            "scale": optimizer.get_loss_scale().tolist(),
            "groups": [
                (group["module"], group["wd_mult"], len(group["params"])) for group in optimizer.param_groups
            ],
            "unwrapped": unwrap_model(function.model) is function.model,
            "config": get_model_config(model).hidden_size,
            "dp_cp": model.pg_collection.dp_cp.size(),
            "names": [name for name, _ in model.named_parameters()]
            == [n for n, _ in model.module.named_parameters()],
            "values": sum(w.numel() for w in function.embedded.parameters()),
        }
        function.embedded.close()
        return found


def _times(factor: float, loss_mask: Tensor, output: Tensor) -> Any:
    loss, count, report = loops.of_tokens(loss_mask, output)
    return loss * factor, count, report


def of_rank(job: Job, rank: int, *, late: int = 0, ids: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the part of each microbatch that Megatron's loaders have on a rank, `late` by so many microbatches.

    The language model's ranks have tokens and no images. An encoder's have images, and `ids` or tokens.
    """
    role, total = job.topology.role(rank), loops.SAMPLES
    for microbatch, whole in enumerate(itertools.islice(loops.batches(steps=3), late, None)):
        (name,) = role.modules
        part = job.topology.modules[name].samples(
            role.modules[name].position["dp"], microbatch % loops.MICROBATCHES, total
        )
        first = microbatch % loops.MICROBATCHES * (total // loops.MICROBATCHES)
        here = slice(part.start - first, part.stop - first)
        text = {key: value[here] for key, value in whole.items() if isinstance(value, Tensor)} | {
            "sample_ids": torch.arange(part.start, part.stop) + 100 * (microbatch + late)
        }
        if name == "language":
            yield (
                text
                if role.modules[name].is_first_stage or role.modules[name].is_last_stage
                else {"input_ids": None}
            )
            continue
        counts = (whole["input_ids"] == megatrons.PLACEHOLDER).sum(dim=1).tolist()
        begin = sum(counts[: here.start])
        pixels = whole["modality_inputs"]["vision"]["eye"]["pixels"]
        mine = pixels[begin : begin + sum(counts[here])]
        known = (
            {"input_ids": None, "sample_ids": text["sample_ids"]} if ids else {"input_ids": text["input_ids"]}
        )
        yield {**known, "modality_inputs": {"vision": {"eye": {"pixels": mine}}} if len(mine) else None}


def per_rank(  # noqa: PLR0917 -- what a pool calls has no keywords
    place: RankPlace,
    job: Job,
    config: Mapping[str, Any],
    weights: Mapping[str, Any],
    late: int,
    ids: bool,
) -> tuple[list[Any], list[Any], str]:
    """Take a step on whole microbatches, and one on batches of the ranks' own; return reports and gradients of both.

    With loaders of encoders that are `late`, return what the rank is told instead.
    """
    found = []
    step = loops.step_with(loops.of_tokens)
    is_late = late if "vision" in job.topology.role(place.rank).modules else 0
    for way in ("per_rank", "whole"):
        with host(attrs.evolve(place, meeting=f"{place.meeting}-{way}")):
            hosted = {info.stage.module: len(info.layers) for info in job.topology.role(place.rank).stages}
            made = megatrons.config_of(**config, here=hosted)
            function = forward_backward_func(
                job, made, encoder_inputs={"vision": "pixels"}, optimizer="host", batches=way
            )
            function.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
            mine = of_rank(job, place.rank, late=is_late, ids=ids) if way == "per_rank" else loops.batches()
            try:
                reports = function(
                    **loops.STEP, forward_step_func=step, data_iterator=mine, model=function.model
                )
            except (WorldError, StopIteration) as error:
                return [], [], f"{type(error).__name__}: {error}"
            gradients = [w.grad.tolist() for w in function.embedded.parameters() if w.grad is not None]
            found.append([reports, gradients])
            function.embedded.close()
    return found[0], found[1], ""


def resumed(  # noqa: PLR0917 -- what a pool calls has no keywords
    place: RankPlace,
    job: Job,
    config: Mapping[str, Any],
    options: Mapping[str, Any],
    folders: tuple[Path | None, Path | None],
    weights: Mapping[str, Any],
    steps: int,
) -> Mapping[str, Any]:
    """Load a distributed checkpoint of Megatron's, or weights where there is none, train, and perhaps save another.

    Return the state, on the first rank.
    """
    # Its writer starts processes, which the ranks of a pool may not.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    load, save = folders
    with host(place):
        function = function_of(job, config, {} if load else weights, place.rank)
        made = OptimizerConfig(**options)
        optimizer = get_mimo_optimizer(function.model, made)
        scheduler = scheduler_of(optimizer, made)
        done = 0
        if load:
            loaded = dist_checkpointing.load(_sharded(function, optimizer, is_loading=True), str(load))
            for chunk, model in enumerate(models_of(function)):
                model.load_state_dict(loaded[f"model{chunk}"])
            optimizer.load_state_dict(loaded["optimizer"])
            scheduler.load_state_dict(loaded["scheduler"])
            done = loaded["iteration"]
        batches = loops.batches(steps=8)
        for _ in range(done * loops.MICROBATCHES):
            next(batches)
        for _ in range(steps):
            success, _, _ = _stepped(function, optimizer, batches)
            assert success
            scheduler.step(increment=1)
        state = state_of(function)
        if save:
            sharded = {
                **_sharded(function, optimizer),
                "scheduler": scheduler.state_dict(),
                "iteration": done + steps,
            }
            if place.rank == 0:
                save.mkdir()
            torch.distributed.barrier()
            with checkpoints_on(torch.device("cpu")):
                dist_checkpointing.save(sharded, str(save))
        function.embedded.close()
        return state


def shards(
    place: RankPlace, job: Job, config: Mapping[str, Any], options: Mapping[str, Any]
) -> list[tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Take a step and return what this rank writes to a distributed checkpoint: key, whole shape, offset, shape."""
    with host(place):
        function = function_of(job, config, {}, place.rank)
        optimizer = get_mimo_optimizer(function.model, OptimizerConfig(**options))
        _stepped(function, optimizer, loops.batches())
        found = _sharded(function, optimizer)
        apply_factories(found)
        function.embedded.close()
    return [
        (shard.key, tuple(shard.global_shape), tuple(shard.global_offset), tuple(shard.local_shape))
        for shard in nested_values(found)
        if isinstance(shard, ShardedTensor) and is_main_replica(shard.replica_id)
    ]


def _sharded(
    function: ForwardBackward, optimizer: MimoOptimizer, *, is_loading: bool = False
) -> dict[str, Any]:
    metadata = {"non_homogeneous_layers": True}
    model = {
        f"model{chunk}": each.sharded_state_dict(metadata=metadata)
        for chunk, each in enumerate(models_of(function))
    }
    return {**model, "optimizer": optimizer.sharded_state_dict(model, is_loading=is_loading)}
