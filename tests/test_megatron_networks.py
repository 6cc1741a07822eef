"""Megatron's networks in a job's program: the numbers of Megatron's own model on one process, in fp64."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import numpy as np
import pytest
from megatron.core.hyper_comm_grid import HyperCommGrid
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import silu

import megatrons
import specs
from megatrons import Seen
from mimogrid.adapters.megatron import job_of
from mimogrid.core.errors import PlanError, WorldError
from mimogrid.core.shards import buckets_of
from mimogrid.core.spec import BatchSpec, DataSpec, JobSpec, OptimizerSpec, ScheduleSpec
from mimogrid.shell.export import export
from mimogrid.shell.jobs import Job
from mimogrid.shell.launch import Pool
from mimogrid.shell.manifest import published


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
    **fields: Any,
) -> Job:
    """A job of the model on these grids, with random samples."""
    end = int(np.prod(list(vision.values())))
    grids = {
        "vision": HyperCommGrid(list(vision.values()), list(vision)),
        "language": HyperCommGrid(list(language.values()), list(language), rank_offset=end),
    }
    spec = job_of(
        megatrons.config_of(**config),
        grids,
        batch=BatchSpec(global_size=12, microbatches=4),
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
    """Lane by lane, microbatch by microbatch, the logits of all tokens in order."""
    module = job.topology.modules["language"]
    lanes: dict[int, list[np.ndarray]] = {}
    for rank, seen in enumerate(said):
        if seen.logits:
            lanes[module.lane_of(rank)] = seen.logits
    assert [*range(module.lanes)] == sorted(lanes)
    step, (logits,) = job.step(0), expected.logits
    starts = step.rows_start["language"]
    for lane, found in lanes.items():
        for k, each in enumerate(found):
            samples = module.samples(lane, k, len(step.samples))
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
        (({"dp": 2}, {"pp": 2}), {}, LEARNED),
        (({"dp": 1}, {"tp": 2, "pp": 2}), {}, LEARNED),
        (({"dp": 3}, {"tp": 2, "dp": 2}), {"sequence_parallel": True}, PARTS | LEARNED),
        (({"dp": 1}, {"tp": 2, "pp": 2}), {"sequence_parallel": True}, PARTS),
        (({"dp": 1}, {"cp": 2, "pp": 2}), {}, LEARNED),
        (({"dp": 2}, {"tp": 2, "cp": 2}), {"sequence_parallel": True}, PARTS),
        (({"dp": 1}, {"pp": 3}), {"num_layers_in_first_pipeline_stage": 1}, {}),
        (({"dp": 1}, {"tp": 2, "pp": 2}), {"num_query_groups": 2, "add_bias_linear": False}, {}),
        (({"dp": 1}, {"tp": 2, "dp": 2}), {"gated_linear_unit": True, "activation_func": silu}, {}),
        (({"dp": 1}, {"dp": 2}), {}, TIED),
        (({"dp": 1}, {"tp": 2, "pp": 2}), {}, TIED),
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


ONLY_IN_PARTS = ("sequence_parallel", "num_layers_in_first_pipeline_stage")


@pytest.mark.world
@pytest.mark.parametrize(
    ("vision", "language"),
    [
        ({"pp": 2}, {"dp": 2}),
        ({"tp": 2, "pp": 2}, {"tp": 2}),
        ({"dp": 2, "pp": 2}, {"pp": 2}),
    ],
)
def test_an_encoder_of_megatrons_trains_in_stages(
    pool: Pool, opened: Opened, vision: Mapping[str, int], language: Mapping[str, int]
) -> None:
    """Every stage runs its layers, rows find their samples, and padding is not looked at."""
    whole = {"layers": 2, "language": {"max_sequence_length": 16}}
    eye = {"layers": 4}
    cut = {"pp": language.get("pp", 1), "tp": language.get("tp", 1)}
    cut_eye = {**eye, "pp": vision["pp"], "tp": vision.get("tp", 1)}
    config = {**whole, **cut, "eye": cut_eye}
    job = job_for(opened, config, vision, language)
    compare(pool, job, config, {**whole, "eye": eye})


@pytest.mark.world
@pytest.mark.parametrize(
    "options", [{"add_bias_linear": False}, {"gated_linear_unit": True, "activation_func": silu}]
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


@pytest.mark.world
@pytest.mark.parametrize("sharded", [False, True])
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
    rule = OptimizerSpec(sharded=sharded)
    with megatrons.alone():
        weights = megatrons.whole(megatrons.config_of(**whole)).state_dict()
    begin = {name: weight.numpy() for name, weight in weights.items() if isinstance(weight, Tensor)}
    said: list[Mapping[str, Any]] = []
    for tp, dp in ((2, 2), (1, 1), (2, 2)):
        job = job_for(opened, {**whole, "tp": tp}, {"dp": 1}, {"tp": tp, "dp": dp}, optimizer=rule)
        arguments = (job, {**whole, "tp": tp}, begin, tmp_path)
        said.append(pool.run("megatrons:saved", job.topology.world_size, *arguments)[0])
    first = said[0]
    for state in said[1:]:
        assert first.keys() == state.keys()
        assert [] == [name for name in first if not np.array_equal(first[name], state[name])]
    gated = "language.decoder.layers.0.mlp.linear_fc1.weight"
    for folder in published(tmp_path):
        exported = folder.with_name(f"{folder.name}-out")
        export(folder, exported, to="safetensors", bytes_most=10**9)
        with safe_open(exported / "language.safetensors", "np") as found:
            assert np.array_equal(first[gated], found.get_tensor(gated.removeprefix("language.")))


@pytest.mark.world
@pytest.mark.parametrize("schedule", ["gpipe", "zb-h1"])
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
        ({"pp": 2}, {"recompute": "full"}, "which a host's network decides for itself"),
        ({"pp": 2}, {"frozen": ("layers.0.*",)}, "has patterns for the parameters of the built-in model"),
        ({"pp": 2}, {"options": {"experts": 2}}, "how a host's network sums their gradients is not known"),
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
