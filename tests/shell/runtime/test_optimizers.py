"""Optimizers: torch's classes by name, shared by dp ranks or not, and what is saved of them."""

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

import layouts
from mimogrid.core.base.errors import PlanError
from mimogrid.core.job.optimizers import KINDS, REFUSED, arguments_of, states_of
from mimogrid.core.job.spec import GridSpec, GroupSpec, JobSpec, OptimizerSpec
from mimogrid.core.update.buckets import optimizer_bytes
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.runtime import optimizer
from mimogrid.shell.world.launch import Pool
from scale import nightly_only, one_of_each
from updates import Seen, assert_same, put_together


world = pytest.mark.world

Opened = Callable[[JobSpec], Job]
Train = Callable[..., list[Seen]]


# -- classes -----------------------------------------------------------------------------------------------


OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "sgd": {"momentum": 0.9, "nesterov": True},
    "adam": {"amsgrad": True},
    "rmsprop": {"momentum": 0.5, "centered": True},
    "adagrad": {"initial_accumulator_value": 0.1},
    "asgd": {"t0": 1.0},
}
OFTEN = ("adamw", "adagrad")
"""Classes that train in every run of the tests: moments, and a state that does not begin at zero."""


@pytest.mark.parametrize("name", KINDS)
def test_what_is_written_down_of_a_class_is_what_torch_has(name: str) -> None:
    """Options exist with these defaults, and after a step the states are those of the table."""
    kind = KINDS[name]
    signature = inspect.signature(getattr(torch.optim, kind.name).__init__).parameters
    for option, default in kind.options.items():
        assert signature[option].default == default
    assert (kind.betas is not None) == ("betas" in signature)
    assert (kind.eps is not None) == ("eps" in signature)
    assert kind.decays == ("weight_decay" in signature)
    for options in ({}, OPTIONS.get(name, {})):
        spec = OptimizerSpec(name=name, options=options)
        weight = torch.nn.Parameter(torch.ones(3))
        weight.grad = torch.ones(3)
        made = getattr(torch.optim, kind.name)([weight], **arguments_of(spec))
        assert kind.starts_with_states == bool(made.state)
        made.step()
        assert set(kind.counters) == {
            key for key, value in made.state[weight].items() if _is_one_value(value)
        }
        kept = {key for key, value in made.state[weight].items() if value is not None and value.dim()}
        assert set(states_of(spec)) == kept


