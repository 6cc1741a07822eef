"""The options of a published module, as a job reads them, give the parameters that its recipes make."""

from pathlib import Path
from typing import Any

import attrs
import pytest

from mimogrid.core.job.models import BuiltIn, Gpt, Parameter, Vit
from mimogrid.core.job.spec import BatchSpec, DataSpec, JobSpec, SourceFacts
from mimogrid.core.models.network import DEFAULTS, Model
from mimogrid.core.pricing.flops import Load, units
from mimogrid.core.topology.parse import assemble
from mimogrid.core.topology.topology import Topology
from mimogrid.shell.job.published import published
from tiny_checkpoints import MODELS, published_modules, save


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    """Each family."""
    return published(save(request.param, tmp_path)).model


@pytest.fixture
def topology(model: Model) -> Topology:
    """A job of its modules, each on one rank."""
    batch, data = BatchSpec(global_size=1), DataSpec(source="none")
    return assemble(
        JobSpec(modules=published_modules(model), data=data, batch=batch), SourceFacts(sequence=64)
    )


def test_parameters_are_those_of_the_recipes(model: Model, topology: Topology) -> None:
    """Their names and full shapes are those of the recipes, edges included; and as many values are in the files."""
    for name, module in model.modules.items():
        ours = {p.name: (p.shape, p.values) for p in topology.modules[name].parameters}
        recipes = module.recipes.items()
        assert {parameter: (recipe.shape, recipe.stored_values) for parameter, recipe in recipes} == ours


def test_defaults_are_those_of_the_families() -> None:
    """What a family leaves out of a table is what the job's models take for it."""
    plain: dict[str, Any] = {"layers": 1, "hidden": 8, "heads": 2}
    ours = attrs.asdict(Gpt(**plain, vocab=1)) | attrs.asdict(Vit(**plain))
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in ours.items()}
    assert {name: listed[name] for name in DEFAULTS} == DEFAULTS


LOAD = Load(positions=7, rows=11, emitted=5)
PASSING = {"input.conv2": 7, "input": 11, "layers": 7, "embedding": 0, "positions": 0}


def operations(parameter: Parameter, network: BuiltIn) -> float:
    """Those of a matrix: for every row that passes it, and of an expert for every row that goes there."""
    if len(parameter.shape) == 1:
        return 0.0
    rows = next((count for name, count in PASSING.items() if parameter.name.startswith(name)), LOAD.emitted)
    if isinstance(network, Gpt) and parameter.copy:
        rows = LOAD.emitted
    share = network.top_k / network.experts if parameter.expert is not None else 1
    return 2 * rows * share * parameter.values


def test_every_matrix_is_multiplied(topology: Topology) -> None:
    """Operations are those of all matrices; a tied embedding is looked up, and multiplied as the head."""
    for module in topology.modules.values():
        network = module.model
        assert isinstance(network, BuiltIn)
        expected = sum(operations(parameter, network) for parameter in module.parameters)
        assert expected == sum(unit.forward for unit in units(network, LOAD, (), edges=module.outputs))
