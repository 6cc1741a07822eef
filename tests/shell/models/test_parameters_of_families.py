"""The options of a published module, as a job reads them, give the parameters that its recipes make."""

from pathlib import Path
from typing import Any

import attrs
import pytest

from mimogrid.core.job.models import BUILT_IN, BuiltIn, Gpt, Vit
from mimogrid.core.job.placement import edge_shape
from mimogrid.core.job.projectors import Projector, deepstack_layers
from mimogrid.core.models.network import DEFAULTS, Model
from mimogrid.core.pricing.flops import Load, units
from mimogrid.core.topology.stages import Edge
from mimogrid.shell.job.jobfile import CONVERTER
from mimogrid.shell.job.published import published
from tiny_checkpoints import MODELS, save


def parsed(model: Model) -> dict[str, BuiltIn]:
    """The modules of a checkpoint, as a job file's tables are read."""
    return {
        name: CONVERTER.structure(module.table()["options"], BUILT_IN[module.model])
        for name, module in model.modules.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_recipes(name: str, tmp_path: Path) -> None:
    """Their names and full shapes are those of the recipes, edges included; and as many values are in the files."""
    model = published(save(name, tmp_path)).model
    modules = parsed(model)
    for found, module in model.modules.items():
        parameters = list(modules[found].parameters())
        for target in module.feeds:
            written = CONVERTER.structure(module.projector.get(target, {}), Projector)
            width, projector = edge_shape(modules[found], modules[target], written)
            assert projector
            parameters += projector.parameters(target, modules[found], width)
        recipes = module.recipes
        assert {name: recipe.shape for name, recipe in recipes.items()} == {
            p.name: p.shape for p in parameters
        }
        assert {name: recipe.stored_values for name, recipe in recipes.items()} == {
            p.name: p.values for p in parameters
        }


def test_defaults_are_those_of_the_families() -> None:
    """What a family leaves out of a table is what the job's models take for it."""
    plain: dict[str, Any] = {"layers": 1, "hidden": 8, "heads": 2}
    ours = attrs.asdict(Gpt(**plain, vocab=1)) | attrs.asdict(Vit(**plain))
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in ours.items()}
    assert {name: listed[name] for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_is_multiplied(name: str, tmp_path: Path) -> None:
    """Operations are those of all matrices, by the rows that pass each; of experts by as many as a token goes to."""
    model = published(save(name, tmp_path)).model
    modules = parsed(model)
    for found, module in model.modules.items():
        ours, edges = modules[found], []
        parameters = list(ours.parameters())
        for target in module.feeds:
            written = CONVERTER.structure(module.projector.get(target, {}), Projector)
            width, projector = edge_shape(ours, modules[target], written)
            assert projector
            parts = 1 + len(deepstack_layers(ours))
            edges.append(Edge(found, target, width * parts, projector, parts))
            parameters += projector.parameters(target, ours, width)
        load = Load(positions=7, rows=11, emitted=5)
        counts = {"input.conv2": 7, "input": 11, "layers": 7, "embedding": 0, "positions": 0}
        expected = 0.0
        for parameter in parameters:
            if len(parameter.shape) > 1:
                passing = next((n for start, n in counts.items() if parameter.name.startswith(start)), 5)
                chosen = ours.top_k / ours.experts if parameter.expert is not None else 1
                expected += 2 * passing * chosen * parameter.values
        if isinstance(ours, Gpt) and ours.tied_embeddings:
            expected += 2 * 5 * ours.vocab * ours.hidden
        assert expected == sum(unit.forward for unit in units(ours, load, (), edges=edges))
