"""The options of a published module, as a job reads them, give the parameters that its recipes make."""

from pathlib import Path
from typing import Any

import attrs
import pytest

from mimogrid.core.job.models import BUILT_IN, BuiltIn, Gpt, Vit
from mimogrid.core.job.placement import edge_shape
from mimogrid.core.job.projectors import Projector
from mimogrid.core.models.network import DEFAULTS, Model
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
    """Their names and full shapes are those of the recipes, edges included."""
    model = published(save(name, tmp_path)).model
    modules = parsed(model)
    for found, module in model.modules.items():
        ours = {p.name: p.shape for p in modules[found].parameters()}
        for target in module.feeds:
            written = CONVERTER.structure(module.projector.get(target, {}), Projector)
            width, projector = edge_shape(modules[found], modules[target], written)
            assert projector
            ours |= {p.name: p.shape for p in projector.parameters(target, modules[found], width)}
        assert {name: recipe.shape for name, recipe in module.recipes.items()} == ours


def test_defaults_are_those_of_the_families() -> None:
    """What a family leaves out of a table is what the job's models take for it."""
    plain: dict[str, Any] = {"layers": 1, "hidden": 8, "heads": 2}
    ours = attrs.asdict(Gpt(**plain, vocab=1)) | attrs.asdict(Vit(**plain))
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in ours.items()}
    assert {name: listed[name] for name in DEFAULTS} == DEFAULTS
