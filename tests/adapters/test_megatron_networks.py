"""Megatron's networks in a job's program: the numbers of Megatron's own model on one process, in fp64."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import numpy as np
import pytest
import torch
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.models.vision.radio import RADIOViTModel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlock
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import silu

import megatrons
import specs
from megatrons import Seen
from mimogrid.adapters.megatron import ModalityNetwork, experts, job_of
from mimogrid.adapters.megatron.language import LanguageStage
from mimogrid.adapters.torch_module import Embedded
from mimogrid.core.base.errors import PlanError, WorldError
from mimogrid.core.base.zigzag import ZigZag
from mimogrid.core.job.spec import BatchSpec, DataSpec, JobSpec, OptimizerSpec, ScheduleSpec
from mimogrid.core.update.buckets import buckets_of
from mimogrid.shell.checkpoint.manifest import damage, published
from mimogrid.shell.cli.export import export
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.megatron.attention import CoreAttention
from mimogrid.shell.megatron.names import ProcessGroupCollection
from mimogrid.shell.world.launch import Pool
from scale import nightly_only


Opened = Callable[[JobSpec], Job]


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    """Give Megatron's grids a world to fit in, without a process group."""
    with mock.patch.dict(os.environ, {"WORLD_SIZE": "4096"}):
        yield


DATA = {
    "sequence": 16,
    "rows": {"vision": [1, 4]},
    "absent": {"vision": 0.3},
    "text": [2, 5],
    "features": {"vision": specs.PIXELS},
}


def job_for(
    opened: Opened,
    config: Mapping[str, Any],
    vision: Mapping[str, int],
    language: Mapping[str, int],
    *,
    offset: int | None = None,
    microbatches: int = 4,
    **fields: Any,
) -> Job:
    """A job of the model on these grids, the language model's at an offset or behind, with random samples."""
    end = int(np.prod(list(vision.values()))) if offset is None else offset
    grids = {
        "vision": HyperCommGrid(list(vision.values()), list(vision)),
        "language": HyperCommGrid(list(language.values()), list(language), rank_offset=end),
    }
    spec = job_of(
        megatrons.config_of(**config),
        grids,
        batch=BatchSpec(global_size=12, microbatches=microbatches),
        data=DataSpec(source="synthetic", options=DATA),
        precision="fp64",
        **fields,
    )
    return opened(spec)


def first(said: list[Seen]) -> Seen:
    """What the job's first rank saw: the one that has gradients and weights."""
    (found,) = [one for one in said if one.state]
    return found


def compare(
    pool: Pool, job: Job, config: Mapping[str, Any], whole: Mapping[str, Any]
) -> tuple[Seen, list[Seen]]:
    """Run both; losses, gradients, logits and weights are to be the same."""
    with megatrons.alone():
        expected = megatrons.expected(job, whole)
    said = pool.run("megatrons:trained", job.topology.world_size, job, config, expected.state, {})
    seen = first(said)
    for one in said:
        assert [expected.losses[0]] * 2 == pytest.approx(one.losses, rel=1e-12)
        assert expected.aux == pytest.approx(one.aux, rel=1e-12)
    assert expected.state.keys() == seen.state.keys()
    for name, weight in expected.state.items():
        assert np.array_equal(weight, seen.state[name]), name
    assert_same_logits(job, expected, said)
    ours = dict(seen.gradients)
    assert len(expected.gradients) == len(ours)
    for name, gradient in expected.gradients.items():
        mine = name.replace("language_model.", "language.").replace("modality_submodules.", "")
        np.testing.assert_allclose(gradient, ours[mine], rtol=1e-9, atol=1e-12, err_msg=name)
    return expected, said


def assert_same_logits(job: Job, expected: Seen, said: list[Seen]) -> None:
    """Dp rank by dp rank, microbatch by microbatch, the logits of all tokens in order."""
    module = job.topology.modules["language"]
    dp_ranks: dict[int, list[np.ndarray]] = {}
    for rank, seen in enumerate(said):
        if seen.logits:
            dp_ranks[module.dp_rank_of(rank)] = seen.logits
    assert [*range(module.dp_size)] == sorted(dp_ranks)
    step, (logits,) = job.step(0), expected.logits
    starts = step.rows_start["language"]
    for dp_rank, found in dp_ranks.items():
        for k, each in enumerate(found):
            samples = module.samples(dp_rank, k, len(step.samples))
            np.testing.assert_allclose(
                logits[starts[samples.start] : starts[samples.stop]], each, rtol=1e-9, atol=1e-11
            )


