"""Half precision: bf16 and fp16 beside fp32 main weights, and steps that all ranks take or none."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

import layouts
from mimogrid.core.job.spec import JobSpec, LossScaleSpec, OptimizerSpec, SkipSpec
from mimogrid.shell.run.parity import ParityReport
from scale import nightly, nightly_only, one_of_each
from updates import Seen, Spoilt, assert_same, put_together


pytestmark = pytest.mark.world

Train = Callable[..., list[Seen]]

GRIDS = "enc(1,1,2)@0 lm(2,1,1)@2"


def job(precision: str, grids: str = GRIDS, **optimizer: Any) -> JobSpec:
    """A job whose optimizer has these settings."""
    rule = OptimizerSpec(**{"lr": 0.01, **optimizer})
    return layouts.job(grids, samples=4, precision=precision, optimizer=rule, data={"absent": {"enc": 0.0}})


# -- forward and backward ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "precision"),
    one_of_each(
        [
            ("enc(1,2,1)@0 lm(2,2,1)@2", "zb-h1"),
            ("enc(1,1,3)@0 aud(1,1,1)@2*2 lm(1,1,2)@2->gen gen(2,1,1)@5", "gpipe"),
            *nightly_only([("enc(2,1,2)@0->mid,lm mid(1,2,1)@1 lm(2,2,1)@4", "1f1b")]),
        ],
        ["bf16", "fp16"],
    ),
)
def test_a_layout_rounds_no_more_than_one_process(
    parity: Callable[[JobSpec], ParityReport], layout: tuple[str, str], precision: str
) -> None:
    """Gradients of a layout are as near to fp32 as those of one process in the same precision."""
    grids, schedule = layout
    found = parity(layouts.job(grids, precision=precision, schedule=schedule))
    assert found.passed, found.in_words()
    assert 1e-4 < found.gradients
    assert found.limit < {"bf16": 0.2, "fp16": 0.03}[precision]


@pytest.mark.parametrize("precision", ["bf16", *nightly_only(["fp16"])])
def test_training_goes_down_as_in_fp32(train: Train, precision: str) -> None:
    """In half precision the loss falls step by step along that of fp32, within one part in a hundred."""
    arguments = (range(6), None, None, None, 0)
    rule: dict[str, Any] = {"lr": 0.006, "loss_scale": LossScaleSpec(initial=256.0)}
    exact, *_ = train(job("fp32", **rule), *arguments)
    assert exact.losses[0] - exact.losses[-1] > 0.2
    rounded, *_ = train(job(precision, **rule), *arguments)
    assert all(rounded.taken)
    assert pytest.approx(exact.losses, rel=1e-2) == rounded.losses
    assert exact.losses != rounded.losses


@nightly
def test_three_hundred_steps_in_bf16_end_where_those_in_fp32_end(train: Train) -> None:
    """The mean loss of the last ten steps agrees within two parts in a hundred, after it has fallen by half."""
    arguments = (range(300), None, None, None, 0)
    ends: dict[str, float] = {}
    for precision in ("fp32", "bf16"):
        seen, *_ = train(job(precision, lr=0.001, decay="constant"), *arguments)
        assert all(seen.taken)
        ends[precision] = sum(seen.losses[-10:]) / 10
        assert ends[precision] < seen.losses[0] / 2
        print(f"{precision}: {seen.losses[0]:.6f} -> {ends[precision]:.6f}")  # noqa: T201
    assert pytest.approx(ends["fp32"], rel=0.02) == ends["bf16"]


def test_small_gradients_and_updates_are_not_lost(train: Train) -> None:
    """What bf16 could not add to a weight of bf16, many steps add to its main weight."""
    (seen, *_) = before = train(job("bf16", lr=1e-5, decay="constant"), range(0))
    after = train(job("bf16", lr=1e-5), range(4))
    one, other = put_together(before), put_together(after)
    name = "lm.final_norm.weight"
    assert (one[name] == 1).all()
    assert (other[name] != 1).any()
    assert np.abs(other[name] - 1).max() < 2**-9  # half of what is between two numbers of bf16 below 1
    assert (after[-1].weights["lm.0.final_norm.weight"] == 1).all()
    assert seen.steps_taken == 0


# -- all or none -------------------------------------------------------------------------------------------

SPOILT = [
    Spoilt(rank=1, step=1, module="enc", name="layers.0.mlp.up.weight"),
    Spoilt(rank=3, step=1, module="lm", name="layers.1.attention.out.bias"),  # a copy that no norm counts
]


@pytest.mark.parametrize(
    ("precision", "sharded"),
    [("bf16", True), *nightly_only([("fp32", False), ("fp32", True), ("bf16", False)])],
)
@pytest.mark.parametrize(
    "spoilt", [SPOILT[1], *nightly_only(SPOILT[:1])], ids=["a copy", *nightly_only(["encoder"])]
)
def test_an_overflow_in_one_parameter_is_everybodys(
    train: Train, precision: str, spoilt: Spoilt, sharded: bool
) -> None:
    """One infinite gradient on one rank: the world ends where it ends if that step is on the list."""
    spec = job(precision, sharded=sharded)
    said = train(spec, range(3), spoilt)
    assert [[True, False, True]] * 4 == [seen.taken for seen in said]
    assert {2} == {seen.steps_taken for seen in said}
    listed = attrs.evolve(spec, train=attrs.evolve(spec.train, skip_steps=(1,)))
    assert_same(said, train(listed))


@pytest.mark.parametrize("spoilt", [SPOILT[1], *nightly_only(SPOILT[:1])])
def test_an_overflow_lowers_every_scale(train: Train, spoilt: Spoilt) -> None:
    """In fp16 all ranks back off together, and all count good steps from there."""
    rule = LossScaleSpec(initial=1024.0, interval=2)
    said = train(job("fp16", loss_scale=rule), range(5), spoilt)
    assert [[True, False, True, True, True]] * 4 == [seen.taken for seen in said]
    assert [[1024.0, 1024.0, 512.0, 512.0, 1024.0]] * 4 == [seen.scales for seen in said]
    assert [said[0].skip_state] * 4 == [seen.skip_state for seen in said]
    assert {4} == {seen.steps_taken for seen in said}


def test_an_overflow_on_one_rank_changes_no_weight(train: Train) -> None:
    """In fp16 all ranks skip the step: weights and states are those before it, and every scale falls by half."""
    spec = job("fp16", loss_scale=LossScaleSpec(initial=1024.0))
    before, after = train(spec, range(1)), train(spec, range(2), SPOILT[0])
    assert [[True, False]] * 4 == [seen.taken for seen in after]
    assert [512.0] * 4 == [seen.skip_state["scale"] for seen in after]
    assert_same(before, after)
    for ours, theirs in zip(before, after, strict=True):
        for name, weight in ours.weights.items():
            assert weight.tobytes() == theirs.weights[name].tobytes()


def test_a_scale_that_is_too_high_falls_until_it_fits(train: Train) -> None:
    """Steps overflow until the scale fits, then they are taken; none changes a weight before."""
    said = train(job("fp16", loss_scale=LossScaleSpec(initial=2.0**24)), range(10))
    taken = said[0].taken
    first = taken.index(True)
    assert first > 3
    assert all(taken[first:])
    assert 10 - first == said[0].steps_taken


@pytest.mark.parametrize("key", ["norm", *nightly_only(["loss"])])
def test_a_spike_is_skipped_by_all(train: Train, key: str) -> None:
    """A step far above the recent median is passed over, changes nothing, and training goes on after it."""
    quiet = job("fp32", lr=1e-6)
    base = train(quiet, range(4))[0]
    series = base.norms if key == "norm" else base.losses
    most = 1.0 + 1e-6
    spec = job("fp32", lr=1e-6, skip_above=SkipSpec(**{key: most}, window=1))
    said = train(spec, range(4))
    expected = [True, *(later <= most * earlier for earlier, later in itertools.pairwise(series))]
    assert False in expected
    assert [expected] * 4 == [seen.taken for seen in said]
    skipped = tuple(index for index, taken in enumerate(expected) if not taken)
    assert_same(
        said, train(attrs.evolve(quiet, train=attrs.evolve(quiet.train, skip_steps=skipped)), range(4))
    )


# -- resuming ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "sharded"),
    [("fp16", True), *nightly_only([("bf16", False), ("bf16", True), ("fp16", False)])],
)
def test_a_resumed_run_is_bitwise_the_one_that_never_stopped(
    train: Train, tmp_path: Path, precision: str, sharded: bool
) -> None:
    """Main weights, moments, scale and the steps that it has been good for: all go on."""
    rule = LossScaleSpec(initial=256.0, interval=3)
    spec = job(precision, loss_scale=rule, sharded=sharded, skip_above=SkipSpec(norm=50.0, window=2))
    whole = train(spec, range(5))
    train(spec, range(2), None, tmp_path)
    resumed = train(spec, range(2, 5), None, None, tmp_path)
    assert_same(whole, resumed)
    assert whole[0].losses[2:] == resumed[0].losses
    assert [seen.skip_state for seen in whole] == [seen.skip_state for seen in resumed]
    assert [seen.steps_taken for seen in whole] == [seen.steps_taken for seen in resumed]
    for ours, theirs in zip(whole, resumed, strict=True):
        for name, weight in ours.weights.items():
            assert weight.tobytes() == theirs.weights[name].tobytes()
    if precision == "fp16":
        assert 512.0 == whole[0].skip_state["scale"]


@pytest.mark.parametrize("precision", ["fp16", *nightly_only(["bf16"])])
def test_a_run_goes_on_bitwise_in_the_middle_of_skips(train: Train, tmp_path: Path, precision: str) -> None:
    """Overflows and spikes are skipped before the stop and behind it; the count of good steps goes on."""
    rule = LossScaleSpec(initial=256.0, interval=5)
    spec = job(precision, lr=1e-6, loss_scale=rule, skip_above=SkipSpec(norm=1.0 + 1e-6, window=1))
    whole = train(spec, range(7), SPOILT[0])
    taken = whole[0].taken
    stop = next(i for i in range(3, 6) if not taken[i - 1] and not all(taken[i:]))
    stopped = train(spec, range(stop), SPOILT[0], tmp_path)
    assert 0 < stopped[0].skip_state["good"] or precision == "bf16"
    resumed = train(spec, range(stop, 7), None, None, tmp_path)
    assert taken[stop:] == resumed[0].taken
    assert whole[0].scales[stop:] == resumed[0].scales
    assert whole[0].losses[stop:] == resumed[0].losses
    assert [seen.skip_state for seen in whole] == [seen.skip_state for seen in resumed]
    assert_same(whole, resumed)


def test_a_checkpoint_of_one_precision_loads_in_another(train: Train, tmp_path: Path) -> None:
    """Names and values of main weights know no precision: what bf16 saved, fp32 begins with."""
    saved = put_together(train(job("bf16"), range(2), None, tmp_path))
    loaded = put_together(train(job("fp32"), range(2, 2), None, None, tmp_path))
    assert saved.keys() == loaded.keys()
    for name, values in saved.items():
        assert values.tobytes() == loaded[name].tobytes()
