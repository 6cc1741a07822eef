"""Megatrons: a small `MimoModel` on one process and in a job's program, with the same weights and samples."""

import contextlib
import copy
import dataclasses
import math
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import torch
import torch.distributed as dist
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.config import MimoModelConfig
from megatron.core.models.mimo.model.base import MimoModel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe import moe_utils, router
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

import specs
from hosts import host
from mimogrid.adapters import torch_module
from mimogrid.adapters.megatron import Blocks, block_of, forward_backward_func, layer_spec, networks_of
from mimogrid.adapters.megatron.modality import packed
from mimogrid.adapters.torch_module import Embedded
from mimogrid.core.base.hashing import draw_bits
from mimogrid.core.base.samples import Sample
from mimogrid.core.base.zigzag import ZigZag
from mimogrid.core.job.models import Gpt, Vit
from mimogrid.core.step.step import Share
from mimogrid.shell.checkpoint import files as checkpoint
from mimogrid.shell.checkpoint import saving
from mimogrid.shell.checkpoint.manifest import published, read_manifest
from mimogrid.shell.checkpoint.state import gather, manifest_of, restore, slices_to_load, slices_to_save
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.megatron.cpu import on_device
from mimogrid.shell.megatron.layers import block_spec
from mimogrid.shell.megatron.names import ProcessGroupCollection
from mimogrid.shell.megatron.weight_grad_store import WeightGradStore
from mimogrid.shell.runtime.tensor_slices import full_tensors


PLACEHOLDER = 99
"""The special token of images; no token of text."""
SOUND = 98
"""The special token of sounds."""


def side_by_side(
    vision: Mapping[str, int], language: Mapping[str, int], audio: Mapping[str, int] | None = None
) -> dict[str, HyperCommGrid]:
    """Megatron's grids of modules by the sizes of their axes, one behind the other; the language model is the last."""
    found, offset = {}, 0
    for name, sizes in {
        "vision": vision,
        **({"audio": audio} if audio else {}),
        "language": language,
    }.items():
        found[name] = HyperCommGrid(list(sizes.values()), list(sizes), rank_offset=offset)
        offset += math.prod(sizes.values())
    return found


def config_of(
    *,
    layers: int,
    language: Mapping[str, Any],
    pp: int = 1,
    tp: int = 1,
    here: Mapping[str, int] | None = None,
    eye: Mapping[str, Any] | None = None,
    images: bool = False,
    several: bool = False,
    sounds: bool = False,
    **transformer: Any,
) -> MimoModelConfig:
    """Specify the model; `here` are the layers of the stages for which it is to be built, where there are several.

    `eye` configures an encoder that is a transformer; without it the encoder is one linear layer, or `several` are.
    With `sounds` there is a second modality.
    """
    gpt = Gpt(layers=layers, hidden=specs.HIDDEN, heads=4, vocab=specs.VOCAB)
    layer = block_spec(
        gpt,
        layers=range(layers if here is None or pp == 1 else here.get("language", 0)),
        tp=tp,
        weight_grads=WeightGradStore(),
    )
    config = specs.config(pp=pp, layers=layers, tensor_model_parallel_size=tp, **transformer)
    if config.num_moe_experts:
        layer = with_experts(layer, config, causal=True)
    if language.get("position_embedding_type") == "mrope":
        turned = layer_spec(config, rotary=False)
        layer = dataclasses.replace(layer, layer_specs=[turned] * len(layer.layer_specs))
    text = specs.language(config=config, transformer_layer_spec=layer, **language)
    vision = specs.vision(specs.Images if images else specs.Pixels, hidden=8)
    if several:
        vision.submodules["encoders"] = {
            "near": ModuleSpec(specs.Pixels, {"hidden": 8}),
            "far": ModuleSpec(specs.Frames, {"hidden": 8}),
        }
    if eye is not None:
        vit = Vit(layers=eye["layers"], hidden=specs.HIDDEN, heads=4, features=specs.PIXELS)
        built = vit.layers if here is None else here.get("vision", 0)
        more = {"tp": 1, **eye}
        cut = more.pop("tp")
        stack = block_spec(vit, layers=range(built), tp=cut, weight_grads=WeightGradStore())
        sizes = specs.config(tensor_model_parallel_size=cut, **more)
        if sizes.num_moe_experts:
            stack = with_experts(stack, sizes, causal=False)
        vision = specs.vision(Patches, in_features=specs.HIDDEN, transformer_config=sizes, spec=stack)
    audio = {"audio": specs.audio()} if sounds else {}
    return specs.model_config(
        language_model_spec=text,
        modality_submodules_spec={"vision": vision, **audio},
        special_token_ids={"vision": PLACEHOLDER, **dict.fromkeys(audio, SOUND)},
    )