LEARNED = {"position_embedding_type": "learned_absolute"}
PARTS = {"scatter_embedding_sequence_parallel": False}
TIED = {"share_embeddings_and_output_weights": True}


@pytest.mark.world
@pytest.mark.parametrize(
    ("grids", "transformer", "options"),
    [
        (({"dp": 1}, {"tp": 2, "pp": 2}), {"sequence_parallel": True}, PARTS),
        (({"dp": 1}, {"cp": 2, "pp": 2}), {}, LEARNED),
        (({"dp": 1}, {"tp": 2, "pp": 2}), {}, TIED),
        *nightly_only(
            [
                (({"dp": 1}, {"pp": 3}), {"num_layers_in_first_pipeline_stage": 1}, {}),
                (({"dp": 1}, {"tp": 2, "dp": 2}), {"gated_linear_unit": True, "activation_func": silu}, {}),
                (({"dp": 2}, {"pp": 2}), {}, LEARNED),
                (({"dp": 1}, {"tp": 2, "pp": 2}), {}, LEARNED),
                (({"dp": 3}, {"tp": 2, "dp": 2}), {"sequence_parallel": True}, PARTS | LEARNED),
                (({"dp": 2}, {"tp": 2, "cp": 2}), {"sequence_parallel": True}, PARTS),
                (({"dp": 1}, {"tp": 2, "pp": 2}), {"num_query_groups": 2, "add_bias_linear": False}, {}),
                (({"dp": 1}, {"dp": 2}), {}, TIED),
            ]
        ),
    ],
)
def test_a_language_model_of_megatrons_trains_in_stages(
    pool: Pool,
    opened: Opened,
    grids: tuple[Mapping[str, int], Mapping[str, int]],
    transformer: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    """Losses, gradients and logits are those of Megatron's own model on one process; its state dict loads by name."""
    vision, language = grids
    common = {
        "layers": 5 if "num_layers_in_first_pipeline_stage" in transformer else 4,
        "language": {"max_sequence_length": 16, **options},
    }
    cut = {"pp": language.get("pp", 1), "tp": language.get("tp", 1), **transformer}
    job = job_for(opened, {**common, **cut}, vision, language)
    inside = {key: value for key, value in transformer.items() if key not in ONLY_IN_PARTS}
    compare(pool, job, {**common, **cut}, {**common, **inside})


TWICE = {"virtual_pipeline_model_parallel_size": 2}


@pytest.mark.world
@pytest.mark.parametrize(
    ("grid", "transformer", "options"),
    [
        ({"tp": 2, "pp": 2}, {"sequence_parallel": True}, {**PARTS, **TIED}),
        *nightly_only(
            [
                ({"dp": 2, "pp": 2}, {"layers": 6, "num_layers_in_first_pipeline_stage": 4}, {}),
                ({"pp": 2}, {}, LEARNED),
            ]
        ),
    ],
)
def test_a_language_model_of_megatrons_trains_in_virtual_stages(
    pool: Pool,
    opened: Opened,
    grid: Mapping[str, int],
    transformer: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    """A rank has a model for each of its chunks, whose layers count through all of them."""
    layers = transformer.get("layers", 4)
    whole = {"layers": layers, "language": {"max_sequence_length": 16, **options}}
    config = {**whole, "pp": grid["pp"], "tp": grid.get("tp", 1), **transformer, **TWICE}
    job = job_for(opened, config, {"dp": 1}, grid)
    assert 2 == job.spec.modules["language"].chunks
    compare(pool, job, config, whole)


def test_a_rank_with_chunks_has_a_network_for_each(opened: Opened) -> None:
    """One network for both would have two places in the pipeline."""
    config = {"layers": 4, "language": {"max_sequence_length": 16}, "pp": 2, **TWICE}
    job = job_for(opened, config, {"dp": 1}, {"pp": 2})
    with pytest.raises(PlanError, match="is 2; the host gave 1 networks for each pipeline rank"):
        Embedded(job, {"language": nn.Identity()})


@pytest.mark.world
def test_chunks_that_are_there_train(pool: Pool, opened: Opened) -> None:
    """Megatron's loops have one model for each of a rank's chunks; any other number of them is refused."""
    whole = {"layers": 4, "language": {"max_sequence_length": 16, **LEARNED}}
    config = {**whole, "pp": 2, **TWICE}
    job = job_for(opened, config, {"dp": 1}, {"pp": 2})
    with megatrons.alone():
        expected = megatrons.expected(job, whole)
    said = pool.run("megatrons:in_chunks", 3, job, config, expected.state, 2)
    for losses, _ in said:
        assert expected.losses == pytest.approx(losses, rel=1e-12)
    (state,) = [state for _, state in said if state]
    assert expected.state.keys() == state.keys()
    assert [] == [name for name in state if not np.array_equal(expected.state[name], state[name])]
    with pytest.raises(PlanError, match="has 2 chunks in the job, and 1 models"):
        pool.run("megatrons:in_chunks", 3, job, config, expected.state, 1)


EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_token_dispatcher_type": "alltoall",
    "add_bias_linear": False,
}
BALANCED = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1}
GATHERED = {"moe_token_dispatcher_type": "allgather"}
GATED = {"gated_linear_unit": True, "activation_func": silu}
RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def spread(ep: int, expert_tp: int = 1) -> Mapping[str, Any]:
    """Experts of Megatron's over ranks that also cut sequences, where there are several along tp."""
    return {
        "sequence_parallel": True,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": expert_tp,
    }


