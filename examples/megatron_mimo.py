"""A training program in the style of Megatron-LM's MIMO example, and the few lines that put it on mimogrid.

    torchrun --nproc-per-node 4 examples/megatron_mimo.py

A vision encoder on two data lanes (ranks 0 and 1) feeds a language model on two pipeline stages (ranks 2 and 3):
specifications, special tokens, grids and the call of the schedule are Megatron's. What is mimogrid's is marked.
The task: say which of four colours an image has.
"""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.mimo.config import MimoModelConfig
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from mimogrid.adapters.megatron import forward_backward_func, job_file_of  # mimogrid
from mimogrid.adapters.torch_module import Example  # mimogrid
from mimogrid.core.samples import Sample  # mimogrid
from mimogrid.core.spec import BatchSpec, DataSpec, OptimizerSpec  # mimogrid
from mimogrid.shell.jobs import open_job  # mimogrid


IMAGE_TOKEN, QUESTION, COLOURS = -1, 4, 4
SEQUENCE, PATCHES, FEATURES = 8, 4, 6
MICROBATCHES, MICRO_BATCH = 4, 8


def model_config() -> MimoModelConfig:
    """Specify the model as for Megatron."""
    layer = get_gpt_layer_local_spec()
    eye = TransformerConfig(num_layers=2, hidden_size=16, num_attention_heads=4, **PLAIN)
    text = TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4, **PLAIN)
    encoder = ModuleSpec(CLIPViTModel, {"transformer_config": eye, "transformer_layer_spec": layer})
    language = {
        "config": text,
        "transformer_layer_spec": layer,
        "vocab_size": 8,
        "max_sequence_length": SEQUENCE,
    }
    return MimoModelConfig(
        language_model_spec=ModuleSpec(GPTModel, language),
        modality_submodules_spec={
            "vision": ModuleSpec(VisionModalitySubmodules, submodules={"encoders": {"eye": encoder}})
        },
        special_token_ids={"vision": IMAGE_TOKEN},
    )


PLAIN = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "cuda_graph_scope": []}


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


def forward_step(data_iterator, model):
    """Megatron's schedules call this for every microbatch; a job's program has no need of it."""
    raise AssertionError


def main(iterations: int = 30) -> list[float]:
    """Train; return the losses."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    config, grids = model_config(), module_grids()

    # Was: model = MimoModel(config); forward_backward = get_forward_backward_func()
    job_file = job_file_of(  # mimogrid
        config,
        grids,
        batch=BatchSpec(global_size=MICROBATCHES * MICRO_BATCH, microbatches=MICROBATCHES),
        data=DataSpec(
            source="mimogrid.shell.host:samples",
            options={"sequence": SEQUENCE, "features": {"vision": FEATURES}},
        ),
        optimizer=OptimizerSpec(lr=3e-3),
    )
    with tempfile.TemporaryDirectory() as folder:  # mimogrid
        path = Path(folder, "job.toml")
        path.write_text(job_file)
        forward_backward = forward_backward_func(open_job(path))
    data_iterator, losses = microbatches(), []

    for iteration in range(iterations):
        losses_reduced = forward_backward(
            forward_step_func=forward_step,
            data_iterator=data_iterator,
            model=[],
            num_microbatches=MICROBATCHES,
            seq_length=SEQUENCE,
            micro_batch_size=MICRO_BATCH,
        )
        # Was: finalize_model_grads(...); optimizer.step(). The step has ended with both.  mimogrid
        losses.append(float(losses_reduced[0]["lm loss"]))
        if dist.get_rank() == 0 and iteration % 10 == 9:
            print(f"iteration {iteration + 1}: lm loss {losses[-1]:.4f}")

    forward_backward.embedded.close()  # mimogrid
    return losses


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main()
    dist.destroy_process_group()
