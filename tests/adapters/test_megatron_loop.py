"""Megatron's training loop around a step of a job: its optimizer, its checkpoints, and a model that it can hold."""

import inspect
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import numpy as np
import pytest
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.optimizer.optimizer_config import OptimizerConfig

import loops
import megatrons
import specs
from megatron_loops import Looped
from mimogrid.adapters.megatron import LoopModel, job_of, optimizer_spec_of
from mimogrid.core.base.errors import PlanError
from mimogrid.core.job.spec import BatchSpec, JobSpec
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.world.launch import Pool
from scale import nightly, nightly_only


Opened = Callable[[JobSpec], Job]


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    """Give Megatron's grids a world to fit in, without a process group."""
    with mock.patch.dict(os.environ, {"WORLD_SIZE": "4096"}):
        yield


WHOLE = {"layers": 2, "language": {"max_sequence_length": loops.SEQUENCE}}
RATES = {"lr": 1e-2, "weight_decay": 0.0, "clip_grad": 0.5, "adam_beta2": 0.95}


def job_for(
    opened: Opened,
    config: Mapping[str, Any],
    vision: Mapping[str, int],
    language: Mapping[str, int],
    options: Mapping[str, Any],
) -> Job:
    """A job of the model on these grids, in the precision of an optimizer with these options."""
    grids = megatrons.side_by_side(vision, language)
    batch = BatchSpec(global_size=loops.SAMPLES, microbatches=loops.MICROBATCHES)
    made = OptimizerConfig(**options)
    precision = "bf16" if made.bf16 else "fp32"
    spec = job_of(
        megatrons.config_of(**config),
        grids,
        batch=batch,
        precision=precision,
        optimizer=optimizer_spec_of(made),
    )
    return opened(spec)


def weights_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Weights of a whole model, by Megatron's names."""
    with megatrons.alone():
        state = megatrons.whole(megatrons.config_of(**config)).state_dict()
        return {n: t.numpy() for n, t in state.items() if hasattr(t, "numpy")}


def first(said: list[Looped]) -> Looped:
    """What the job's first rank saw: the one that has the whole state."""
    (found,) = [one for one in said if one.state]
    return found


@pytest.mark.world
@pytest.mark.parametrize(
    ("vision", "language", "options"),
    [
        ({"dp": 2}, {"dp": 2}, {"bf16": True, "use_distributed_optimizer": True}),
        *nightly_only(
            [
                ({"dp": 1}, {"tp": 2, "pp": 2}, {}),
                ({"dp": 3}, {"pp": 2}, {"bf16": True}),
                ({"dp": 2}, {"pp": 2, "chunks": 2}, {"bf16": True, "use_distributed_optimizer": True}),
            ]
        ),
    ],
)
def test_the_optimizer_of_a_loop_takes_the_steps_of_the_job(
    pool: Pool,
    opened: Opened,
    vision: Mapping[str, int],
    language: Mapping[str, int],
    options: Mapping[str, Any],
) -> None:
    """Weights, states and norms are equal to the last bit, in half precision and with a shared update too.

    A rank in no grid has no model, and a step of its optimizer has nothing to do.
    """
    whole = {**WHOLE, "language": {**WHOLE["language"], "scatter_embedding_sequence_parallel": False}}
    config = {**whole, "pp": language.get("pp", 1), "tp": language.get("tp", 1)}
    if "chunks" in language:
        whole, twice = {**whole, "layers": 4}, {"virtual_pipeline_model_parallel_size": language["chunks"]}
        config = {**config, "layers": 4, **twice}
    options = {**RATES, **options}
    grid = {axis: size for axis, size in language.items() if axis != "chunks"}
    job = job_for(opened, config, vision, grid, options)
    weights, ranks = weights_of(whole), job.topology.world_size
    expected = first(pool.run("megatron_loops:by_job", ranks, job, config, weights, 2))
    *said, idle = pool.run("megatron_loops:by_optimizer", ranks + 1, job, config, weights, 2, options)
    assert [(True, None, None)] * 2 == idle.steps
    for one in said:
        assert expected.steps == one.steps
    seen = first(said)
    assert expected.state.keys() == seen.state.keys()
    assert [] == [
        name for name, value in expected.state.items() if not np.array_equal(value, seen.state[name])
    ]
    assert any(name.startswith("optimizer.exp_avg.") for name in seen.state)


