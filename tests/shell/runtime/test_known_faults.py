"""Faults that systems of this kind have shipped, each with the test that would have caught it.

Every test is named after what it catches; its sentence says the fault. Notations: `layouts` for jobs that run,
`jobs` for plans alone.
"""

import collections
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest

import jobs
import layouts
from bodies import Taken
from cases import CASES
from mimogrid.core.job.spec import DataSpec, GridSpec, JobSpec, LossScaleSpec, OptimizerSpec
from mimogrid.core.program.lower import Program
from mimogrid.core.program.verify import listing_of, verify
from mimogrid.core.schedule.actions import Action, Recv, Send, Transfer, Wait
from mimogrid.core.step.seeds import Seeds, seeds_of
from mimogrid.core.topology.groups import channels_of
from mimogrid.core.topology.topology import Topology
from mimogrid.core.update.reductions import counts_in_norm
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.modules.weights import draw
from mimogrid.shell.run.parity import TOLERANCE, ParityReport
from mimogrid.shell.world.launch import Pool
from scale import nightly_only
from traces import Kept, Trained
from updates import Seen, Spoilt, put_together


world = pytest.mark.world

PAIRS = [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 1), (3, 3)]
Opened = Callable[[JobSpec], Job]
Judged = Callable[[JobSpec], ParityReport]
Train = Callable[..., list[Seen]]


@pytest.fixture(scope="module")
def judged(pool: Pool, opened: Opened) -> Judged:
    """Compare a layout with `plain`, which knows no layout, and see that nothing was left out."""

    def judge(spec: JobSpec) -> ParityReport:
        job = opened(spec)
        said = pool.run("against_plain:parity_in_world", job.topology.world_size, job)
        found: ParityReport
        (found,) = [one for one in said if one is not None]
        assert trained_by_plan(job.topology) == {d.parameter for d in found.worst}
        return found

    return judge


def trained_by_plan(topology: Topology) -> set[str]:
    """Every parameter that trains, by ``module.name``."""
    return {f"{stage.module}.{name}" for stage, info in topology.stages.items() for name in info.trainable}


def assert_exact(found: ParityReport) -> None:
    """Loss and every gradient are right, and there is something to be right about."""
    assert TOLERANCE["fp64"] >= max(found.loss, found.gradients), str(found)
    assert any(difference.magnitude for difference in found.worst)


def ran(pool: Pool, opened: Opened, body: str, spec: JobSpec, *arguments: Any) -> list[Any]:
    """What the ranks of a job say that are not idle."""
    job = opened(spec)
    return [one for one in pool.run(body, job.topology.world_size, job, *arguments) if one is not None]


def written(spec: JobSpec, builder: str = "own:written", **options: Any) -> JobSpec:
    """The job with samples of a source of ours."""
    drawn = {**spec.data.options, "size": spec.batch.global_size, **options}
    return attrs.evolve(spec, data=DataSpec(source=builder, options=drawn))


# -- gradients ---------------------------------------------------------------------------------------------


@world
@pytest.mark.parametrize(("encoder", "language"), [(3, 2), *nightly_only([(1, 3), *PAIRS])])
def test_gradients_divided_by_the_wrong_dp(judged: Judged, encoder: int, language: int) -> None:
    """An encoder's gradients were averaged over its own dp ranks, too small by the ratio of the two dp sizes."""
    assert_exact(judged(layouts.job(f"enc(1,1,{encoder})@0 lm(1,1,{language})@{encoder}")))


@world
def test_mean_of_means_over_unequal_token_counts(judged: Judged, opened: Opened) -> None:
    """One module divided by its local token count and another by the global one, so dp ranks weighed wrongly."""
    grids = "enc(1,1,2)@0->lm,gen lm(1,1,3)@2 gen(1,1,2)@5"
    spec = written(layouts.job(grids, data={"text": [1, 11]}), spread=True)
    units = [sample.units["lm"] for sample in opened(spec).step(0).samples]
    assert 0 == min(units)
    assert 4 < max(units)
    assert_exact(judged(spec))


AXES: dict[str, dict[str, Any]] = {
    "none": {},
    "tp": {"tp": 2},
    "sp": {"tp": 2, "sequence_parallel": True},
    "cp": {"cp": 2},
    "ep": {"dp": 2, "ep": 2},
    "expert_tp": {"tp": 2, "expert_tp": 2},
    "pp": {"pp": 2},
    "dp": {"dp": 2},
}


