"""Pretraining in the shape of Megatron-LM's MIMO examples, on mimogrid: loaders, optimizer, checkpoints, evaluation.

    torchrun --nproc-per-node 8 examples/megatron_pretrain.py --encoder-tp 2 --encoder-dp 2 \
        --llm-offset 4 --llm-tp 2 --llm-dp 2 --micro-batch-size 2 --global-batch-size 16 --train-iters 20 \
        --save checkpoints --save-interval 10

A vision encoder with a transformer feeds a GPT language model; each has its own grid of ranks. Arguments, loaders (each
dp rank of a module has its own samples), forward step, loss function and training loop are as in Megatron. The lines
that put it on mimogrid are marked. With `--load` a run goes on from its last checkpoint; the grids may be others then.
"""

import argparse
import os
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.mimo.config import MimoModelConfig
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from mimogrid.adapters.megatron import (  # mimogrid
    checkpoints_on,  # mimogrid
    forward_backward_func,  # mimogrid
    get_mimo_optimizer,  # mimogrid: was megatron.core.models.mimo.optimizer
    layer_spec,  # mimogrid
    open_job_of,  # mimogrid
    optimizer_spec_of,  # mimogrid
    role_of_grids,  # mimogrid
)
from mimogrid.core.job.spec import BatchSpec  # mimogrid


