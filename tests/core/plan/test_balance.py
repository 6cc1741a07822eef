"""Samples assigned by cost: layouts of such a job have a sample for every cell, and memory for the fullest one."""

import math

import pytest

from mimogrid.core.plan.conflicts import conflicts
from mimogrid.core.plan.evaluation import Evaluator
from mimogrid.core.plan.layouts import SLOWER
from mimogrid.core.plan.planner import plan
from mimogrid.core.pricing.balance import Balance
from mimogrid.core.pricing.even import fullest_step
from mimogrid.core.program.lower import plan_step
from mimogrid.core.schedule.orders import order_of
from mimogrid.core.simulate.fullest import fullest_ranks
from planned import drawn_layouts, question


def balanced(*words, gpus=4, count=2, batch=12, seed=0):
    """A job with samples that are assigned to counted microbatches by cost."""
    return question(*words, gpus=gpus, limit=0, count=count, batch=batch, balance="cost", seed=seed)


def test_the_search_knows_that_cells_need_samples(monkeypatch):
    """No candidate is found to be illegal because it has more cells than the step has samples."""
    seen, evaluated = [], Evaluator.evaluated
    monkeypatch.setattr(
        Evaluator, "evaluated", lambda self, spec: seen.append(evaluated(self, spec)) or seen[-1]
    )
    plan(balanced(gpus=6), budget=20_000)
    assert len(seen) > 20
    assert [] == [layout.reason for layout in seen if "cells" in layout.reason]


@pytest.mark.parametrize("count", [1, 2])
def test_memory_is_that_of_the_fullest_cells(count):
    """Also where samples do not divide among cells, so that some have one more."""
    asked, uneven = balanced(gpus=8, count=count, batch=10), 0
    for layout in drawn_layouts(asked, count, 12):
        topology = asked.topology(layout.spec)
        full = fullest_step(Balance(topology).step(asked.samples))
        most = fullest_ranks(plan_step(full, order_of(topology)))
        confirmed = Evaluator(asked, "language").confirmed(layout)
        assert {name: each.bytes for name, each in most.items()} == confirmed.peak_bytes
        uneven += len(asked.samples) % math.prod(topology.cell_grid) > 0
    assert uneven


@pytest.mark.parametrize(("gpus", "seed"), [(4, 0), (6, 1)])
def test_random_layouts_do_not_beat_the_winner(gpus, seed):
    """By more than 2 %, of those that fit."""
    asked = balanced(gpus=gpus, seed=seed)
    best, evaluator = plan(asked).best, Evaluator(asked, "language")
    for layout in drawn_layouts(asked, seed, 40):
        confirmed = evaluator.confirmed(layout)
        assert confirmed.kind != SLOWER or best.step_s <= 1.02 * confirmed.step_s


@pytest.mark.parametrize(
    "words",
    [
        ["language.dp=3", "vision.dp=5"],
        ["vision.dp=4", "language.dp=3", "microbatches=2"],
    ],
)
def test_pins_with_more_cells_than_samples_are_refused(words):
    """With the numbers, and a change that is possible."""
    [problem] = conflicts(balanced(*words, gpus=8), "language")
    assert "12 samples of a step are assigned to " in problem.message
    [first, *_] = problem.remedy.removeprefix("The nearest that fits: ").rstrip(".").split(", or ")
    changed = [first if word.startswith(first.partition("=")[0]) else word for word in words]
    assert () == conflicts(balanced(*changed, gpus=8), "language")