@world
@pytest.mark.parametrize("axis", ["sp", "ep", *nightly_only(["none", "tp", "cp", "expert_tp", "pp", "dp"])])
def test_a_gradient_that_one_axis_does_not_sum(judged: Judged, axis: str) -> None:
    """Norm weights, biases, routers or projectors were left as partial sums along one axis of the grid."""
    of_experts = bool(AXES[axis].keys() & {"ep", "expert_tp"})
    changes: dict[str, dict[str, Any]] = {
        name: {"grid": GridSpec(offset=offset, **({} if of_experts else AXES[axis]))}
        for name, offset in (("enc", 0), ("lm", 2), ("gen", 4))
    }
    if of_experts:
        options = {"experts": 2, "top_k": 1, "aux_loss": 0.1}
        changes["lm"] = {"grid": GridSpec(offset=2, **AXES[axis]), "options": options}
    assert_exact(judged(layouts.job("enc(1,1,1)@0 lm(1,1,1)@2->gen gen(1,1,1)@4", changes=changes)))


@world
@pytest.mark.parametrize("grid", ["1,2,2", *nightly_only(["1,2,1", "2,3,1"])])
def test_tied_weights_not_summed_across_stages(judged: Judged, grid: str) -> None:
    """Embedding and output share a weight on the two ends of a pipeline, and each end stepped by itself."""
    changes = {"lm": {"options": {"tied_embeddings": True}}}
    assert_exact(judged(layouts.job(f"enc(1,1,2)@0 lm({grid})@2", changes=changes)))


@world
def test_training_that_depends_on_dp(pool: Pool, opened: Opened) -> None:
    """Unequal dp sizes needed another learning rate than equal ones: the update itself was not the model's."""
    rate = OptimizerSpec(lr=0.05, clip_norm=0.1)
    runs: list[list[float]] = []
    for one, two in ((1, 1), (2, 3), *nightly_only([(3, 1)])):
        spec = layouts.job(f"enc(1,1,{one})@0 lm(1,1,{two})@{one}", samples=4, optimizer=rate)
        runs.append([step.loss for step in ran(pool, opened, "bodies:train", spec, 3)[0]])
    assert 3 == len(set(runs[0]))
    for other in runs[1:]:
        assert pytest.approx(runs[0], rel=1e-7) == other


# -- steps -------------------------------------------------------------------------------------------------


@world
def test_an_overflow_of_the_first_module_that_only_it_skips(pool: Pool, opened: Opened) -> None:
    """An encoder overflowed and skipped its step while the language model, whose gradients were fine, took it."""
    spec = layouts.job("enc(1,1,2)@0 lm(1,2,1)@2", data={"absent": {"enc": 0.0}})
    options = {"width": 8, "features": 5, "rank": 1, "call": 5, "event": "overflow"}
    fragile = attrs.evolve(spec.modules["enc"], model="own:fragile", options=options)
    data = attrs.evolve(spec.data, options={**spec.data.options, "features": {"enc": 5}})
    said = ran(
        pool,
        opened,
        "bodies:train",
        attrs.evolve(spec, data=data, modules={**spec.modules, "enc": fragile}),
        3,
    )
    assert [[(True, True), (False, False), (True, True)]] * 4 == [
        [(step.taken, step.changed) for step in rank] for rank in said
    ]


@world
def test_an_overflow_of_the_last_module_that_only_it_skips(pool: Pool, opened: Opened) -> None:
    """A module overflowed that shares no rank and no edge with others, and those others stepped without it."""
    grids = "enc(1,1,2)@0 lm(1,1,1)@2 img(1,1,1)@3->gen gen(1,1,1)@4"
    spec = layouts.job(grids, changes={"gen": {"loss_weight": 1e300}}, data={"absent": {"img": 0.0}})
    said: list[list[Taken]] = ran(pool, opened, "bodies:train", spec, 2)
    assert 5 == len(said)
    assert {(False, False)} == {(step.taken, step.changed) for rank in said for step in rank}