def parse_args(arguments=None) -> argparse.Namespace:
    """Return the arguments, by Megatron's names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    for name, default in GRIDS.items():
        add(name, type=int, default=default)
    add("--num-layers", type=int, default=2)
    add("--hidden-size", type=int, default=32)
    add("--num-attention-heads", type=int, default=4)
    add("--vocab-size", type=int, default=16)
    add("--seq-length", type=int, default=12)
    add("--image-token-id", type=int, default=15)
    add("--image-seq-length", type=int, default=4)
    add("--micro-batch-size", type=int, default=2, help="samples of a dp rank of the language model")
    add("--global-batch-size", type=int, default=16)
    add("--train-iters", type=int, default=20)
    add("--eval-interval", type=int, default=0)
    add("--eval-iters", type=int, default=1)
    add("--log-interval", type=int, default=5)
    add("--lr", type=float, default=3e-3)
    add("--min-lr", type=float, default=0.0)
    add("--lr-warmup-iters", type=int, default=2)
    add("--lr-decay-style", default="cosine")
    add("--weight-decay", type=float, default=0.01)
    add("--clip-grad", type=float, default=1.0)
    add("--seed", type=int, default=1234)
    add("--bf16", action="store_true")
    add("--use-distributed-optimizer", action="store_true")
    add("--save", type=Path)
    add("--save-interval", type=int, default=0)
    add("--load", type=Path)
    return parser.parse_args(arguments)


GRIDS = {
    "--encoder-tp": 1,
    "--encoder-dp": 2,
    "--llm-offset": 2,
    "--llm-tp": 1,
    "--llm-pp": 1,
    "--llm-dp": 2,
}
"""Arguments of the grids, with defaults for four ranks."""

# -- model -------------------------------------------------------------------------------------------------


class PatchEncoder(nn.Module):
    """A vision encoder: patches [B, S, F] through a transformer to rows [B, S, H]."""

    def __init__(self, transformer_config, transformer_layer_spec, pg_collection=None) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, transformer_config.hidden_size)
        self.decoder = TransformerBlock(
            transformer_config, transformer_layer_spec, pg_collection=pg_collection
        )

    def forward(self, x):
        """Return the rows of the images."""
        hidden_SBH = self.embed(x).transpose(0, 1).contiguous()
        return self.decoder(hidden_states=hidden_SBH, attention_mask=None).transpose(0, 1)


FEATURES = 6
"""The width of a patch."""


def model_provider(args) -> MimoModelConfig:
    """Return the specification of the model."""
    text = config_of(args, tp=args.llm_tp, pp=args.llm_pp)
    eye = config_of(args, tp=args.encoder_tp)
    language = {
        "config": text,
        "transformer_layer_spec": layer_spec(text),  # mimogrid: runs on the CPU; on CUDA use Megatron's
        "position_embedding_type": "none",  # the layer itself has rotary positions
        "vocab_size": args.vocab_size,
        "max_sequence_length": args.seq_length,
    }
    encoder = {
        "transformer_config": eye,
        "transformer_layer_spec": layer_spec(eye, causal=False),  # mimogrid: as above
    }
    width = args.hidden_size
    parts = {
        "encoders": {"clip_encoder": ModuleSpec(PatchEncoder, encoder)},
        "input_projections": [ModuleSpec(nn.Linear, {"in_features": width, "out_features": width})],
    }
    return MimoModelConfig(
        language_model_spec=ModuleSpec(GPTModel, language),
        modality_submodules_spec={"images": ModuleSpec(VisionModalitySubmodules, submodules=parts)},
        special_token_ids={"images": args.image_token_id},
    )


def config_of(args, *, tp: int, pp: int = 1) -> TransformerConfig:
    """Return the configuration of a transformer that runs on the CPU."""
    return TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        calculate_per_token_loss=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        cuda_graph_scope=[],
    )


def module_grids(args) -> dict[str, HyperCommGrid]:
    """Return the grid of each module."""
    axes = ["tp", "cp", "dp", "pp"]
    return {
        "images": HyperCommGrid([args.encoder_tp, 1, args.encoder_dp, 1], axes),
        "language": HyperCommGrid(
            [args.llm_tp, 1, args.llm_dp, args.llm_pp], axes, rank_offset=args.llm_offset
        ),
    }


def setup_model_and_optimizer(args, precision=""):
    """Return the step, the model of this rank, its optimizer and the scheduler of the learning rate."""
    config, grids = model_provider(args), module_grids(args)
    optimizer_config = OptimizerConfig(
        lr=args.lr,
        min_lr=args.min_lr,
        weight_decay=args.weight_decay,
        clip_grad=args.clip_grad,
        bf16=args.bf16,
        use_distributed_optimizer=args.use_distributed_optimizer,
    )
    # Was: model = MimoModel(config), and wrap_active_modules_with_ddp(model)
    job = open_job_of(  # mimogrid
        config,  # mimogrid
        grids,  # mimogrid
        batch=BatchSpec(global_size=args.global_batch_size, microbatches=num_microbatches(args)),  # mimogrid
        precision=precision or ("bf16" if args.bf16 else "fp32"),  # mimogrid
        optimizer=optimizer_spec_of(optimizer_config),  # mimogrid
        seed=args.seed,  # mimogrid
    )
    forward_backward = forward_backward_func(job, config, batches="per_rank")  # mimogrid
    model = forward_backward.model  # mimogrid
    optimizer = get_mimo_optimizer(model, optimizer_config)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=args.lr_warmup_iters * args.global_batch_size,
        lr_decay_steps=args.train_iters * args.global_batch_size,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.weight_decay,
        end_wd=args.weight_decay,
        wd_incr_steps=args.train_iters * args.global_batch_size,
        wd_incr_style="constant",
    )
    return forward_backward, model, optimizer, scheduler


def num_microbatches(args) -> int:
    """Return the number of microbatches of a step."""
    return args.global_batch_size // (args.micro_batch_size * args.llm_dp)


# -- data --------------------------------------------------------------------------------------------------


def sample(args, number: int) -> dict[str, torch.Tensor]:
    """Return a sample: an image of one of four colours, and a text that begins with the name of its colour."""
    generator = torch.Generator().manual_seed(args.seed + number)
    colour = int(torch.randint(4, (), generator=generator))
    patches = torch.randn(args.image_seq_length, FEATURES, generator=generator) * 0.1
    patches[:, colour] += 1
    tokens = torch.randint(4, args.image_token_id, (args.seq_length + 1,), generator=generator)
    tokens[: args.image_seq_length] = args.image_token_id
    tokens[args.image_seq_length + 1] = colour
    labels = tokens[1:]
    return {"tokens": tokens[:-1], "labels": labels, "loss_mask": (labels < 4).float(), "patches": patches}


def build_data_loader(args, *, iteration: int = 0, split: int = 0):
    """Return an iterator over the microbatches of this rank; None on a rank that reads none.

    A dp rank of the language model has `micro_batch_size` samples of each, a dp rank of the encoder its even share.
    """
    role = role_of_grids(module_grids(args), dist.get_rank())  # mimogrid: was RankRole.build
    if role.is_first_stage("images"):
        dp, dp_rank = args.encoder_dp, role.modules["images"].position["dp"]
    elif role.is_first_stage("language") or role.is_last_stage("language"):
        dp, dp_rank = args.llm_dp, role.modules["language"].position["dp"]
    else:
        return None
    whole = args.micro_batch_size * args.llm_dp
    begin = split + iteration * args.global_batch_size
    return microbatches(args, begin + dp_rank * whole // dp, whole // dp, whole, role.has_language_module)


def microbatches(args, begin: int, size: int, stride: int, has_text: bool):
    """Yield `size` samples from `begin` on, then those from `stride` behind, and so on."""
    while True:
        samples = [sample(args, number) for number in range(begin, begin + size)]
        tokens, labels, loss_mask, patches = (
            torch.stack([each[name] for each in samples])
            for name in ("tokens", "labels", "loss_mask", "patches")
        )
        text = {"input_ids": tokens, "labels": labels, "loss_mask": loss_mask}
        images = {"input_ids": tokens, "modality_inputs": {"images": {"clip_encoder": {"x": patches}}}}
        yield text if has_text else images
        begin += stride


# -- training ----------------------------------------------------------------------------------------------


def loss_func(loss_mask, output_tensor):
    """Return the sum of the losses of a microbatch, how many tokens they are of, and what is reported."""
    loss, num_tokens = (output_tensor * loss_mask).sum(), loss_mask.sum().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.to(loss.dtype)])}


def forward_step(data_iterator, model):
    """Run the model on a microbatch."""
    batch = next(data_iterator) if data_iterator is not None else {"input_ids": None}
    output_tensor, loss_mask = model(**batch)
    return output_tensor, partial(loss_func, loss_mask)


def train_step(args, forward_backward, model, optimizer, scheduler, data_iterator):  # noqa: PLR0917
    """Take a step; return its loss on the ranks of the last stage, and the grad norm."""
    model.zero_grad_buffer()
    optimizer.zero_grad()
    losses_reduced = forward_backward(**step_arguments(args, model, data_iterator))
    update_successful, grad_norm, _ = optimizer.step()
    if update_successful:
        scheduler.step(increment=args.global_batch_size)
    return mean_of(losses_reduced, model), grad_norm


def step_arguments(args, model, data_iterator):
    """Return the arguments of Megatron's schedules."""
    return {
        "forward_step_func": forward_step,
        "data_iterator": data_iterator,
        "model": [model],
        "num_microbatches": num_microbatches(args),
        "seq_length": args.seq_length,
        "micro_batch_size": args.micro_batch_size,
    }


