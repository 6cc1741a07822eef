"""Changes: a run goes on under any layout of its job, and under no other job unless that is meant."""

import attrs
import pytest
from hypothesis import HealthCheck, given, settings

from layouts import job, layouts
from mimogrid.core.job.changes import changes, refused
from mimogrid.core.job.spec import GpuSpec, JobSpec, ScheduleSpec, TrackSpec, TrainSpec, ValidationSpec


SPEC = job("enc(1,1,2)@0 lm(1,2,1)@2")


def of_module(name: str, **fields: object) -> JobSpec:
    """The job with another module."""
    return attrs.evolve(SPEC, modules={**SPEC.modules, name: attrs.evolve(SPEC.modules[name], **fields)})


FREE = {
    "world_size": attrs.evolve(SPEC, world_size=8),
    "layouts": attrs.evolve(SPEC, layouts="plan"),
    "precision": attrs.evolve(SPEC, precision="bf16"),
    "schedule.name": attrs.evolve(SPEC, schedule=ScheduleSpec(name="zb-h1")),
    "gpu.name": attrs.evolve(SPEC, gpu=GpuSpec(name="h100")),
    "train.steps": attrs.evolve(SPEC, train=TrainSpec(steps=7)),
    "train.checkpoint_async": attrs.evolve(SPEC, train=TrainSpec(checkpoint_async=False)),
    "track.every": attrs.evolve(SPEC, track=TrackSpec(every=1)),
    "validation.every": attrs.evolve(SPEC, validation=ValidationSpec(every=1)),
    "data.workers": attrs.evolve(SPEC, data=attrs.evolve(SPEC.data, workers=2)),
    "data.ahead": attrs.evolve(SPEC, data=attrs.evolve(SPEC.data, ahead=9)),
    "data.worker_kind": attrs.evolve(SPEC, data=attrs.evolve(SPEC.data, worker_kind="thread")),
    "batch.microbatches": attrs.evolve(SPEC, batch=attrs.evolve(SPEC.batch, microbatches=2)),
    "optimizer.sharded": attrs.evolve(SPEC, optimizer=attrs.evolve(SPEC.optimizer, sharded=True)),
    "optimizer.bucket_mb": attrs.evolve(SPEC, optimizer=attrs.evolve(SPEC.optimizer, bucket_mb=1.0)),
    "modules.lm.engine": of_module("lm", engine="local"),
    "modules.lm.fp8": of_module("lm", fp8="hybrid"),
    "modules.lm.grid.tp": of_module("lm", grid=attrs.evolve(SPEC.modules["lm"].grid, tp=2)),
    "modules.lm.chunks": of_module("lm", chunks=2),
    "modules.lm.split": of_module("lm", split=(1, 1)),
    "modules.lm.options.vocab_padding": of_module(
        "lm", options=attrs.evolve(SPEC.modules["lm"].options, vocab_padding=4)
    ),
    "modules.enc.microbatches": of_module("enc", microbatches=8),
    "modules.enc.recompute": of_module("enc", recompute="full"),
}
FIXED = {
    "seed": attrs.evolve(SPEC, seed=4),
    "batch.global_size": attrs.evolve(SPEC, batch=attrs.evolve(SPEC.batch, global_size=24)),
    "data.source": attrs.evolve(SPEC, data=attrs.evolve(SPEC.data, source="digits")),
    "data.options.sequence": attrs.evolve(
        SPEC, data=attrs.evolve(SPEC.data, options={**SPEC.data.options, "sequence": 99})
    ),
    "optimizer.lr": attrs.evolve(SPEC, optimizer=attrs.evolve(SPEC.optimizer, lr=0.5)),
    "optimizer.skip_above.norm": attrs.evolve(
        SPEC,
        optimizer=attrs.evolve(SPEC.optimizer, skip_above=attrs.evolve(SPEC.optimizer.skip_above, norm=3.0)),
    ),
    "modules.lm.options.dropout": of_module(
        "lm", options=attrs.evolve(SPEC.modules["lm"].options, dropout=0.5)
    ),
    "modules.lm.model": of_module("lm", model="regressor"),
    "modules.enc.feeds": of_module("enc", feeds=()),
    "modules.enc.frozen": of_module("enc", frozen=True),
    "modules.lm.loss_weight": of_module("lm", loss_weight=2.0),
    "modules": attrs.evolve(SPEC, modules=dict(reversed(SPEC.modules.items()))),
}


@pytest.mark.parametrize("key", FREE)
def test_where_and_how_long_is_free(key: str) -> None:
    """It is listed and not refused."""
    assert [key] == [change.key for change in changes(SPEC, FREE[key])]
    assert [] == list(refused(SPEC, FREE[key], accepted=()))


@pytest.mark.parametrize("key", FIXED)
def test_what_is_trained_is_fixed_unless_it_is_named(key: str) -> None:
    """By its key, or by a table that it is in; another key does not help."""
    assert [key] == [change.key for change in refused(SPEC, FIXED[key], accepted=())]
    assert [key] == [change.key for change in refused(SPEC, FIXED[key], accepted=("train", key + "s"))]
    assert [] == list(refused(SPEC, FIXED[key], accepted=(key,)))
    assert [] == list(refused(SPEC, FIXED[key], accepted=("batch", key.partition(".")[0])))


def test_every_key_is_free_or_fixed() -> None:
    """A key that is added to the job file is seen as a change, so it cannot be forgotten."""
    found = {change.key.partition(".")[0] for change in changes(SPEC, attrs.evolve(SPEC, modules={}))}
    assert {"modules"} == found
    flat = [change for other in {**FREE, **FIXED}.values() for change in changes(SPEC, other)]
    assert {field.name for field in attrs.fields(JobSpec)} == {c.key.partition(".")[0] for c in flat}


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(layouts())
def test_a_job_differs_from_itself_in_nothing_and_alike_both_ways(drawn: JobSpec) -> None:
    """Whatever is drawn: the values stand the other way round."""
    assert [] == list(changes(drawn, drawn))
    there = {(change.key, str(change.before), str(change.after)) for change in changes(SPEC, drawn)}
    assert there == {(change.key, str(change.after), str(change.before)) for change in changes(drawn, SPEC)}