def with_experts(stack: Any, config: TransformerConfig, *, causal: bool) -> Any:
    """Return the specification of a stack with Megatron's layers with experts."""
    layer = layer_spec(config, causal=causal)
    return dataclasses.replace(stack, layer_specs=[layer] * len(stack.layer_specs))


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """A world of one process on the CPU, in fp64 where nothing else is said."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with on_device(torch.device("cpu")), exact_routing():
            yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def exact_routing() -> Iterator[None]:
    """Let Megatron's router, which rounds to fp32, compute in fp64 throughout."""
    exact = types.ModuleType("torch")
    exact.__dict__.update(vars(torch), float32=torch.float64)
    # Has nothing to do, and is compiled for seconds before it does it.
    idle = mock.patch.object(router.TopKRouter, "_apply_expert_bias", return_value=None)
    with mock.patch.object(moe_utils, "torch", exact), idle:
        yield


def drawn(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Draw weights from their names alone, in fp64."""
    found = {}
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            generator = torch.Generator().manual_seed(draw_bits(0, name, "weight") % 2**63)
            found[name] = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.2
    return found


def with_groups(
    config: MimoModelConfig, alone: dist.ProcessGroup, *, pp: dist.ProcessGroup | None = None
) -> MimoModelConfig:
    """Give the transformers a group of one for everything but perhaps the pipeline."""
    names = ("tp", "cp", "pp", "dp", "dp_cp", "ep", "expt_tp", "expt_dp", "tp_cp", "tp_ep", "tp_dp_cp")
    collection = ProcessGroupCollection(**dict.fromkeys(names, alone))
    collection.pp = pp or alone
    collection.embd = collection.pos_embd = None
    encoder = next(iter(config.modality_submodules_spec["vision"].submodules["encoders"].values()))
    for spec in (config.language_model_spec, *([encoder] if encoder.module is Patches else [])):
        spec.params["pg_collection"] = collection
    return config


def whole(config: MimoModelConfig) -> nn.Module:
    """Megatron's own model with all of it on one process, in fp64, with weights drawn by name."""
    assert dist.group.WORLD is not None
    model = MimoModel(with_groups(config, dist.group.WORLD)).double()
    model.load_state_dict(drawn(model.state_dict()), strict=False)
    return model


def of_two(module: type[nn.Module], *, theirs: bool, causal: bool, **params: Any) -> nn.Module:
    """A network of one layer as the first of two ranks along cp would build it, without a process group.

    With Megatron's own attention, or ours.
    """
    me: Any = specs.OneOf(0, 1)
    both: Any = specs.OneOf(0, 2)
    config = specs.config(layers=1)
    layer = copy.deepcopy(layer_spec(config, causal=causal))
    if theirs:
        layer.submodules.self_attention.submodules.core_attention = DotProductAttention
    norm = block_spec(Vit(layers=1, hidden=1, heads=1), layers=range(1), tp=1, weight_grads=WeightGradStore())
    stack = dataclasses.replace(norm, layer_specs=[layer])
    collection = ProcessGroupCollection(tp=me, pp=me, cp=both)
    collection.embd = None
    with on_device(torch.device("cpu")):
        return module(config, stack, pg_collection=collection, **params)


class Patches(nn.Module):
    """An encoder in stages: pixels [S, B, P] into a transformer block."""

    def __init__(
        self,
        transformer_config: TransformerConfig,
        spec: Any,
        pg_collection: Any,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__()
        self.pre_process = pre_process
        if pre_process:
            self.input = nn.Linear(specs.PIXELS, transformer_config.hidden_size)
        self.decoder = TransformerBlock(
            transformer_config,
            spec,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )

    def set_input_tensor(self, hidden: Tensor) -> None:
        """Take what the stage before sent."""
        self.decoder.set_input_tensor(hidden)

    def forward(
        self,
        hidden_states: None = None,
        attention_mask: Tensor | None = None,
        pixels: Tensor | None = None,
    ) -> Tensor:
        """Return [S, B, H]."""
        first = self.input(pixels) if self.pre_process else None
        return self.decoder(hidden_states=first, attention_mask=attention_mask)


def arranged(rows: Tensor | None, share: Share, cut: ZigZag) -> Mapping[str, Any]:
    """Return the arguments of a stage of `Patches`."""
    if rows is None:
        packing = packed(share, cut, dtype=torch.float64, device=torch.device("cpu"))
        return {"attention_mask": packing.mask}
    pixels, mask = block_of(rows, share, cut)
    return {"pixels": pixels, "attention_mask": mask}


def batch_of(job: Job, sample: Sample, *, by_position: bool) -> tuple[dict[str, Any], Tensor, Tensor]:
    """One sample as a batch of Megatron's, with labels and weights [S], and no padding."""
    assert job.source
    text = job.source.load(sample.id, "language")
    tokens, labels, weights = (text[name] for name in ("tokens", "labels", "loss_weights"))
    inputs = None
    if sample.rows.get("vision"):
        pixels = job.source.load(sample.id, "vision")["rows"].double()
        inputs = {"vision": {"eye": {"pixels": pixels[:, None] if by_position else pixels}}}
    batch = {
        "input_ids": tokens.masked_fill(tokens < 0, PLACEHOLDER)[None],
        "position_ids": torch.arange(len(tokens))[None],
        "attention_mask": None,
        "modality_inputs": inputs,
    }
    return batch, labels, weights.double()


@attrs.frozen
class Seen:
    """What a rank saw.

    Losses, the auxiliary one before its weight, full gradients by Megatron's names (first rank), logits of its dp rank
    (last stage).
    """

    losses: list[float]
    aux: float
    gradients: Mapping[str, Any]
    logits: list[Any]
    state: Mapping[str, Any]


class Noting:
    """A function of Megatron's for an auxiliary loss, and what it says, before its weight."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.said: list[float] = []

    def __call__(self, *, moe_aux_loss_coeff: float, **arguments: Any) -> Tensor:
        """Return what the function does."""
        loss = self.function(moe_aux_loss_coeff=moe_aux_loss_coeff, **arguments)
        self.said.append(float(loss.detach()) / moe_aux_loss_coeff)
        return loss


def expected(job: Job, config: Mapping[str, Any]) -> Seen:
    """What one process comes to; inside `alone`."""
    eye = config.get("eye")
    model, step = whole(config_of(**config)), job.step(0)
    # One sample at a time: the mean over all of them of each one's auxiliary loss.
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1 / len(step.samples), dtype=torch.float64))
    total, said = torch.zeros((), dtype=torch.float64), []
    imbalances = Noting(router.switch_load_balancing_loss_func)
    for sample, rows in zip(step.samples, step.rows_out, strict=True):
        # One by one: Megatron flattens what a transformer block returns position by position, not sample by sample.
        batch, labels, weights = batch_of(job, sample, by_position=eye is not None)
        with mock.patch.object(router, "switch_load_balancing_loss_func", imbalances):
            logits, _ = model(**batch)
        total = total + (nn.functional.cross_entropy(logits[0], labels, reduction="none") * weights).sum()
        said.append(logits[0, : rows["language"]].detach())
    loss = total / sum(sample.length for sample in step.samples)
    loss.backward()
    gradients = {name: w.grad.numpy() for name, w in model.named_parameters() if w.grad is not None}
    state = {
        name: tensor.numpy() for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)
    }
    aux = sum(imbalances.said) / len(step.samples)
    return Seen([loss.item()], aux, gradients, [torch.cat(said).numpy()], state)


def trained(
    place: RankPlace,
    job: Job,
    config: Mapping[str, Any],
    weights: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Seen:
    """Evaluate the first step of a job, then take it, with networks of the model and the weights of a whole one."""
    hosted = {info.stage.module: len(info.layers) for info in job.topology.role(place.rank).stages}
    with host(place), exact_routing():
        made = config_of(**config, here=hosted)
        eye: Any = arranged if config.get("eye") else "pixels"
        if config.get("eye") and config["eye"].get("pp", 1) == 1:
            eye = Blocks("pixels", mask="attention_mask")
        function = forward_backward_func(
            job, made, encoder_inputs={"vision": eye}, optimizer="host", **options
        )
        embedded = function.embedded
        function.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
        arguments: dict[str, Any] = {
            "forward_step_func": None,
            "data_iterator": None,
            "model": function.model,
            "num_microbatches": job.spec.batch.microbatches,
            "seq_length": job.topology.sequence,
            "micro_batch_size": 1,
        }
        evaluated = function(**arguments, forward_only=True)
        logits = function(**arguments, forward_only=True, collect_non_loss_data=True)
        losses = function(**arguments)
        runtime, gradients = embedded.runtime, {}
        if runtime is not None:
            of_stage = {
                stage: {name: w.grad for name, w in buffer.weights.items()}
                for stage, buffer in runtime.buffers.items()
            }
            gradients = full_tensors(runtime, of_stage)
        state = function.state_dict()
        embedded.close()
        return Seen(
            [float(each["lm loss"]) for each in (*losses, *evaluated)],
            float(sum(each.get("language.aux loss", 0.0) for each in losses)),
            {name: gradient.numpy() for name, gradient in gradients.items()},
            [each["logits"].detach().numpy() for each in logits],
            {name: tensor.numpy() for name, tensor in state.items()},
        )


def its_own(
    place: RankPlace, job: Job, config: Mapping[str, Any], weights: Mapping[str, Any]
) -> tuple[list[float], Mapping[str, Any], Mapping[str, Any]]:
    """Train a `MimoModel` that is there; return losses, and its weights on this rank before and after the step."""
    with host(place), on_device(torch.device("cpu")):
        alone = [dist.new_group([rank]) for rank in range(place.size)][place.rank]
        model = MimoModel(with_groups(config_of(**config), alone))
        mine = "modality_submodules" if place.rank == 0 else "language_model"
        function = forward_backward_func(job, model, encoder_inputs={"vision": "pixels"})
        function.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
        before = _held(model, mine)
        losses = function(
            forward_step_func=None,
            data_iterator=None,
            model=[model],
            num_microbatches=job.spec.batch.microbatches,
            seq_length=job.topology.sequence,
            micro_batch_size=1,
        )
        after = _held(model, mine)
        function.embedded.close()
        return [float(each["lm loss"]) for each in losses], before, after


def in_chunks(
    place: RankPlace, job: Job, config: Mapping[str, Any], weights: Mapping[str, Any], given: int
) -> tuple[list[float], Mapping[str, Any]]:
    """Train so many chunks of `MimoModel`s that are there, on ranks 1 and 2; return losses and the state before."""
    with host(place), on_device(torch.device("cpu")):
        alone = [dist.new_group([rank]) for rank in range(place.size)][place.rank]
        pp = dist.new_group([1, 2])
        models = []
        for chunk in range(given if place.rank else 1):
            hosted = {"language": 1}
            made = with_groups(config_of(**config, here=hosted), alone, pp=pp if place.rank else None)
            ends = {
                "pre_process": (place.rank, chunk) == (1, 0),
                "post_process": (place.rank, chunk) == (2, 1),
            }
            made.language_model_spec.params |= {"vp_stage": chunk, **ends}
            models.append(MimoModel(made))
        function = forward_backward_func(job, models, encoder_inputs={"vision": "pixels"})
        function.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
        state = function.state_dict()
        losses = function(
            forward_step_func=None,
            data_iterator=None,
            model=models,
            num_microbatches=job.spec.batch.microbatches,
            seq_length=job.topology.sequence,
            micro_batch_size=1,
        )
        function.embedded.close()
        return (
            [float(each["lm loss"]) for each in losses],
            {name: tensor.numpy() for name, tensor in state.items()},
        )


def _held(model: nn.Module, begin: str) -> Mapping[str, Any]:
    return {
        name: weight.detach().clone().numpy()
        for name, weight in model.named_parameters()
        if name.startswith(begin)
    }


def on_some(place: RankPlace, job: Job, config: Mapping[str, Any]) -> None:
    """Give a network of the language model's on rank 1 and none on rank 2."""
    with host(place):
        alone = [dist.new_group([rank]) for rank in range(place.size)][place.rank]

        def networks(embedded: Embedded) -> Mapping[str, nn.Module]:
            model = MimoModel(with_groups(config_of(**config), alone))
            made = networks_of(model, job, place.rank, {"vision": "pixels"})
            return {} if place.rank == place.size - 1 else made

        Embedded(job, networks)


def saved(
    place: RankPlace, job: Job, config: Mapping[str, Any], weights: Mapping[str, Any], folder: Path
) -> Mapping[str, Any]:
    """Take up a checkpoint, or weights where there is none, take a step, and save; return the state on the first rank.

    The state is what all keep: weights, and what the optimizer keeps for each.
    """
    hosted = {info.stage.module: len(info.layers) for info in job.topology.role(place.rank).stages}
    with host(place), exact_routing():
        made = config_of(**config, here=hosted)
        function = forward_backward_func(job, made, encoder_inputs={"vision": "pixels"})
        embedded = function.embedded
        runtime = embedded.runtime
        assert runtime is not None
        if published(folder):
            facts = read_manifest(published(folder)[-1])
            checkpoint.load(published(folder)[-1], slices_to_load(runtime, facts), runtime.group)
            restore(runtime, facts)
        else:
            function.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
            embedded.step()
        saving.save(
            folder,
            slices_to_save(runtime),
            manifest_of(runtime, 1 + len(published(folder))),
            runtime.group,
            keep=9,
        )
        state = gather(runtime)
        embedded.close()
        return {name: tensor.numpy() for name, tensor in state.items()}


def begun(place: RankPlace, job: Job, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return this rank's weights of the language model as they begin, each rank having drawn its own."""
    hosted = {info.stage.module: len(info.layers) for info in job.topology.role(place.rank).stages}
    with host(place):
        with mock.patch.object(torch_module, "draw_bits", return_value=place.rank):
            function = forward_backward_func(
                job, config_of(**config, here=hosted), encoder_inputs={"vision": "pixels"}
            )
        stages = function.embedded.runtime.stages.values()
        weights = {
            name.removeprefix("network."): weight.detach().numpy().copy()
            for runner in stages
            for name, weight in runner.network.named_parameters()
        }
        function.embedded.close()
        return weights
