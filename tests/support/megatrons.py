"""Megatrons: a small `MimoModel` on one process and in a job's program, with the same weights and samples."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch
import torch.distributed as dist
from megatron.core.models.mimo.config import MimoModelConfig
from megatron.core.models.mimo.model.base import MimoModel
from torch import Tensor, nn

import specs
from hosts import host
from mimogrid.adapters.megatron import forward_backward_func
from mimogrid.core.hashing import draw_bits
from mimogrid.core.models import Gpt
from mimogrid.shell.jobs import Job
from mimogrid.shell.ledger import Ledger
from mimogrid.shell.megatron import ProcessGroupCollection
from mimogrid.shell.megatron.cpu import on_device
from mimogrid.shell.megatron.layers import block_spec
from mimogrid.shell.place import Place


PLACEHOLDER = 99
"""The special token of images; no token of text."""


def config_of(
    *,
    layers: int,
    language: Mapping[str, Any],
    pp: int = 1,
    tp: int = 1,
    here: int | None = None,
    **transformer: Any,
) -> MimoModelConfig:
    """Specify the model; `here` are the layers of the language model's stage for which it is to be built."""
    gpt = Gpt(layers=layers, hidden=specs.HIDDEN, heads=4, vocab=specs.VOCAB)
    layer = block_spec(gpt, layers=layers if here is None else here, tp=tp, ledger=Ledger())
    config = specs.config(pp=pp, layers=layers, tensor_model_parallel_size=tp, **transformer)
    text = specs.language(config=config, transformer_layer_spec=layer, **language)
    return specs.model_config(language_model_spec=text, special_token_ids={"vision": PLACEHOLDER})


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """A world of one process on the CPU, in fp64 where nothing else is said."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with on_device(torch.device("cpu")):
            yield
    finally:
        dist.destroy_process_group()


def drawn(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Draw weights from their names alone, in fp64."""
    found = {}
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            generator = torch.Generator().manual_seed(draw_bits(0, name, "weight") % 2**63)
            found[name] = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.2
    return found


def whole(config: MimoModelConfig) -> nn.Module:
    """Megatron's own model with all of it on one process, in fp64, with weights drawn by name."""
    names = ("tp", "cp", "pp", "dp", "dp_cp", "ep", "expt_tp", "expt_dp", "tp_cp", "tp_ep")
    collection = ProcessGroupCollection(**dict.fromkeys(names, dist.group.WORLD))
    collection.embd = collection.pos_embd = None
    config.language_model_spec.params["pg_collection"] = collection
    model = MimoModel(config).double()
    model.load_state_dict(drawn(model.state_dict()), strict=False)
    return model


def batch_of(job: Job) -> tuple[dict[str, Any], Tensor, Tensor]:
    """All samples of the first step as one batch of Megatron's, with labels and weights [B, S]."""
    assert job.source
    step = job.step(0)
    size = (len(step.samples), job.topology.sequence)
    tokens, labels = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
    weights = torch.zeros(size, dtype=torch.float64)
    pixels = []
    for i, sample in enumerate(step.samples):
        text = job.source.load(sample.id, "language")
        count = len(text["tokens"])
        tokens[i, :count] = text["tokens"].masked_fill(text["tokens"] < 0, PLACEHOLDER)
        labels[i, :count] = text["labels"]
        weights[i, :count] = text["loss_weights"]
        if sample.rows.get("vision"):
            pixels.append(job.source.load(sample.id, "vision")["rows"].double())
    batch = {
        "input_ids": tokens,
        "position_ids": torch.arange(size[1]).expand(size),
        "attention_mask": None,
        "modality_inputs": {"vision": {"eye": {"pixels": torch.cat(pixels)}}},
    }
    return batch, labels, weights


@attrs.frozen
class Seen:
    """What a rank saw: losses, full gradients by Megatron's names (first rank), logits of its lane (last stage)."""

    losses: list[float]
    gradients: Mapping[str, Any]
    logits: list[Any]
    state: Mapping[str, Any]


def expected(job: Job, config: MimoModelConfig) -> Seen:
    """What one process comes to; inside `alone`."""
    model = whole(config)
    batch, labels, weights = batch_of(job)
    logits, _ = model(**batch)
    each = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    loss = (each * weights.flatten()).sum() / weights.sum()
    loss.backward()
    gradients = {name: w.grad.numpy() for name, w in model.named_parameters() if w.grad is not None}
    used = [row[: int(n)] for row, n in zip(logits.detach(), _lengths(job), strict=True)]
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    return Seen([loss.item()], gradients, [torch.cat(used).numpy()], state)


def _lengths(job: Job) -> list[int]:
    return [rows["language"] for rows in job.step(0).rows_out]


def trained(
    place: Place,
    job: Job,
    config: Mapping[str, Any],
    weights: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Seen:
    """Evaluate the first step of a job, then take it, with networks of the model and the weights of a whole one."""
    hosted = {info.stage.module: len(info.layers) for info in job.topology.stages_of(place.rank)}
    with host(place):
        made = config_of(**config, here=hosted.get("language", 0))
        function = forward_backward_func(
            job, made, encoder_inputs={"vision": "pixels"}, optimizer="host", **options
        )
        embedded = function.embedded
        function.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
        arguments: dict[str, Any] = {
            "forward_step_func": None,
            "data_iterator": None,
            "model": [function.model] if function.model else [],
            "num_microbatches": job.spec.batch.microbatches,
            "seq_length": job.topology.sequence,
            "micro_batch_size": 1,
        }
        evaluated = function(**arguments, forward_only=True)
        logits = function(**arguments, forward_only=True, collect_non_loss_data=True)
        losses = function(**arguments)
        crew, gradients = embedded.crew, {}
        if crew is not None:
            of_stage = {
                stage: {name: w.grad for name, w in buffer.weights.items()}
                for stage, buffer in crew.buffers.items()
            }
            gradients = crew.collect(of_stage)
        state = function.state_dict()
        embedded.close()
        return Seen(
            [float(each["lm loss"]) for each in (*losses, *evaluated)],
            {name: gradient.numpy() for name, gradient in gradients.items()},
            [each["logits"].detach().numpy() for each in logits],
            {name: tensor.numpy() for name, tensor in state.items()},
        )

