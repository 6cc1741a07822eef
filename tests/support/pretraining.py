"""Pretraining: `examples/megatron_pretrain.py` on the ranks of a pool, and its model under Megatron's own schedule."""

import importlib.util
import multiprocessing
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.models.mimo.model.base import MimoModel
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import schedules
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import megatrons
from hosts import host
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.megatron.names import ProcessGroupCollection


PROGRAM = Path(__file__).parents[2] / "examples/megatron_pretrain.py"


def program() -> Any:
    """Load the program."""
    spec = importlib.util.spec_from_file_location("megatron_pretrain", PROGRAM)
    assert spec
    assert spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@attrs.frozen
class Run:
    """The losses of a run on a rank of the last stage, and the state at its end on the first rank."""

    losses: list[float | None]
    state: Mapping[str, Any]


def pretrained(place: RankPlace, arguments: Sequence[str], weights: Mapping[str, Any], precision: str) -> Run:
    """Run the program on a rank; the first run begins with these weights of a whole model."""
    # Megatron's checkpoint writer starts processes, which the ranks of a pool may not.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    example = program()
    args = example.parse_args(arguments)
    with host(place):
        parts = example.setup_model_and_optimizer(args, precision)
        forward_backward = parts[0]
        forward_backward.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
        losses = example.train(args, *parts)
        state = forward_backward.embedded.state_dict()
        forward_backward.embedded.close()
    kept = {name: tensor.double().numpy() for name, tensor in state.items() if isinstance(tensor, Tensor)}
    return Run(losses, kept)


class InFull(nn.Module):
    """`MimoModel` with losses in the precision of its logits, as Megatron's schedules call it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.model_type = ModelType.encoder_or_decoder

    def set_input_tensor(self, _: Any) -> None:
        """Take nothing: there is no stage before."""

    def forward(self, labels: Tensor, **batch: Any) -> tuple[Tensor, Tensor]:
        """Return losses [B, S] and the loss mask."""
        logits, loss_mask = self.model(**batch)
        return cross_entropy(logits.mT, labels, reduction="none"), loss_mask


def by_megatron(arguments: Sequence[str]) -> tuple[list[float], Mapping[str, Any]]:
    """Train the program's model by Megatron's schedule for one process, inside `megatrons.alone`, in fp64.

    Return the losses and the weights that it begins with.
    """
    example = program()
    grids = {"encoder_tp": 1, "encoder_dp": 1, "llm_tp": 1, "llm_pp": 1, "llm_dp": 1}
    args = example.parse_args(arguments)
    vars(args).update(grids, micro_batch_size=args.micro_batch_size * args.llm_dp)
    config = example.model_provider(args)
    names = ("tp", "cp", "pp", "dp", "dp_cp", "ep", "expt_tp", "expt_dp", "tp_cp", "tp_ep", "tp_dp_cp")
    groups = ProcessGroupCollection(**dict.fromkeys(names, dist.group.WORLD))
    groups.embd = groups.pos_embd = None
    encoder = config.modality_submodules_spec["images"].submodules["encoders"]["clip_encoder"]
    for spec in (config.language_model_spec, encoder):
        spec.params["pg_collection"] = groups
    whole = MimoModel(config).double()
    weights = megatrons.drawn(whole.state_dict())
    whole.load_state_dict(weights, strict=False)
    model = InFull(whole)
    optimizer = torch.optim.AdamW(_groups(whole, args.weight_decay), lr=args.lr, betas=(0.9, 0.999), eps=1e-8)
    scheduler = _scheduler(args, optimizer)

    def finalize(_: Any, num_tokens: Tensor, **__: Any) -> None:
        for weight in whole.parameters():
            assert weight.grad is not None
            weight.grad /= num_tokens

    whole.config.finalize_model_grads_func = finalize
    iterator, losses = (
        example.microbatches(args, 0, args.micro_batch_size, args.micro_batch_size, has_text=True),
        [],
    )
    images = example.microbatches(args, 0, args.micro_batch_size, args.micro_batch_size, has_text=False)
    both = (
        {**text, "modality_inputs": _doubled(image["modality_inputs"])}
        for text, image in zip(iterator, images, strict=True)
    )
    for _ in range(args.train_iters):
        optimizer.zero_grad()
        with mock.patch.object(schedules, "torch", _without_cuda()):
            reports = schedules.forward_backward_no_pipelining(
                **{**example.step_arguments(args, model, both), "pg_collection": groups}
            )
        total, tokens = torch.stack([report["lm loss"] for report in reports]).sum(dim=0)
        losses.append(float(total / tokens))
        norm = torch.stack([w.grad.square().sum() for w in whole.parameters()]).sum().sqrt()  # type: ignore[union-attr]
        for weight in whole.parameters():
            assert weight.grad is not None
            weight.grad *= min(1.0, args.clip_grad / float(norm))
        optimizer.step()
        scheduler.step(increment=args.global_batch_size)
    return losses, {name: weight.numpy() for name, weight in weights.items()}


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    decayed = [w for w in model.parameters() if w.dim() > 1]
    others = [w for w in model.parameters() if w.dim() <= 1]
    return [
        {"params": decayed, "weight_decay": weight_decay, "wd_mult": 1.0},
        {"params": others, "weight_decay": 0.0, "wd_mult": 0.0},
    ]


def _scheduler(args: Any, optimizer: Any) -> OptimizerParamScheduler:
    each = args.global_batch_size
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=args.lr_warmup_iters * each,
        lr_decay_steps=args.train_iters * each,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.weight_decay,
        end_wd=args.weight_decay,
        wd_incr_steps=args.train_iters * each,
        wd_incr_style="constant",
    )


def _doubled(inputs: Any) -> Any:
    return {
        name: _doubled(value) if isinstance(value, dict) else value.double() for name, value in inputs.items()
    }


def _without_cuda() -> types.ModuleType:
    """Return a torch whose counter of tokens is on the CPU."""
    stand_in = types.ModuleType("torch")
    stand_in.__dict__.update(vars(torch))

    def zeros(*shape: Any, device: Any = None, **options: Any) -> Tensor:
        return torch.zeros(*shape, **options)

    stand_in.zeros = zeros  # type: ignore[attr-defined]
    return stand_in