# megatron-core 0.16 builds its own shared experts in a way that it deprecates.
@pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning")
@pytest.mark.world
@pytest.mark.parametrize(
    ("grid", "transformer", "cut"),
    [
        (
            {"tp": 2, "cp": 2},
            {**BALANCED, **GATED, **GATHERED, "moe_shared_expert_intermediate_size": 16},
            spread(2, expert_tp=2),
        ),
        ({"tp": 1, "dp": 2, "pp": 2}, BALANCED, {**RECOMPUTED, **TWICE}),
        *nightly_only(
            [
                ({"tp": 1, "dp": 2}, {}, {"expert_model_parallel_size": 2}),
                ({"tp": 2, "pp": 2}, BALANCED, spread(2)),
                ({"tp": 1, "cp": 2, "dp": 2}, BALANCED, {"expert_model_parallel_size": 2}),
                (
                    {"tp": 2, "cp": 2},
                    {**BALANCED, **GATHERED, "moe_layer_freq": [0, 1, 1, 0]},
                    spread(4),
                ),
            ]
        ),
    ],
)
def test_experts_of_megatrons_train_wherever_they_lie(
    pool: Pool,
    opened: Opened,
    grid: Mapping[str, int],
    transformer: Mapping[str, Any],
    cut: Mapping[str, Any],
) -> None:
    """With its routers and dispatchers, beside every other axis; values and gradients of its auxiliary loss, too."""
    whole = {"layers": 4, "language": {"max_sequence_length": 16, **PARTS}, **EXPERTS, **transformer}
    config = {**whole, "pp": grid.get("pp", 1), "tp": grid["tp"], **cut}
    job = job_for(opened, config, {"dp": 1}, grid)
    expected, _ = compare(pool, job, config, whole)
    assert bool(expected.aux) == ("moe_aux_loss_coeff" in transformer)


@pytest.mark.world
@pytest.mark.parametrize("cp", [1, *nightly_only([2])])
def test_experts_of_an_encoder_train_wherever_they_lie(pool: Pool, opened: Opened, cp: int) -> None:
    """Also in microbatches in which a dp rank has no rows, and another, with which it computes, has some."""
    whole = {"layers": 2, "language": {"max_sequence_length": 16}}
    eye = {"layers": 2, **EXPERTS}
    config = {**whole, "eye": {**eye, "pp": 2, "expert_model_parallel_size": 2 * cp}}
    job = job_for(opened, config, {"cp": cp, "dp": 2, "pp": 2}, {"dp": 1}, offset=0)
    step, vision = job.step(0), job.topology.modules["vision"]
    rows = [
        [sum(step.share("vision", dp_rank, k).lengths) for dp_rank in range(2)]
        for k in range(vision.microbatches)
    ]
    assert any(bool(one) != bool(other) for one, other in rows)
    compare(pool, job, config, {**whole, "eye": eye})


ONLY_IN_PARTS = ("sequence_parallel", "num_layers_in_first_pipeline_stage")


