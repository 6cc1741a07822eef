"""A job inside the world of a plain torch program: the same numbers, and nothing of the program's touched."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

from hosts import Arrays, Trained
from layouts import job
from mimogrid.core.base.errors import PlanError, WorldError
from mimogrid.core.job.spec import BatchSpec, DataSpec, JobSpec, OptimizerSpec, TrainSpec
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.world.launch import Pool
from scale import nightly, nightly_only


pytestmark = pytest.mark.world

Opened = Callable[[JobSpec], Job]
GRIDS = "enc(1,1,2)@0 lm(1,2,1)@2"
STEPS = 2
ADAM = OptimizerSpec(lr=3e-3, clip_norm=0.5, weight_decay=0.1)


def first(said: list[Any]) -> Trained:
    """What the job's first rank saw: the one that has the weights."""
    (found,) = [one for one in said if one is not None and one.weights]
    return found


def by_itself(pool: Pool, opened_job: Job, steps: int = STEPS) -> Trained:
    """The same job in a world of its own."""
    return first(pool.run("hosts:by_itself", opened_job.topology.world_size, opened_job, steps))


def same(expected: Arrays, seen: Arrays) -> bool:
    """Whether every weight is the same to the last bit; `seen` may hold more."""
    assert expected
    return all(np.array_equal(weight, seen[name]) for name, weight in expected.items())


@pytest.mark.parametrize("grids", [GRIDS, *nightly_only(["enc(2,1,1)@0 lm(2,1,2)@0"])])
def test_a_plain_loop_trains_what_the_command_trains(pool: Pool, opened: Opened, grids: str) -> None:
    """Losses of every module, norms and weights are those of `mimogrid train`, to the last bit."""
    opened_job = opened(job(grids, optimizer=ADAM))
    said = pool.run("hosts:train", 4, opened_job, STEPS, {})
    expected, seen = by_itself(pool, opened_job), first(said)
    assert (expected.losses, expected.by_module, expected.norms) == (seen.losses, seen.by_module, seen.norms)
    assert same(expected.weights, seen.weights)
    assert all(expected.losses == one.losses for one in said)


def test_a_job_may_lie_anywhere_in_the_host(pool: Pool, opened: Opened) -> None:
    """On ranks that the host names, with gaps; the others take part in nothing and wait for nobody."""
    opened_job = opened(job(GRIDS))
    said = pool.run("hosts:train", 7, opened_job, STEPS, {"ranks": [1, 2, 4, 6]})
    assert by_itself(pool, opened_job).losses == first(said).losses
    assert [0, STEPS, STEPS, 0, STEPS, 0, STEPS] == [len(one.losses) for one in said]
    assert said[1].weights


def test_nothing_of_the_host_is_touched(pool: Pool, opened: Opened) -> None:
    """Not its threads, dtype, device, random states, warnings, environment, megatron or groups; its group works."""
    grids = "enc(1,1,2)@0 lm(1,2,1)@2"
    changes = {"lm": {"options": {"dropout": 0.1}}}
    for before, seen, total in pool.run("hosts:settings", 4, opened(job(grids, changes=changes))):
        for i, found in enumerate(seen):
            assert before[: len(found)] == found, i
        assert 0 + 1 + 2 + 3 == total


def test_the_host_may_step_itself(pool: Pool, opened: Opened) -> None:
    """Its optimizer, which clips by the norm that a step tells, comes to the same weights."""
    opened_job = opened(job(GRIDS, optimizer=ADAM))
    expected = by_itself(pool, opened_job)
    assert min(expected.norms) > ADAM.clip_norm
    seen = first(pool.run("hosts:own_optimizer", 4, opened_job, STEPS))
    assert expected.losses == seen.losses
    assert same(expected.weights, seen.weights)


def hosted(spec: JobSpec) -> JobSpec:
    """The job without samples of its own."""
    options = {"sequence": spec.data.options["sequence"], "features": {"enc": 5}}
    return attrs.evolve(spec, data=DataSpec(source="mimogrid.shell.job.host:samples", options=options))


LIMITED: dict[str, Any] = {"batch": BatchSpec(global_size=12, tokens_per_microbatch=24)}
"""Fields of a job whose microbatches have a limit of tokens."""


@pytest.mark.parametrize("fields", [{}, LIMITED])
def test_the_host_may_give_the_samples(pool: Pool, opened: Opened, fields: dict[str, Any]) -> None:
    """A batch that comes from outside trains as the same samples of a source do, cut by a number or by tokens."""
    spec = job(GRIDS, **fields)
    source = opened(spec)
    seen = first(pool.run("hosts:own_batches", 4, opened(hosted(spec)), source, STEPS))
    expected = by_itself(pool, source)
    assert expected.losses == seen.losses
    assert same(expected.weights, seen.weights)


@pytest.mark.parametrize("grids", [GRIDS, *nightly_only(["enc(2,1,1)@0 lm(2,1,1)@2"])])
def test_the_host_may_give_the_loss(pool: Pool, opened: Opened, grids: str) -> None:
    """What it returns is what trains: thrice the job's own loss has thrice its gradients."""
    for own, other in pool.run("hosts:own_losses", 4, opened(job(grids, precision="fp64"))):
        assert np.multiply(own, 3) == pytest.approx(other, rel=1e-12)