@world
@pytest.mark.parametrize(
    "spoilt",
    [
        Spoilt(rank=0, step=1, module="enc", name="projector.lm.bias"),
        *nightly_only(
            [
                Spoilt(rank=2, step=1, module="lm", name="embedding.weight"),
                Spoilt(rank=3, step=1, module="lm", name="final_norm.weight"),
            ]
        ),
    ],
    ids=["first", *nightly_only(["middle", "last"])],
)
def test_loss_scalers_that_go_apart(train: Train, spoilt: Spoilt) -> None:
    """Each module lowered its own scale after an overflow of its own, and the next gradients were of two scales."""
    rule = OptimizerSpec(loss_scale=LossScaleSpec(initial=256.0))
    spec = layouts.job("enc(1,1,2)@0 lm(1,2,1)@2", precision="fp16", optimizer=rule)
    said = train(spec, range(4), spoilt)
    assert [[True, False, True, True]] * 4 == [seen.taken for seen in said]
    assert [[256.0, 256.0, 128.0, 128.0]] * 4 == [seen.scales for seen in said]
    assert [(3, said[0].skip_state)] * 4 == [(seen.steps_taken, seen.skip_state) for seen in said]
    assert {3.0} == {float(v) for name, v in steps_of(said) if name.startswith("optimizer.step.")}
    assert 1 == len({tuple(seen.norms) for seen in said})


def steps_of(said: list[Seen]) -> list[tuple[str, float]]:
    """What is kept once for each parameter."""
    return [
        (name, values[2][0]) for seen in said for name, values in seen.pieces.items() if values[0] == (1,)
    ]


@world
def test_names_that_know_the_precision(train: Train) -> None:
    """A wrapper for half precision put itself into every name, and fp32 could not read what bf16 had saved."""
    one, other = (
        put_together(train(layouts.job("enc(1,1,2)@0 lm(1,2,1)@2", precision=precision), range(1)))
        for precision in ("bf16", "fp32")
    )
    assert {name: (v.shape, v.dtype) for name, v in one.items()} == {
        name: (v.shape, v.dtype) for name, v in other.items()
    }


# -- samples -----------------------------------------------------------------------------------------------