@pytest.mark.world
@pytest.mark.parametrize(
    ("vision", "chunks", "language"),
    [
        ({"tp": 2, "pp": 2}, {}, {"tp": 2}),
        ({"pp": 2}, TWICE, {"pp": 2}),
        *nightly_only(
            [
                ({"cp": 2, "dp": 2}, EXPERTS | {"expert_model_parallel_size": 2}, {"cp": 2}),
                ({"pp": 2}, {}, {"dp": 2}),
                ({"dp": 2, "pp": 2}, {}, {"pp": 2}),
                ({"cp": 2, "pp": 2}, {}, {"dp": 2}),
            ]
        ),
    ],
)
def test_an_encoder_of_megatrons_trains_in_stages(
    pool: Pool,
    opened: Opened,
    vision: Mapping[str, int],
    chunks: Mapping[str, int],
    language: Mapping[str, int],
) -> None:
    """Every stage runs its layers, rows find their samples, and padding is not looked at."""
    whole = {"layers": 2, "language": {"max_sequence_length": 16}}
    eye = {"layers": 4, **{key: value for key, value in chunks.items() if key in EXPERTS}}
    cut = {"pp": language.get("pp", 1), "tp": language.get("tp", 1)}
    cut_eye = {**eye, "pp": vision.get("pp", 1), "tp": vision.get("tp", 1), **chunks}
    config = {**whole, **cut, "eye": cut_eye}
    job = job_for(opened, config, vision, language)
    compare(pool, job, config, {**whole, "eye": eye})


@pytest.mark.world
@pytest.mark.parametrize(
    ("vision", "language", "offset"),
    [
        ({"tp": 1, "dp": 2}, {"tp": 2, "dp": 1}, 0),
        *nightly_only(
            [
                ({"tp": 1}, {"tp": 1}, None),
                ({"tp": 1}, {"pp": 3}, None),
                ({"tp": 2}, {"tp": 2, "pp": 3}, None),
                ({"tp": 2, "pp": 2}, {"tp": 2, "pp": 2}, None),
                ({"dp": 4}, {"tp": 2, "pp": 2}, None),
                ({"tp": 2, "pp": 2}, {"dp": 4}, None),
                ({"dp": 2}, {"tp": 2, "pp": 3}, None),
                ({"tp": 2, "dp": 4}, {"tp": 4, "dp": 2}, 0),
                ({"tp": 4, "dp": 2}, {"tp": 2, "dp": 4}, 0),
            ]
        ),
    ],
)
def test_the_grids_of_megatrons_own_tests_train(
    pool: Pool, opened: Opened, vision: Mapping[str, int], language: Mapping[str, int], offset: int | None
) -> None:
    """The seven of its schedule, each module on ranks of its own, and those of modules on the same ranks."""
    whole = {"layers": max(2, language.get("pp", 1)), "language": {"max_sequence_length": 16}}
    eye = {"layers": 2}
    cut = {"pp": language.get("pp", 1), "tp": language.get("tp", 1)}
    cut_eye = {**eye, "pp": vision.get("pp", 1), "tp": vision.get("tp", 1)}
    config = {**whole, **cut, "eye": cut_eye}
    job = job_for(opened, config, vision, language, offset=offset, microbatches=3)
    compare(pool, job, config, {**whole, "eye": eye})


@pytest.mark.world
@pytest.mark.parametrize(
    "options",
    [{"gated_linear_unit": True, "activation_func": silu}, *nightly_only([{"add_bias_linear": False}])],
)
def test_gradients_are_summed_in_the_plans_buckets(
    pool: Pool, opened: Opened, options: Mapping[str, Any]
) -> None:
    """In as many as the built-in model has, whatever the network has to sum: none is left out."""
    whole = {"layers": 2, "language": {"max_sequence_length": 16, **PARTS, **LEARNED}, **options}
    config = {**whole, "tp": 2, "sequence_parallel": True}
    small = OptimizerSpec(bucket_mb=0.001)
    job = job_for(opened, config, {"dp": 2}, {"tp": 2, "dp": 2}, optimizer=small)
    assert len(buckets_of(job.topology, job.topology.modules["language"].stages[0], 2)) > 3
    compare(pool, job, config, whole)


def resaved(
    pool: Pool,
    opened: Opened,
    folder: Path,
    whole: Mapping[str, Any],
    layouts: Sequence[tuple[Mapping[str, int], Mapping[str, Any]]],
    *,
    sharded: bool,
) -> Mapping[str, Any]:
    """Save under one layout of the language model after the other, each from what the one before saved; return it.

    Weights, and what the optimizer keeps, are to be the same every time.
    """
    rule = OptimizerSpec(sharded=sharded)
    with megatrons.alone():
        weights = megatrons.whole(megatrons.config_of(**whole)).state_dict()
    begin = {name: weight.numpy() for name, weight in weights.items() if isinstance(weight, Tensor)}
    said: list[Mapping[str, Any]] = []
    for grid, cut in layouts:
        config = {**whole, "tp": grid["tp"], **cut}
        job = job_for(opened, config, {"dp": 1}, grid, optimizer=rule)
        said.append(pool.run("megatrons:saved", job.topology.world_size, job, config, begin, folder)[0])
    first = said[0]
    for state in said[1:]:
        assert first.keys() == state.keys()
        assert [] == [name for name in first if not np.array_equal(first[name], state[name])]
    return first