def _is_one_value(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not value.dim()


def test_every_class_of_torch_is_known_or_refused_with_a_reason() -> None:
    """None is forgotten; those that look at more than one value at a time are refused."""
    classes = {
        name.lower()
        for name, found in vars(torch.optim).items()
        if inspect.isclass(found) and issubclass(found, torch.optim.Optimizer) and name != "Optimizer"
    }
    assert classes == {*KINDS, *REFUSED}


def test_options_that_only_torch_can_judge_are_the_users_mistake() -> None:
    """Nesterov without momentum is a problem of the job, not of a rank."""
    spec = OptimizerSpec(name="sgd", options={"nesterov": True})
    shard = _Stub(torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(PlanError, match="Nesterov"):
        optimizer.build(spec, [("lm", shard)])  # type: ignore[list-item]


@attrs.frozen
class _Stub:
    main: torch.nn.Parameter
    part: Any = attrs.field(factory=lambda: type("Part", (), {"name": "weight"}))


@world
@pytest.mark.parametrize("name", [*OFTEN, *nightly_only(sorted({*KINDS} - {*OFTEN}))])
def test_every_class_trains_and_resumes_bitwise_under_sharding_or_without(
    train: Train, tmp_path: Path, name: str
) -> None:
    """Three steps in one go, and with a stop between under the other way of sharing, are the same bits."""
    rule = OptimizerSpec(name=KINDS[name].name, lr=0.01, options=OPTIONS.get(name, {}))
    spec = job("enc(1,1,2)@0 lm(2,1,1)@2", rule)
    shared = attrs.evolve(spec, optimizer=attrs.evolve(rule, sharded=True))
    whole = train(spec, range(3))
    first = train(shared, range(2), None, tmp_path)
    resumed = train(spec, range(2, 3), None, None, tmp_path)
    assert_same(whole, resumed)
    before, after = put_together(first), put_together(whole)
    for weight in ("enc.layers.0.mlp.up.weight", "lm.output.weight"):
        assert before[weight].tobytes() != after[weight].tobytes()
        for state in states_of(rule):
            assert f"optimizer.{state}.{weight}" in after


def job(grids: str, rule: OptimizerSpec, **fields: Any) -> JobSpec:
    """A job in fp32 with an optimizer."""
    return layouts.job(
        grids, **{"samples": 4, "precision": "fp32", "optimizer": rule, "data": {"absent": {}}, **fields}
    )


# -- sharing -----------------------------------------------------------------------------------------------


SHARED: Mapping[str, JobSpec] = {
    "uneven dp ranks": job("enc(1,1,3)@0 lm(2,1,2)@3", OptimizerSpec(lr=0.01)),
    "tied over a pipeline": job(
        "enc(1,1,2)@0 lm(1,2,2)@2",
        OptimizerSpec(lr=0.01, clip_norm=0.1),
        changes={"lm": {"options": {"tied_embeddings": True}}},
    ),
    "experts and cp": job(
        "enc(1,1,1)@0 lm(1,1,1)@1",
        OptimizerSpec(name="adam", lr=0.01, weight_decay=0.1),
        changes={
            "lm": {
                "grid": GridSpec(cp=2, dp=2, ep=2, offset=1),
                "options": {"experts": 4, "aux_loss": 0.1},
            }
        },
        data={"absent": {}, "sequence": 16},
    ),
    "groups and freezing": job(
        "enc(1,1,2)@0 lm(2,1,2)@2",
        OptimizerSpec(
            lr=0.01,
            groups=(
                GroupSpec(match=("*.bias", "*norm*"), weight_decay=0.0),
                GroupSpec(modules=("enc",), lr=0.1, weight_decay=0.2),
            ),
        ),
        changes={"enc": {"frozen": ("layers.0.*",)}},
    ),
}


@world
@pytest.mark.parametrize(
    ("case", "precision"),
    one_of_each([*list(SHARED)[2:], *nightly_only(list(SHARED)[:2])], ["fp32", "bf16"]),
)
def test_an_update_that_dp_ranks_share_is_bitwise_the_one_that_they_repeat(
    train: Train, opened: Opened, case: str, precision: str
) -> None:
    """Norms, weights and states of every step; and each rank keeps exactly what was computed for it."""
    spec = attrs.evolve(SHARED[case], precision=precision)
    shared = attrs.evolve(spec, optimizer=attrs.evolve(spec.optimizer, sharded=True))
    ours, theirs = train(shared), train(spec)
    assert_same(ours, theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.norms == other.norms
        assert one.losses == other.losses
        for name, weight in one.weights.items():
            assert weight.tobytes() == other.weights[name].tobytes(), name
    for given, said in ((shared, ours), (spec, theirs)):
        topology = opened(given).topology
        assert [optimizer_bytes(topology, rank) for rank in topology.ranks] == [seen.bytes for seen in said]
    saved = [one.bytes < other.bytes for one, other in zip(ours, theirs, strict=True)]
    modules = opened(spec).topology.modules.values()
    assert [
        any(m.dp_size * m.cp > 1 for m in modules if rank in m.grid) for rank in range(len(saved))
    ] == saved


@world
@pytest.mark.parametrize("precision", ["bf16", *nightly_only(["fp32"])])
def test_what_dp_ranks_share_loads_under_other_dp_ranks(train: Train, tmp_path: Path, precision: str) -> None:
    """A checkpoint of three dp ranks that share the update is that of two, of one, and of none that share."""
    rule = OptimizerSpec(lr=0.01, sharded=True)
    written = job("enc(1,1,3)@0 lm(1,1,1)@3", rule, samples=6, precision=precision)
    saved = put_together(train(written, range(2), None, tmp_path))
    for grids, sharded in (("enc(1,1,2)@0 lm(2,1,1)@2", True), ("enc(2,1,1)@0 lm(1,2,2)@2", False)):
        spec = job(grids, attrs.evolve(rule, sharded=sharded), samples=6, precision=precision)
        loaded = put_together(train(spec, range(2, 2), None, None, tmp_path))
        assert saved.keys() == loaded.keys()
        for name, values in saved.items():
            assert values.tobytes() == loaded[name].tobytes(), name


# -- groups and lists --------------------------------------------------------------------------------------


@world
def test_a_group_has_a_rate_and_a_decay_of_its_own(train: Train) -> None:
    """Rate 0 leaves a module as it was; the first group that matches decides."""
    groups = (
        GroupSpec(match=("enc.*.bias",), lr=0.5),
        GroupSpec(modules=("enc",), lr=0.0),
        GroupSpec(match=("*.weight",), lr=0.2),
    )
    rule = OptimizerSpec(name="sgd", lr=0.1, clip_norm=0.0)
    steps = range(1)
    begun = put_together(train(job("enc(1,1,2)@0 lm(1,1,1)@2", rule), range(0)))
    plain = put_together(train(job("enc(1,1,2)@0 lm(1,1,1)@2", rule), steps))
    grouped = put_together(train(job("enc(1,1,2)@0 lm(1,1,1)@2", attrs.evolve(rule, groups=groups)), steps))
    for name, before in begun.items():
        factor = (
            5 if name.startswith("enc.") and name.endswith(".bias") else 0 if name.startswith("enc.") else 2
        )
        factor = factor if name.startswith("enc.") or name.endswith(".weight") else 1
        expected = before + factor * (plain[name].astype(float) - before)
        assert pytest.approx(expected, abs=1e-6) == grouped[name], name
    assert any((plain[name] != before).any() for name, before in begun.items() if name.startswith("enc."))


@world
def test_a_group_for_a_module_of_the_users_must_match_there(pool: Pool, opened: Opened) -> None:
    """What such a module holds is known once it is built, and then a pattern for it is checked."""
    spec = job("enc(1,1,2)@0 lm(1,1,1)@2", OptimizerSpec())
    own = attrs.evolve(spec.modules["enc"], model="own:encoder", options={"width": 8, "features": 5})
    data = attrs.evolve(spec.data, options={**spec.data.options, "features": {"enc": 5}})
    for pattern, is_legal in (("enc.up.*", True), ("enc.up.wieght", False)):
        rule = OptimizerSpec(groups=(GroupSpec(match=(pattern,), lr=0.1),))
        spec = attrs.evolve(spec, modules={**spec.modules, "enc": own}, data=data, optimizer=rule)
        if is_legal:
            assert [True] == pool.run("updates:train", 3, opened(spec), range(1))[0].taken
            continue
        with pytest.raises(PlanError, match=r"'enc.up.wieght' matches no parameter of module 'enc'"):
            pool.run("updates:train", 3, opened(spec), range(1))


@world
def test_listed_steps_are_passed_over(pool: Pool, opened: Opened, tmp_path: Path) -> None:
    """Samples of listed steps are read by nobody, nothing is updated, and metrics and report say so."""
    spec = job("enc(1,1,2)@0 lm(1,1,1)@2", OptimizerSpec(lr=0.01, decay="linear"))
    settings = attrs.evolve(spec.train, steps=6, skip_steps=(0, (2, 3), 5), evaluate=False)
    spec = attrs.evolve(spec, train=settings)
    opened_job = opened(spec)
    said = pool.run("mimogrid.shell.run.train:in_world", 3, opened_job, None, str(tmp_path), None)
    report = next(one for one in said if one)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert list(range(6)) == [line["step"] for line in lines]
    assert [False, True, False, False, True, False] == [line["taken"] for line in lines]
    assert [0, 2, 3, 5] == report["skipped_steps"]
    assert 6 == report["steps"]
    assert [line["loss"] for line in lines if line["taken"]] == report["losses"]
    seen = pool.run("updates:train", 3, opened_job, range(6))
    assert seen[0].losses == report["losses"]
    assert 2 == seen[0].steps_taken