@world
@pytest.mark.parametrize(("encoder", "language"), [(2, 3), *nightly_only([(1, 3), (3, 1), (3, 2)])])
def test_modules_that_read_different_samples(pool: Pool, opened: Opened, encoder: int, language: int) -> None:
    """With unequal dp an encoder's dp ranks read other samples than the language model's dp ranks joined them to."""
    spec = layouts.job(f"enc(1,1,{encoder})@0 lm(1,2,{language})@{encoder}", data={"absent": {"enc": 0.0}})
    dp_ranks: dict[str, dict[int, frozenset[int]]] = {"enc": {}, "lm": {}}
    for rank in ran(pool, opened, "traces:read", spec):
        for name, (dp_rank, ids) in rank.items():
            assert ids == dp_ranks[name].setdefault(dp_rank, ids)
    whole = list(range(spec.batch.global_size))
    each = spec.batch.global_size // spec.batch.microbatches
    for name, size in (("enc", encoder), ("lm", language)):
        assert size == len(dp_ranks[name])
        assert whole == sorted(i for ids in dp_ranks[name].values() for i in ids)
        for ids in dp_ranks[name].values():
            assert set(range(spec.batch.microbatches)) == {i // each for i in ids}


@world
@pytest.mark.parametrize(
    "lacking",
    [range(3), *nightly_only([range(9, 12), range(3, 6), range(12), [*range(6), *range(9, 12)]])],
    ids=["first", *nightly_only(["last", "middle", "every", "all but one"])],
)
def test_text_only_microbatches(judged: Judged, lacking: list[int]) -> None:
    """A microbatch without an image left its encoder out: reductions hung, or gradients were never reduced."""
    spec = layouts.job("enc(1,2,2)@0 lm(2,1,1)@4", samples=3, data={"absent": {"enc": 0.0}})
    assert_exact(judged(written(spec, missing={"enc": list(lacking)})))


@world
@pytest.mark.parametrize("sequence", [24, *nightly_only([None])])
def test_padding_told_by_its_value(judged: Judged, sequence: int | None) -> None:
    """Tokens, labels or rows equal to the padding value were masked as padding although they are content."""
    data = {"text": [1, 6]} | ({"sequence": sequence} if sequence else {})
    spec = layouts.job("enc(2,1,1)@0->lm,gen lm(1,1,2)@2 gen(1,1,1)@4", data=data)
    assert_exact(judged(written(spec, "traces:blank")))


# -- what trains, what is kept -----------------------------------------------------------------------------


FREEZING: dict[str, Mapping[str, Any]] = {
    "an encoder but its projector": {"enc": {"trainable": ("projector.*",)}},
    "the language model": {"lm": {"frozen": True}},
    "layers of both": {"enc": {"frozen": ("layers.0.*",)}, "lm": {"trainable": ("layers.*norm*",)}},
}


@world
@pytest.mark.parametrize("frozen", [*list(FREEZING)[2:], *nightly_only(list(FREEZING)[:2])])
def test_building_that_unfreezes(pool: Pool, opened: Opened, frozen: str) -> None:
    """Cutting a model over tp made new parameters, and these trained although the job had frozen them."""
    spec = layouts.job("enc(2,1,1)@0 lm(2,2,1)@2", changes=FREEZING[frozen], data={"absent": {"enc": 0.0}})
    said: list[Trained] = ran(pool, opened, "traces:trainable", spec)
    assert any(rank.planned for rank in said)
    for rank in said:
        assert rank.planned == rank.asking
        assert rank.changed <= rank.planned
        assert bool(rank.planned) == bool(rank.changed)


def test_two_writers_of_one_shard() -> None:
    """Under tp more than one rank took itself for the main copy of what tp replicates, and all saved it."""
    texts = [text for text in CASES.values() if "tp2" in text or "tp4" in text]
    texts += ["l gpt tp2 dp2 cp2 ep2 expert_tp2 x4", "v vit tp2 dp2 > l; l gpt tp2 pp2 dp2 tied @0"]
    for text in texts:
        topology = jobs.job(text, batch=48)
        assert {1} == set(writers(topology).values()), text


def writers(topology: Topology) -> Mapping[tuple[str, str, int], int]:
    """How many ranks write each shard of each parameter."""
    found: dict[tuple[str, str, int], int] = collections.Counter()
    for rank in topology.ranks:
        for info in topology.role(rank).stages:
            module = topology.modules[info.stage.module]
            position = module.position(rank)
            for parameter in module.held(info, position.get("ep", 0)):
                along = "tp" if parameter.expert is None else "expert_tp"
                shard = position[along] if parameter.tp_dim is not None else 0
                found[module.name, parameter.name, shard] += counts_in_norm(position, info, parameter)
    return found


@world
def test_a_resume_that_forgets_the_optimizer(pool: Pool, opened: Opened, tmp_path: Path) -> None:
    """The optimizer's step count or moments were not saved, and bias correction began anew after a resume."""
    spec = layouts.job("enc(1,1,2)@0 lm(2,2,1)@2", data={"absent": {"enc": 0.0}})
    before: list[Kept] = ran(pool, opened, "traces:saved", spec, tmp_path, 3)
    after: list[Kept] = ran(pool, opened, "traces:loaded", spec, tmp_path)
    for ours, theirs in zip(before, after, strict=True):
        assert {3} == {steps for steps, _ in theirs.values()}
        assert ours.keys() == theirs.keys()
        for name, (_, moments) in ours.items():
            assert {"exp_avg", "exp_avg_sq"} == moments.keys()
            for moment, value in moments.items():
                assert value.tobytes() == theirs[name][1][moment].tobytes(), (name, moment)
    assert any(moments["exp_avg_sq"].any() for _, moments in after[0].values())


@world
@pytest.mark.parametrize("every", [2, *nightly_only([0])])
def test_a_last_checkpoint_that_is_not_saved(pool: Pool, opened: Opened, tmp_path: Path, every: int) -> None:
    """A run ended between two checkpoints and lost its last steps, because only the interval was looked at."""
    spec = layouts.job("enc(1,1,1)@0 lm(1,1,1)@1")
    train = attrs.evolve(spec.train, steps=3, checkpoint_every=every, evaluate=False)
    spec = attrs.evolve(spec, train=train)
    ran(pool, opened, "mimogrid.shell.run.train:in_world", spec, None, str(tmp_path), None)
    expected = {2, 3} if every else {3}
    assert {f"step-{step:08}" for step in expected} == {p.name for p in (tmp_path / "checkpoints").iterdir()}


# -- the plan ----------------------------------------------------------------------------------------------


def test_seeds_that_collide() -> None:
    """Two modules, or ranks that differ only in the experts they hold, drew the same dropout or weights."""
    topology = jobs.job("a vit dp4 > l; a0 vit dp4 @0 > l; l gpt tp2 cp2 dp2 pp2 ep4 x4", batch=48)
    held: dict[tuple[Any, ...], Seeds] = {}
    for rank, step, microbatch in itertools.product(topology.ranks, range(3), range(4)):
        for info in topology.role(rank).stages:
            position = topology.modules[info.stage.module].position(rank)
            seeds = seeds_of(0, info.stage, position, step=step, microbatch=microbatch)
            held[info.stage, position["dp"], position["cp"], step, microbatch, position["tp"]] = seeds
    apart, alike = {seeds.apart for seeds in held.values()}, {seeds.alike for seeds in held.values()}
    assert len(held) == len(apart)
    assert len({place[:-1] for place in held}) == len(alike)
    assert not apart & alike
    drawn = [
        draw(parameter, seed=0, module=name).numpy().tobytes()
        for name, module in topology.modules.items()
        for parameter in module.parameters
        if parameter.std
    ]
    assert len(drawn) == len(set(drawn))


@world
def test_groups_made_in_different_orders(pool: Pool, opened: Opened) -> None:
    """Ranks made their process groups in an order of their own, and waited for each other for ever."""
    changes = {"lm": {"options": {"tied_embeddings": True}}}
    spec = layouts.job("enc(2,1,2)@0->mid,lm mid(1,2,1)@1 lm(2,2,1)@4", changes=changes)
    said = ran(pool, opened, "traces:planned", spec)
    assert 8 == len(said)
    assert [said[0]] * 8 == said
    for slot in said[0][0]:
        assert len({rank for group in slot for rank in group}) == sum(map(len, slot))


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_messages_between_ranks_that_never_met(schedule: str) -> None:
    """Communicators of two ranks were made at their first message, in whichever order each rank came to it."""
    for text, rows in itertools.product(CASES.values(), ((2,), (0, 5, 1))):
        program = planned(text, rows, schedule)
        met = set(channels_of(program.topology))
        for rank, actions in listing_of(program).items():
            for action in actions:
                if isinstance(action, Transfer):
                    assert {(rank, peer) for peer in program.peers_of(rank, action)} <= met, text


UNEQUAL = (
    "image vit pp3 > language; audio vit > language; language gpt pp2",
    "image vit pp2 dp2 > language; audio vit tp2 > language; language gpt pp3",
    "vision vit > middle, language; middle block pp3 > language; language gpt pp2",
)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("text", UNEQUAL)
def test_two_ranks_that_both_send_first(text: str, schedule: str) -> None:
    """Encoders of unequal depth met at a bridge, and both of its ends stood in a send that nobody received."""
    for rows in ((2,), (0, 3, 0), (0,)):
        assert () == verify(planned(text, rows, schedule))


def test_blocking_sends_are_told_to_deadlock() -> None:
    """Were no transfer of 1F1B posted ahead, forwards would stand against backwards, and the check must say so."""
    program = planned(UNEQUAL[0], (2,), "1f1b")
    blocking = {rank: blocked(actions) for rank, actions in listing_of(program).items()}
    (fault,) = verify(program, blocking)
    assert fault.startswith("deadlock: ")


def planned(text: str, rows: tuple[int, ...], schedule: str) -> Program:
    """A program with these rows of every encoder."""
    given = dict.fromkeys(("vision", "image", "audio"), rows)
    return jobs.program_of(text, given, batch=48, schedule=schedule)


def blocked(actions: tuple[Action, ...]) -> tuple[Action, ...]:
    """The same actions where nothing is posted ahead: each transfer begins where it is waited for, or at once."""
    kept = [
        a
        for a in actions
        if not isinstance(a, Recv) and not (isinstance(a, Wait) and isinstance(a.transfer, Send))
    ]
    return tuple(b for a in kept for b in at_once(a))


def at_once(action: Action) -> tuple[Action, ...]:
    """A transfer whole."""
    if isinstance(action, Send):
        return action, Wait(action)
    return (action.transfer, action) if isinstance(action, Wait) else (action,)
