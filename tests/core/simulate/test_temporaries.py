"""Temporaries of compute actions: they come and go with the action, and follow from what it computes."""

import attrs

from jobs import program_of
from mimogrid.core.pricing.assumed import assumed
from mimogrid.core.schedule.actions import Compute, Kind
from mimogrid.core.simulate.memory import temporary_bytes, trace
from mimogrid.core.simulate.simulation import simulate
from mimogrid.core.step.step import step_of
from mimogrid.core.topology.parse import assemble


def temporaries(program, kind, **changes):
    """The temporaries of a kind of action of the first stage, if the modules are changed."""
    topology = program.topology
    modules = {name: attrs.evolve(m, **changes) for name, m in topology.spec.modules.items()}
    topology = assemble(attrs.evolve(topology.spec, modules=modules), topology.source)
    step = step_of(topology, program.routes.step.samples)
    action = Compute(kind, next(iter(topology.stages)), 0)
    return temporary_bytes(step, action, 0, trains=not changes.get("frozen", False))


def test_they_are_there_while_an_action_runs():
    """A backward has some from its begin to its end; a forward that saves what it makes has none."""
    program = program_of("language gpt pp2", batch=4, microbatches=2)
    levels = trace(simulate(program, assumed(program.topology)), 0)
    found = [(str(level.action).split()[-1][0], level.temporaries > 0) for level in levels[1:]]
    computed = [(kind, is_there) for kind, is_there in found if kind in "FB"]
    assert {("F", False), ("B", True), ("B", False)} == set(computed)
    assert 0 == levels[-1].temporaries


def test_recomputed_values_and_products_are_among_them():
    """Full recomputation has a layer's values once more; weights wait for their products, in the second half."""
    program = program_of("language gpt pp2", batch=4, microbatches=2)
    whole, again = (temporaries(program, Kind.BACKWARD, recompute=way) for way in ("none", "full"))
    assert 0 < whole < again
    first, second = (temporaries(program, kind) for kind in (Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT))
    assert whole == first + second
    matrices = (p.shape for p in program.topology.modules["language"].parameters if len(p.shape) > 1)
    largest = max(rows * columns for rows, columns in matrices)
    assert 4 * largest == second


def test_a_head_is_done_before_the_layers_run_backward():
    """Layers take the room of what the head has saved; with many words, the gradient of the logits takes most."""

    def of_words(text, vocab):
        program = program_of(text, batch=4, microbatches=2)
        options = program.topology.spec.modules["language"].options
        found = temporaries(program, Kind.BACKWARD, options=attrs.evolve(options, vocab=vocab))
        return found, program.routes.step.shape("language", 0, 0)[0], options.hidden

    assert of_words("language gpt", 8)[0] < of_words("language gpt pp2", 8)[0]
    many, positions, hidden = of_words("language gpt", 4096)
    assert 4 * 4096 * (positions + hidden) == many


def test_a_forward_without_backward_has_a_layer_at_once():
    """Twice as many layers have no more; a wider one has."""
    program = program_of("language gpt", batch=4, microbatches=2)
    options = program.topology.spec.modules["language"].options
    few, many, wide = (
        temporaries(program, Kind.FORWARD, frozen=True, options=attrs.evolve(options, **more))
        for more in ({}, {"layers": 2}, {"ffn": 64})
    )
    assert 0 < few == many < wide
