"""A training program in the style of Megatron-LM's MIMO example, and the few lines that put it on mimogrid.

    torchrun --nproc-per-node 4 examples/megatron_mimo.py

A vision encoder on two data lanes (ranks 0 and 1) feeds a language model on two pipeline stages (ranks 2 and 3):
specifications, special tokens, grids and the call of the schedule are Megatron's. What is mimogrid's is marked.
The task: say which of four colours an image has.
"""

import os

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
from mimogrid.adapters.torch_module import Example  # mimogrid
from mimogrid.core.samples import Sample  # mimogrid
from mimogrid.core.spec import BatchSpec, DataSpec, OptimizerSpec  # mimogrid


IMAGE_TOKEN, QUESTION, COLOURS = -1, 4, 4
SEQUENCE, PATCHES, FEATURES = 8, 4, 6
MICROBATCHES, MICRO_BATCH = 4, 8


class Eye(nn.Module):
    """Patches [R, F] of all images to as many rows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, patches):
        """Return a row for each patch."""
        return self.layers(patches)


def model_config() -> MimoModelConfig:
    """Specify the model as for Megatron."""
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
        "transformer_layer_spec": layer_spec(text),  # mimogrid: one that runs on the CPU; on CUDA, Megatron's
        "position_embedding_type": "none",  # that layer has rotary ones
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
    """Lay the modules over the ranks as for Megatron."""
    return {
        "vision": HyperCommGrid([1, 1, 2, 1], ["tp", "cp", "dp", "pp"], rank_offset=0),
        "language": HyperCommGrid([1, 1, 1, 2], ["tp", "cp", "dp", "pp"], rank_offset=2),
    }


def microbatches():
    """Yield the samples of each microbatch, of all data lanes, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    number = 0
    while True:
        examples = []
        for _ in range(MICRO_BATCH):
            colour = int(torch.randint(COLOURS, (), generator=generator))
            patches = torch.randn(PATCHES, FEATURES, generator=generator) * 0.1
            patches[:, colour] += 1
            tokens = torch.tensor([IMAGE_TOKEN] * PATCHES + [QUESTION, colour])
            labels = torch.tensor([0] * PATCHES + [colour, 0])
            weights = torch.tensor([0.0] * PATCHES + [1.0, 0.0])
            # mimogrid: a sample says how long it is; one token of it counts in the loss.
            sample = Sample(id=number, length=2, rows={"vision": PATCHES}, units={"language": 1.0})
            text = {"tokens": tokens, "labels": labels, "loss_weights": weights}
            examples.append(Example(sample, {"vision": {"rows": patches}, "language": text}))
            number += 1
        yield examples


def main(iterations: int = 30) -> list[float]:
    """Train; return the losses."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    config, grids = model_config(), module_grids()

    # Was: model = MimoModel(config); forward_backward = get_forward_backward_func()
    job = open_job_of(  # mimogrid
        config,
        grids,
        batch=BatchSpec(global_size=MICROBATCHES * MICRO_BATCH, microbatches=MICROBATCHES),
        data=DataSpec(source="mimogrid.shell.host:samples", options={"sequence": SEQUENCE}),
        optimizer=OptimizerSpec(lr=3e-3),
    )
    forward_backward = forward_backward_func(job, config, encoder_inputs={"vision": "patches"})  # mimogrid
    model = forward_backward.model  # this rank's part of it, with Megatron's names
    data_iterator, losses = microbatches(), []

    for iteration in range(iterations):
        losses_reduced = forward_backward(
            forward_step_func=None,  # mimogrid: the program has the data, and the loss
            data_iterator=data_iterator,
            model=[model],
            num_microbatches=MICROBATCHES,
            seq_length=SEQUENCE,
            micro_batch_size=MICRO_BATCH,
        )
        # Was: finalize_model_grads(...); optimizer.step(). The step has ended with both.  mimogrid
        losses.append(float(losses_reduced[0]["lm loss"]))
        if dist.get_rank() == 0 and iteration % 10 == 9:
            print(f"iteration {iteration + 1}: lm loss {losses[-1]:.4f}")

    evaluated = forward_backward(
        forward_step_func=None,
        data_iterator=data_iterator,
        model=[model],
        num_microbatches=MICROBATCHES,
        seq_length=SEQUENCE,
        micro_batch_size=MICRO_BATCH,
        forward_only=True,
    )
    if dist.get_rank() == 0:
        print(f"evaluated: lm loss {float(evaluated[0]['lm loss']):.4f}")
    forward_backward.embedded.close()  # mimogrid
    return losses


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main()
    dist.destroy_process_group()