def mean_of(losses_reduced, model):
    """Return the mean over the tokens of all microbatches and dp ranks; None on a rank without losses."""
    if not losses_reduced:
        return None
    total = torch.stack([each["lm loss"] for each in losses_reduced]).sum(dim=0)
    dist.all_reduce(total, group=model.pg_collection.dp_cp)
    return float(total[0] / total[1])


def evaluate(args, forward_backward, model):
    """Return the mean loss of other samples, on the ranks of the last stage."""
    data_iterator = build_data_loader(args, split=1_000_000)
    means = []
    for _ in range(args.eval_iters):
        found = forward_backward(**step_arguments(args, model, data_iterator), forward_only=True)
        means.append(mean_of(found, model))
    return sum(means) / len(means) if means and means[0] is not None else None


def train(args, forward_backward, model, optimizer, scheduler):
    """Train, save and evaluate; return the losses of this rank's iterations."""
    iteration = load_checkpoint(args, model, optimizer, scheduler) if args.load else 0
    data_iterator, losses = build_data_loader(args, iteration=iteration), []
    while iteration < args.train_iters:
        loss, grad_norm = train_step(args, forward_backward, model, optimizer, scheduler, data_iterator)
        iteration += 1
        losses.append(loss)
        if loss is not None and args.log_interval and iteration % args.log_interval == 0:
            lr = optimizer.param_groups[0]["lr"]
            print_last(
                model, f"iteration {iteration}: lm loss {loss:.4f}, grad norm {grad_norm:.3f}, lr {lr:.2e}"
            )
        if args.eval_interval and iteration % args.eval_interval == 0:
            found = evaluate(args, forward_backward, model)
            if found is not None:
                print_last(model, f"iteration {iteration}: evaluated lm loss {found:.4f}")
        if args.save and (
            iteration == args.train_iters or (args.save_interval and iteration % args.save_interval == 0)
        ):
            save_checkpoint(args, iteration, model, optimizer, scheduler)
    return losses


def print_last(model, text: str) -> None:
    """Print on one rank of the last stage."""
    groups = model.pg_collection
    if groups.tp.rank() == groups.dp.rank() == 0:
        print(text, flush=True)


# -- checkpoints -------------------------------------------------------------------------------------------


def state_of(model, optimizer, is_loading: bool = False):
    """Return this rank's part of a checkpoint."""
    weights = model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    state = {"model": weights}
    return state | {"optimizer": optimizer.sharded_state_dict(state, is_loading=is_loading)}


def save_checkpoint(args, iteration, model, optimizer, scheduler) -> None:
    """Write a checkpoint, and that it is the last one."""
    folder = args.save / f"iter_{iteration:07}"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    state = state_of(model, optimizer) | {
        "iteration": iteration,
        "opt_param_scheduler": scheduler.state_dict(),
    }
    with checkpoints_on(torch.device("cpu")):  # mimogrid: Megatron's writer asks for CUDA
        dist_checkpointing.save(state, str(folder))
    if dist.get_rank() == 0:
        (args.save / LATEST).write_text(str(iteration))


def load_checkpoint(args, model, optimizer, scheduler) -> int:
    """Load the last checkpoint; return its iteration."""
    iteration = int((args.load / LATEST).read_text())
    state = dist_checkpointing.load(
        state_of(model, optimizer, is_loading=True), str(args.load / f"iter_{iteration:07}")
    )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["opt_param_scheduler"])
    return iteration


LATEST = "latest_checkpointed_iteration.txt"


def main() -> None:
    """Train as the arguments say."""
    args = parse_args()
    dist.init_process_group("gloo")
    forward_backward, model, optimizer, scheduler = setup_model_and_optimizer(args)
    train(args, forward_backward, model, optimizer, scheduler)
    forward_backward.embedded.close()  # mimogrid
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" not in os.environ:
        raise SystemExit("Start four ranks: torchrun --nproc-per-node 4 examples/megatron_pretrain.py")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main()