def test_batches_must_be_the_same_on_every_rank(pool: Pool, opened: Opened) -> None:
    """Otherwise each rank would wait for rows that no other means to send."""
    spec = job(GRIDS)
    with pytest.raises(WorldError, match=r"ranks \[1\] describe samples .*: give every rank the same"):
        pool.run("hosts:unlike_batches", 4, opened(hosted(spec)), opened(spec))


def test_a_step_without_samples_is_refused(pool: Pool, opened: Opened) -> None:
    """A job without samples of its own cannot step alone."""
    with pytest.raises(PlanError, match="handed over none for this step"):
        pool.run("hosts:train", 4, opened(hosted(job(GRIDS))), 1, {})


def with_own_encoder(model: str) -> JobSpec:
    """The job with an encoder of the user's."""
    spec = job(GRIDS)
    options = {"width": 8, "features": 5} if model == "own:encoder" else {}
    own = attrs.evolve(spec.modules["enc"], model=model, options=options, width=8)
    data = attrs.evolve(spec.data, options={**spec.data.options, "features": {"enc": 5}})
    return attrs.evolve(spec, modules={**spec.modules, "enc": own}, data=data)


def test_a_module_may_be_an_object(pool: Pool, opened: Opened) -> None:
    """It trains as the same network does that is built by name, from the first dp rank's weights on all dp ranks."""
    passed = first(
        pool.run("hosts:handed", 4, opened(with_own_encoder("mimogrid.shell.job.host:module")), STEPS)
    )
    expected = by_itself(pool, opened(with_own_encoder("own:encoder")))
    assert expected.losses == passed.losses
    assert same(expected.weights, passed.weights)


def test_modules_that_do_not_fit_are_refused(pool: Pool, opened: Opened) -> None:
    """All that is wrong with what a host hands over comes at once, before anything is opened."""
    with pytest.raises(PlanError) as refused:
        pool.run("hosts:refused", 4, opened(job(GRIDS)), {"modules": {"enc": None, "ear": None}})
    said = str(refused.value)
    assert "is built in ('vit')" in said
    assert "no module 'ear'" in said
    with pytest.raises(PlanError, match=r"batch\.tokens_per_microbatch: counts the positions of samples"):
        pool.run("hosts:refused", 4, opened(job(GRIDS, **LIMITED)), {"modules": {"enc": None}})
    with pytest.raises(PlanError, match="has not been handed over"):
        pool.run("hosts:refused", 4, opened(with_own_encoder("mimogrid.shell.job.host:module")), {})


def test_a_host_updates_no_weights_that_follow_others(pool: Pool, opened: Opened) -> None:
    """In half precision, or shared by dp ranks, what is updated is not the weights."""
    for fields in ({"precision": "bf16"}, {"optimizer": attrs.evolve(ADAM, sharded=True)}):
        with pytest.raises(PlanError, match="the host updates the weights"):
            pool.run("hosts:refused", 4, opened(job(GRIDS, **fields)), {"optimizer": "host"})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ranks": [0, 1, 2]}, "gives 3 ranks, the job needs 4"),
        ({"ranks": [1, 0, 2, 3]}, "not ascending ranks"),
        ({"ranks": [0, 1, 2, 9]}, "not ascending ranks"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(
    pool: Pool, opened: Opened, options: dict[str, Any], said: str
) -> None:
    """Before anything is opened; the host's own group goes on."""
    with pytest.raises(PlanError, match=said):
        pool.run("hosts:refused", 4, opened(job(GRIDS)), options)


def test_a_state_loads_under_any_layout(pool: Pool, opened: Opened) -> None:
    """Full tensors by name: training goes on, on other grids, as the layout that wrote them would have."""
    fields = {"microbatches": 4, "samples": 3}
    shared = attrs.evolve(ADAM, sharded=True)
    one = opened(job(GRIDS, optimizer=ADAM, **fields))
    other = opened(job("enc(2,1,1)@0 lm(2,1,2)@0", optimizer=shared, **fields))
    straight = by_itself(pool, one, 2 * STEPS)
    for second, exact in ((one, True), (other, False)):
        said = pool.run("hosts:resumed", 4, one, second, STEPS)
        rest = first([one for _, one in said])
        assert straight.losses[STEPS:] == (rest.losses if exact else pytest.approx(rest.losses, rel=1e-9))
        if exact:
            assert same(straight.weights, rest.weights)


def test_a_state_of_another_model_is_refused(pool: Pool, opened: Opened) -> None:
    """By name, on every rank, with nothing changed."""
    with pytest.raises(WorldError) as refused:
        pool.run("hosts:foreign_state", 4, opened(job(GRIDS)))
    assert "'enc.layers.0.mlp.up.weight' is missing" in str(refused.value)
    assert "'enc.projector.wieght' belongs to no module of the job" in str(refused.value)


@nightly
def test_steps_that_are_passed_over_take_no_samples(pool: Pool, opened: Opened, tmp_path: Path) -> None:
    """The next step trains on the samples after them, as `mimogrid train` does."""
    spec = job(GRIDS, optimizer=ADAM, train=TrainSpec(steps=4, skip_steps=(0, 2), evaluate=False))
    opened_job = opened(spec)
    (report,) = (
        one
        for one in pool.run("mimogrid.shell.run.train:in_world", 4, opened_job, None, str(tmp_path))
        if one is not None
    )
    said = pool.run("hosts:train", 4, opened_job, 2, {})
    assert [loss for loss in report["losses"] if loss is not None] == first(said).losses