DECAYED = {**RATES, "weight_decay": 0.1, "bf16": True}
SHARED = {**DECAYED, "use_distributed_optimizer": True}
SEEN = {**WHOLE, "eye": {"layers": 2}}
Layout = tuple[Job, Mapping[str, Any], Mapping[str, Any]]
"""A job, the configuration of its networks, and the options of its optimizer."""


def layouts(opened: Opened) -> tuple[Layout, Layout]:
    """Return a layout of two dp ranks that share their update, and one of two stages."""
    cut = {**SEEN, "tp": 2, "eye": {"layers": 2, "tp": 2}}
    staged = {**cut, "pp": 2}
    there = job_for(opened, cut, {"tp": 2}, {"tp": 2, "dp": 2}, SHARED), cut, SHARED
    here = job_for(opened, staged, {"tp": 2}, {"tp": 2, "pp": 2}, DECAYED), staged, DECAYED
    return there, here


def resumed(
    pool: Pool, layout: Layout, load: Path | None, save: Path | None, steps: int
) -> Mapping[str, Any]:
    """Take steps under a layout from a checkpoint, or from the beginning; return the state."""
    job, config, options = layout
    arguments = (job, config, options, (load, save), weights_of(SEEN), steps)
    (state,) = filter(None, pool.run("megatron_loops:resumed", job.topology.world_size, *arguments))
    return state  # type: ignore[no-any-return]


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the names of what is not the same in both."""
    assert one.keys() == other.keys()
    return [name for name in one if not np.array_equal(one[name], other[name])]


@pytest.mark.world
def test_what_ranks_save_together_is_everything_once(pool: Pool, opened: Opened) -> None:
    """Weights and states of the optimizer, under one name and with one shape on every layout."""
    found = []
    for job, config, options in layouts(opened):
        parts: dict[str, list[tuple[Any, ...]]] = {}
        for key, *part in itertools.chain(*pool.run("megatron_loops:shards", 6, job, config, options)):
            parts.setdefault(key, []).append(tuple(part))
        for key, of_key in parts.items():
            ((whole,), offsets) = ({whole for whole, *_ in of_key}, {offset for _, offset, _ in of_key})
            assert len(of_key) == len(offsets), key
            assert math.prod(whole) == sum(math.prod(shape) for *_, shape in of_key), key
        found.append({key: of_key[0][0] for key, of_key in parts.items()})
    assert found[0] == found[1]
    for name, weight in weights_of(SEEN).items():
        assert weight.shape == found[0][name] == found[0][f"optimizer.state.exp_avg_sq.{name}"], name


@nightly
@pytest.mark.world
def test_a_checkpoint_of_a_loop_loads_under_another_layout(
    pool: Pool, opened: Opened, tmp_path: Path
) -> None:
    """What two dp ranks that shared their update have saved is weight for weight and state for state that of stages."""
    there, here = layouts(opened)
    saved = resumed(pool, there, None, tmp_path / "two", 2)
    assert any(value.any() for name, value in saved.items() if name.startswith("optimizer.exp_avg_sq."))
    assert [] == differences(saved, resumed(pool, here, tmp_path / "two", None, 0))


@nightly
@pytest.mark.world
def test_a_checkpoint_of_a_loop_goes_from_layout_to_layout(
    pool: Pool, opened: Opened, tmp_path: Path
) -> None:
    """Resumed where it was saved a run is bitwise one that never stopped; moved and back, its state is what it was."""
    there, here = layouts(opened)
    two, other = tmp_path / "two", tmp_path / "moved"
    saved = resumed(pool, there, None, two, 2)
    assert [] == differences(resumed(pool, there, None, None, 4), resumed(pool, there, two, None, 2))
    assert [] == differences(saved, resumed(pool, here, two, other, 0))
    assert [] == differences(saved, resumed(pool, there, other, None, 0))


# -- a model that a loop holds -----------------------------------------------------------------------------


CALLED = (
    "broadcast_params",
    "disable_forward_pre_hook",
    "enable_forward_pre_hook",
    "finish_grad_sync",
    "free_overlap_buffers",
    "load_state_dict",
    "no_sync",
    "scale_gradients",
    "start_grad_sync",
    "start_param_sync",
    "state_dict",
    "state_dict_for_save_checkpoint",
    "zero_grad_buffer",
)
"""The methods of Megatron's wrappers that its training loop, its schedules and its checkpoints call."""


@pytest.mark.parametrize("name", CALLED)
def test_a_model_is_called_as_megatrons_wrappers(name: str) -> None:
    """Whatever they accept by name, it accepts."""
    for wrapper in (_BaseDataParallel, DistributedDataParallel):
        if hasattr(wrapper, name):
            theirs = inspect.signature(getattr(wrapper, name)).parameters.values()
            named = [p.name for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD]
            inspect.signature(getattr(LoopModel, name)).bind(**dict.fromkeys(named))