@pytest.mark.world
@pytest.mark.parametrize("sharded", [True, *nightly_only([False])])
def test_checkpoints_of_gated_networks_fit_any_layout(
    pool: Pool, opened: Opened, tmp_path: Path, sharded: bool
) -> None:
    """Saved at tp 2, loaded and saved at tp 1, and back: every value is where it was; so it is in what is exported."""
    whole = {
        "layers": 2,
        "language": {"max_sequence_length": 16},
        "gated_linear_unit": True,
        "activation_func": silu,
    }
    layouts = [({"tp": tp, "dp": dp}, {}) for tp, dp in ((2, 2), (1, 1), (2, 2))]
    first = resaved(pool, opened, tmp_path, whole, layouts, sharded=sharded)
    gated = "language.decoder.layers.0.mlp.linear_fc1.weight"
    for folder in published(tmp_path):
        assert [] == list(damage(folder))
        exported = folder.with_name(f"{folder.name}-out")
        export(folder, exported, to="safetensors", bytes_most=10**9)
        with safe_open(exported / "language.safetensors", "np") as found:
            assert np.array_equal(first[gated], found.get_tensor(gated.removeprefix("language.")))


@pytest.mark.world
@pytest.mark.parametrize("sharded", [False, *nightly_only([True])])
def test_checkpoints_with_experts_fit_any_layout(
    pool: Pool, opened: Opened, tmp_path: Path, sharded: bool
) -> None:
    """Experts are numbered through their layer, whichever rank has them, whole or in part."""
    whole = {"layers": 2, "language": {"max_sequence_length": 16, **PARTS}, **EXPERTS, **GATED}
    layouts = [
        ({"tp": 1, "cp": 2, "dp": 2}, {"expert_model_parallel_size": 2}),
        ({"tp": 1, "dp": 1}, {}),
        ({"tp": 2, "cp": 2}, {**spread(2, expert_tp=2), **GATHERED}),
    ]
    first = resaved(pool, opened, tmp_path, whole, layouts, sharded=sharded)
    experts = [
        name for name in first if name.startswith("language.decoder.layers.1.mlp.experts.local_experts.3.")
    ]
    assert 2 == len(experts)
    assert [] == [fault for folder in published(tmp_path) for fault in damage(folder)]


@pytest.mark.world
@pytest.mark.parametrize("schedule", ["zb-h1", *nightly_only(["gpipe"])])
def test_any_order_trains_networks_of_megatrons(pool: Pool, opened: Opened, schedule: str) -> None:
    """Also one that splits backwards, which these networks do in the first half."""
    whole = {"layers": 2, "language": {"max_sequence_length": 16}}
    config = {**whole, "pp": 2}
    job = job_for(opened, config, {"dp": 1}, {"pp": 2}, schedule=ScheduleSpec(name=schedule))
    compare(pool, job, config, whole)


@pytest.mark.world
def test_a_model_that_is_there_trains(pool: Pool, opened: Opened) -> None:
    """Megatron's own `MimoModel`, built by the program itself, is what comes out changed."""
    config = {"layers": 2, "language": {"max_sequence_length": 16}}
    job = job_for(opened, config, {"dp": 1}, {"dp": 1})
    with megatrons.alone():
        expected = megatrons.expected(job, config)
    name = "language_model.decoder.layers.1.mlp.linear_fc2.weight"
    for rank, (losses, before, after) in enumerate(
        pool.run("megatrons:its_own", 2, job, config, expected.state)
    ):
        assert expected.losses == pytest.approx(losses, rel=1e-12)
        assert bool(rank) == (name in after)
        changed = {key for key in after if not np.array_equal(before[key], after[key])}
        assert changed == set(after)


@pytest.mark.world
@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        ({"pp": 1}, {}, r"has layers \[0, 1, 2, 3\], the plan \["),
        ({"pp": 2, "language": TIED}, {}, "ties its embeddings, the plan does not tie them"),
        *nightly_only(
            [
                ({"pp": 2}, {"recompute": "full"}, "which a host's network decides for itself"),
                (
                    {"pp": 2},
                    {"frozen": ("layers.0.*",)},
                    "has patterns for the parameters of the built-in model",
                ),
            ]
        ),
    ],
)
def test_networks_that_do_not_fit_are_refused(
    pool: Pool, opened: Opened, config: Mapping[str, Any], options: Mapping[str, Any], said: str
) -> None:
    """With the numbers, before anything is computed."""
    common = {"layers": 4, "pp": 2, "language": {"max_sequence_length": 16}}
    job = job_for(opened, common, {"dp": 1}, {"pp": 2})
    module = job.spec.modules["language"]
    changes = {**options, "options": attrs.evolve(module.options, **options.get("options", {}))}
    modules = {**job.spec.modules, "language": attrs.evolve(module, **changes)}
    job = opened(attrs.evolve(job.spec, modules=modules))
    made = {**common, **config, "language": {**common["language"], **config.get("language", {})}}
    with pytest.raises(PlanError, match=said):
        pool.run("megatrons:trained", 3, job, made, {}, {})


