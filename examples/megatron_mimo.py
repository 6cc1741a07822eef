"""A training program in the style of Megatron-LM's MIMO example, and the few lines that move it to mimogrid.

    torchrun --nproc-per-node 4 examples/megatron_mimo.py

A vision encoder on two dp ranks (ranks 0 and 1) feeds a language model on two pipeline stages (ranks 2 and 3).
Specifications, special tokens, grids, forward step, loss and the call of the schedule follow Megatron. The lines that
use mimogrid are marked. The model learns to name the colour of an image, one of four.
"""

import os
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.mimo.config import MimoModelConfig
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from mimogrid.adapters.megatron import forward_backward_func, layer_spec, open_job_of  # mimogrid
from mimogrid.core.job.spec import BatchSpec, OptimizerSpec  # mimogrid


IMAGE_TOKEN, QUESTION, COLOURS = -1, 4, 4
SEQUENCE, PATCHES, FEATURES = 8, 4, 6
MICROBATCHES, MICRO_BATCH = 4, 8


class Eye(nn.Module):
    """Maps the patches [R, F] of all images to rows [R, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, patches):
        """Return a row for each patch."""
        return self.layers(patches)


def model_config() -> MimoModelConfig:
    """Return the specification of the model, as Megatron takes it."""
    text = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
        **ON_CPU,
    )
    language = {
        "config": text,
        "transformer_layer_spec": layer_spec(text),  # mimogrid: runs on the CPU; on CUDA use Megatron's
        "position_embedding_type": "none",  # the layer itself has rotary positions
        "vocab_size": 8,
        "max_sequence_length": SEQUENCE,
    }
    projection = ModuleSpec(nn.Linear, {"in_features": 16, "out_features": 32})
    parts = {"encoders": {"eye": ModuleSpec(Eye, {"width": 16})}, "input_projections": [projection]}
    return MimoModelConfig(
        language_model_spec=ModuleSpec(GPTModel, language),
        modality_submodules_spec={"vision": ModuleSpec(VisionModalitySubmodules, submodules=parts)},
        special_token_ids={"vision": IMAGE_TOKEN},
    )


ON_CPU = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "use_cpu_initialization": True,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "gradient_accumulation_fusion": False,
    "cuda_graph_scope": [],
}


def module_grids() -> dict[str, HyperCommGrid]:
    """RankPlace the modules on ranks, as Megatron does."""
    return {
        "vision": HyperCommGrid([1, 1, 2, 1], ["tp", "cp", "dp", "pp"], rank_offset=0),
        "language": HyperCommGrid([1, 1, 1, 2], ["tp", "cp", "dp", "pp"], rank_offset=2),
    }


def microbatches():
    """Yield the model's arguments for each microbatch: the whole microbatch, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    while True:
        colours = torch.randint(COLOURS, (MICRO_BATCH,), generator=generator)
        patches = torch.randn(MICRO_BATCH, PATCHES, FEATURES, generator=generator) * 0.1
        patches[torch.arange(MICRO_BATCH), :, colours] += 1
        tokens = torch.full((MICRO_BATCH, SEQUENCE), QUESTION)
        tokens[:, :PATCHES] = IMAGE_TOKEN
        labels, loss_mask = torch.zeros_like(tokens), torch.zeros(MICRO_BATCH, SEQUENCE)
        labels[:, PATCHES] = colours
        loss_mask[:, PATCHES] = 1
        yield {
            "input_ids": tokens,
            "position_ids": torch.arange(SEQUENCE).expand_as(tokens),
            "attention_mask": None,
            "loss_mask": loss_mask,
            "labels": labels,
            "modality_inputs": {"vision": {"eye": {"patches": patches.flatten(0, 1)}}},
        }


def loss_func(loss_mask, output):
    """Return the sum of the losses of a microbatch, how many tokens they are of, and what is reported."""
    loss, tokens = (output.float() * loss_mask).sum(), loss_mask.sum()
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens])}


def forward_step(data_iterator, model):
    """Run the model on a microbatch."""
    output, loss_mask = model(**next(data_iterator))
    return output, partial(loss_func, loss_mask)


def main(iterations: int = 30) -> list[float]:
    """Train, and return the loss of every iteration, on the rank of the last stage."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    config, grids = model_config(), module_grids()

    # Was: model = MimoModel(config); forward_backward = get_forward_backward_func()
    job = open_job_of(  # mimogrid
        config,
        grids,
        batch=BatchSpec(global_size=MICROBATCHES * MICRO_BATCH, microbatches=MICROBATCHES),
        optimizer=OptimizerSpec(lr=3e-3),
    )
    forward_backward = forward_backward_func(job, config)  # mimogrid
    model = forward_backward.model  # this rank's part of it, with Megatron's names
    step = {
        "forward_step_func": forward_step,
        "data_iterator": microbatches(),
        "model": [model],
        "num_microbatches": MICROBATCHES,
        "seq_length": SEQUENCE,
        "micro_batch_size": MICRO_BATCH,
    }

    losses = []
    for iteration in range(iterations):
        losses_reduced = forward_backward(**step)
        # Was: finalize_model_grads(...); optimizer.step(). The call above has done both.  mimogrid
        if losses_reduced:
            losses.append(mean_of(losses_reduced))
            if iteration % 10 == 9:
                print(f"iteration {iteration + 1}: lm loss {losses[-1]:.4f}")

    evaluated = forward_backward(**step, forward_only=True)
    if evaluated:
        print(f"evaluated: lm loss {mean_of(evaluated):.4f}")
    forward_backward.embedded.close()  # mimogrid
    return losses


def mean_of(losses_reduced) -> float:
    """Return the mean over the tokens of all microbatches; the language model has one dp rank."""
    total, tokens = torch.stack([each["lm loss"] for each in losses_reduced]).sum(dim=0)
    return float(total / tokens)


if __name__ == "__main__":
    if "RANK" not in os.environ:
        raise SystemExit("Start four ranks: torchrun --nproc-per-node 4 examples/megatron_mimo.py")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main()
    dist.destroy_process_group()