@pytest.mark.world
def test_a_loop_may_do_with_gradients_what_it_likes(pool: Pool, opened: Opened) -> None:
    """The norm and the update are of what they are at the step; a step that is lost changes nothing."""
    config = {**WHOLE, "pp": 2}
    job = job_for(opened, config, {"dp": 2}, {"pp": 2}, RATES)
    said = pool.run("megatron_loops:handled", 4, job, config, weights_of(WHOLE))
    for seen in said:
        assert [True] * 6 == [
            seen[key] for key in ("unchanged", "halved", "success", "cleared", "unwrapped", "names")
        ]
        norm, half = seen["norms"]
        assert norm / 2 == pytest.approx(half, rel=1e-6)
        assert 0 <= seen["zeros"] < sum(one["values"] for one in said)
        assert (False, None, None) == seen["lost"]
        assert [] == seen["back"] == seen["same"]
        assert ([1.0], specs.HIDDEN) == (seen["scale"], seen["config"])
    assert said[0]["moved"]
    assert [2, 2, 1, 1] == [seen["dp_cp"] for seen in said]
    assert [[("vision", 1.0, 2), ("vision", 0.0, 2)]] * 2 == [seen["groups"] for seen in said[:2]]


@pytest.mark.world
def test_settings_that_a_job_does_not_have_are_refused(pool: Pool, opened: Opened) -> None:
    """By name; and those for which the job was not opened."""
    job = job_for(opened, WHOLE, {"dp": 1}, {"dp": 1}, RATES)
    options = {
        **RATES,
        "optimizer": "muon",
        "bf16": True,
        "use_distributed_optimizer": True,
        "decoupled_lr": 0.1,
    }
    with pytest.raises(PlanError) as refused:
        pool.run("megatron_loops:by_optimizer", 2, job, WHOLE, {}, 1, options)
    wrong = ["optimizer.optimizer", "optimizer.decoupled_lr", "precision", "optimizer.sharded"]
    assert wrong == [problem.where for problem in refused.value.problems]


# -- batches of the ranks' own -----------------------------------------------------------------------------


def exact_job(opened: Opened, vision: Mapping[str, int], language: Mapping[str, int]) -> tuple[Job, Any, Any]:
    """A job in fp64, the configuration of its networks and weights."""
    config = {**WHOLE, "pp": language.get("pp", 1)}
    job = job_for(opened, config, vision, language, RATES)
    return opened(attrs.evolve(job.spec, precision="fp64")), config, weights_of(WHOLE)


@pytest.mark.world
@pytest.mark.parametrize("ids", [False, *nightly_only([True])])
def test_ranks_may_have_their_own_samples(pool: Pool, opened: Opened, *, ids: bool) -> None:
    """As Megatron's loaders give them: gradients are those of whole microbatches, to the last bit."""
    job, config, weights = exact_job(opened, {"dp": 3}, {"pp": 2})
    for own, whole, said in pool.run("megatron_loops:per_rank", 5, job, config, weights, 0, ids):
        assert not said
        assert whole == own
        assert any(whole)


@pytest.mark.world
@pytest.mark.parametrize(("ids", "said"), [(True, "has the id"), *nightly_only([(False, "has the tokens")])])
def test_loaders_at_different_samples_are_noticed(
    pool: Pool, opened: Opened, *, ids: bool, said: str
) -> None:
    """Before anything is computed, on every rank, with the sample and the modules."""
    job, config, weights = exact_job(opened, {"dp": 1}, {"dp": 2})
    for _, _, told in pool.run("megatron_loops:per_rank", 3, job, config, weights, 1, ids):
        assert "sample 0 of the step " + said in told
        assert "a batch of 'vision'" in told
        assert "one of 'language'" in told


@pytest.mark.world
def test_a_loader_that_ends_on_one_rank_ends_the_step_on_all(pool: Pool, opened: Opened) -> None:
    """The rank says so itself; the others do not wait for what it has."""
    job, config, weights = exact_job(opened, {"dp": 1}, {"dp": 2})
    first, *others = [
        said for _, _, said in pool.run("megatron_loops:per_rank", 3, job, config, weights, 99, True)
    ]
    assert first.startswith("StopIteration")
    for told in others:
        assert re.match(r"EchoError: rank \d was cut off: ranks \[0\] have no batch for this step", told)