OVER_TWO = {"expert_model_parallel_size": 2}
DENSE = {"num_moe_experts": None, "moe_ffn_hidden_size": None, "expert_model_parallel_size": 1}


@pytest.mark.world
@pytest.mark.parametrize(
    ("planned", "made", "said"),
    [
        (
            {},
            {"moe_aux_loss_coeff": 0.1},
            r"an auxiliary loss \(aux_loss\) of all tokens that a rank has together",
        ),
        ({}, BALANCED, r"weighs its auxiliary loss by 0\.1, the job by 0\.0"),
        ({}, {"num_moe_experts": 8}, r"has experts \[.*\] on a rank where the plan has \["),
        ({}, GATHERED, "a microbatch has 3 samples for 2 dp ranks"),
        *nightly_only(
            [
                ({}, {"moe_z_loss_coeff": 0.1}, r"has a z-loss.*\(moe_z_loss_coeff\)"),
                ({}, {"moe_expert_capacity_factor": 1.0}, r"drops tokens.*\(moe_expert_capacity_factor\)"),
                (
                    {},
                    {"moe_router_load_balancing_type": "sinkhorn"},
                    r"for all tokens of a rank together \(sinkhorn\)",
                ),
                (DENSE, {**EXPERTS, **OVER_TWO}, "has 4 experts, the job's module none"),
                (
                    {"expert_model_parallel_size": 1, "expert_tensor_parallel_size": 2},
                    {},
                    "unlike numbers of tokens over expert_tp=2, which gloo cannot",
                ),
            ]
        ),
    ],
)
def test_experts_whose_ways_depend_on_the_layout_are_refused(
    pool: Pool, opened: Opened, planned: Mapping[str, Any], made: Mapping[str, Any], said: str
) -> None:
    """By the name of the setting, before anything is computed; so are those that lie elsewhere than planned."""
    common = {"layers": 2, "language": {"max_sequence_length": 16}, **EXPERTS, **OVER_TWO, **planned}
    job = job_for(opened, common, {"dp": 1}, {"dp": 2})
    with pytest.raises(PlanError, match=said):
        pool.run("megatrons:trained", 3, job, {**common, **made}, {}, {})


def test_networks_that_cannot_cut_positions_are_refused(opened: Opened) -> None:
    """Under cp a network has a part of each sample, and an attention that sees the rest and knows what is padding."""

    def network(argument: Any, *, theirs: bool) -> ModalityNetwork:
        modality = nn.Module()
        encoder = megatrons.of_two(TransformerBlock, theirs=theirs, causal=False)
        modality.encoders = nn.ModuleDict({"eye": encoder})
        return ModalityNetwork(modality, argument)

    assert ZigZag(0, 2) == network(megatrons.arranged, theirs=False).cut
    with pytest.raises(PlanError, match="gets whole rows, of which each of cp=2 ranks is to have a part"):
        network("pixels", theirs=False)
    with pytest.raises(PlanError, match=r"an attention \(DotProductAttention\) that is not known"):
        network(megatrons.arranged, theirs=True)
    with pytest.raises(PlanError, match="attends to the positions of one of cp=2 ranks only"):
        language_of(opened, theirs=True)


def modality_of(**encoders: nn.Module) -> nn.Module:
    """A modality of these encoders, without a projection."""
    return VisionModalitySubmodules(encoders=encoders)


def test_encoders_of_one_modality_take_turns_sample_by_sample() -> None:
    """A sample's rows of the first, then of the next; for one sample as Megatron joins them."""
    near, far = torch.arange(3.0)[:, None], 10 + torch.arange(6.0).view(3, 2, 1)
    modality = modality_of(near=nn.Identity(), far=nn.Identity())
    inputs = {"near.input": near, "far.input": far}
    items = {"items.near": torch.tensor([2, 1]), "items.far": torch.tensor([1, 2])}
    said = ModalityNetwork(modality, None)({**inputs, **items})["rows"]
    assert [0, 1, 10, 11, 2, 12, 13, 14, 15] == said.flatten().tolist()
    alone = {key: torch.tensor([3]) for key in items}
    whole = ModalityNetwork(modality, None)({**inputs, **alone})["rows"]
    theirs = modality.encode({"near": {"input": near}, "far": {"input": far}})  # type: ignore[operator]
    assert torch.equal(torch.cat(theirs), whole)


def test_encoders_of_one_modality_say_which_rows_are_whose() -> None:
    """Rows that no item tells apart, an encoder without tensors, and rows of a job are refused."""
    modality = modality_of(near=nn.Identity(), far=nn.Flatten(0, 1))
    network = ModalityNetwork(modality, None)
    near = {"near.input": torch.zeros(1, 1), "items.near": torch.tensor([1])}
    far = {"far.input": torch.zeros(2, 2, 1), "items.far": torch.tensor([2])}
    with pytest.raises(WorldError, match=r"'\.far' returned a tensor of shape \[4, 1\] for 2 items"):
        network({**near, **far})
    with pytest.raises(WorldError, match="no tensors for its encoder 'far'"):
        network(near)
    with pytest.raises(PlanError, match=r"has 2 encoders, which read the tensors of items by name"):
        ModalityNetwork(modality, "pixels")


def test_an_encoder_that_draws_its_positions_is_refused() -> None:
    """RADIO does so in training, from the random state of its rank."""
    radio = RADIOViTModel.__new__(RADIOViTModel)
    nn.Module.__init__(radio)
    radio.has_cpe = True
    with pytest.raises(PlanError, match=r"(?s)is a RADIOViTModel .* depends on the layout\..*has_cpe=False"):
        ModalityNetwork(modality_of(eye=nn.Sequential(radio)), None)
    radio.has_cpe = False
    ModalityNetwork(modality_of(eye=nn.Sequential(radio)), None)


def test_an_encoder_may_return_a_tuple() -> None:
    """Its first tensor has the rows, as newer versions of Megatron take it."""

    class WithMore(nn.Module):
        """An encoder that returns something beside its rows."""

        def forward(self, pixels: Tensor) -> tuple[Any, ...]:
            """Return the pixels and what is not asked for."""
            return (pixels, None) if len(pixels) else (None, pixels)

    network = ModalityNetwork(modality_of(eye=WithMore()), "pixels")
    rows = torch.ones(3, 2)
    assert torch.equal(rows, network({"rows": rows})["rows"])
    with pytest.raises(WorldError, match="returned a tuple, not a tensor or a tuple that begins with one"):
        network({"rows": rows[:0]})


def test_a_mask_hides_what_it_hides_from_megatrons_attention() -> None:
    """Ours and Megatron's give the same in fp64, for queries that share keys, too."""
    groups = ProcessGroupCollection(tp=specs.OneOf(0, 1), cp=specs.OneOf(0, 1))
    common = {"attn_mask_type": AttnMaskType.causal, "layer_number": 1, "pg_collection": groups}
    config = specs.config(num_query_groups=2)
    generator = torch.Generator().manual_seed(5)
    query, key, value = (
        torch.randn(6, 3, heads, 4, dtype=torch.float64, generator=generator) for heads in (4, 2, 2)
    )
    hidden = torch.rand(3, 1, 6, 6, generator=generator) < 0.5
    hidden[:, :, range(6), range(6)] = False
    with megatrons.alone():
        theirs = DotProductAttention(config, attention_type="self", **common)(query, key, value, hidden)
        ours = CoreAttention(config, rotary=None, **common)(query, key, value, hidden)
        causal = CoreAttention(config, rotary=None, **common)(query, key, value)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(causal, ours)


def test_experts_in_one_weight_are_refused() -> None:
    """By the name of the class that holds them, which is a grouped one."""
    layer = mock.Mock()
    layer.experts = type("TEGroupedMLP", (), {})()
    layer.config = specs.config(**EXPERTS)
    layer.attn_tp_group = specs.OneOf(0, 1)
    layer.local_expert_indices = [0, 1, 2, 3]
    layer.token_dispatcher.tp_size = layer.token_dispatcher.ep_size = 1
    module, network = mock.Mock(), mock.Mock()
    module.name, module.model.aux_loss, module.experts_at = "language", 0.0, lambda _: range(4)
    module.experts.extent = lambda _: 1
    with (
        mock.patch.object(experts, "expert_layers", return_value={"layer": layer}),
        mock.patch.object(experts.dist, "get_backend", return_value="gloo"),
    ):
        (problem,) = experts.unable_experts(network, module, {"ep": 0}, 3)
    assert "keeps its experts as TEGroupedMLP, several in one weight" in problem.message


@pytest.mark.parametrize(
    ("owner", "what", "said"),
    [
        ("config", {"mtp_num_layers": 1}, "predicts several tokens at once"),
        ("config", {"sequence_parallel": True}, "cuts the embeddings of text before rows are put among them"),
        (
            "config",
            {"sequence_parallel": True},
            "cuts sequences of 16 positions over tp=3 and cp=2: not a multiple of 12",
        ),
        ("model", {"parallel_output": False}, "gathers its logits"),
        ("model", {"position_embedding_type": "mrope"}, "turns by mrope, and cuts positions over cp=2"),
    ],
)
def test_language_models_that_read_more_than_a_job_has_are_refused(
    opened: Opened, owner: str, what: Mapping[str, Any], said: str
) -> None:
    """By the name of what they would need."""
    with pytest.raises(PlanError, match=said):
        language_of(opened, tp=3, **{owner: what})


def language_of(
    opened: Opened,
    *,
    theirs: bool = False,
    model: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    tp: int = 1,
) -> LanguageStage:
    """A stage of a language model on the first of two ranks along cp, changed once it is built."""
    sizes = {"vocab_size": specs.VOCAB, "max_sequence_length": 16}
    gpt = megatrons.of_two(GPTModel, theirs=theirs, causal=True, **sizes)
    vars(gpt).update(model or {})
    vars(gpt.config).update(config or {})
    gpt.pg_collection.tp = specs.OneOf(0, tp)
    job = job_for(opened, {"layers": 1, "language": {"max_sequence_length": 16}}, {"dp": 1}, {"cp": 2})
    return LanguageStage(gpt, topology=job.topology, name="language", rank=1)


@pytest.mark.world
def test_a_plan_that_cuts_other_positions_is_refused(pool: Pool, opened: Opened) -> None:
    """An encoder without a transformer block gives each row from that row alone, on whichever rank."""
    common = {"layers": 2, "language": {"max_sequence_length": 16}}
    job = job_for(opened, {**common, "eye": {"layers": 2}}, {"cp": 2}, {"dp": 1})
    with pytest.raises(PlanError, match="has cp=2 in the job, and the transformer block of its encoder cp=1"):
        pool.run("megatrons:trained", 3, job, common, {}, {})


@pytest.mark.world
def test_networks_on_some_ranks_only_are_refused(pool: Pool, opened: Opened) -> None:
    """Ranks with other networks would compute another model together."""
    config = {"layers": 2, "language": {"max_sequence_length": 16}}
    job = job_for(opened, config, {"dp": 1}, {"dp": 2})
    with pytest.raises(WorldError, match=r"a network for 'language' on some ranks, and none on \[2\]"):
        pool.run("megatrons:on_some", 3, job, config)


@pytest.mark.world
def test_copies_begin_alike(pool: Pool, opened: Opened) -> None:
    """Whatever each rank draws: along dp, along tp what is whole there, and at both ends what is tied."""
    config = {"layers": 2, "pp": 2, "tp": 2, "language": {"max_sequence_length": 16, **TIED, **LEARNED}}
    job = job_for(opened, config, {"dp": 1}, {"tp": 2, "dp": 1, "pp": 2})
    said = pool.run("megatrons:begun", job.topology.world_size, job, config)
    positions = "model.embedding.position_embeddings.weight"
    assert np.array_equal(said[1][positions], said[2][positions])
    for tp in range(2):
        first, last = said[1 + tp], said[3 + tp]
        assert np.array_equal(
            first["model.embedding.word_embeddings.weight"], last["model.output_layer.weight"]
        )
        assert first["model.embedding.word_embeddings.weight"].any()


@pytest.mark.world
def test_copies_of_experts_begin_alike(pool: Pool, opened: Opened) -> None:
    """Those of the same experts, on ranks that hold others beside; what routes is the same on all."""
    config = {"layers": 1, "language": {"max_sequence_length": 16}, **EXPERTS, **OVER_TWO}
    job = job_for(opened, config, {"dp": 1}, {"cp": 2, "dp": 2})
    said = pool.run("megatrons:begun", job.topology.world_size, job, config)
    router, expert = (
        f"model.decoder.layers.0.mlp.{name}"
        for name in ("router.weight", "experts.local_experts.0.linear_fc1.weight")
    )
    for rank in (2, 3, 4):
        assert np.array_equal(said[1][router], said[rank][router])
    for rank in (1, 2):
        assert np.array_equal(said[rank][expert], said[rank + 2][expert])
    assert not np.array_equal(said[1][expert], said[2][expert])
