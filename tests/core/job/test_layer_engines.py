"""Engines: whose layers a module gets, and what is refused before anything is built."""

from typing import Any

import attrs
import pytest

from mimogrid.core.base.errors import PlanError
from mimogrid.core.job.layer_engines import LOCAL, TRANSFORMER_ENGINE, choose, engine_problems
from mimogrid.core.job.models import Gpt, Vit
from mimogrid.core.job.spec import BatchSpec, DataSpec, GridSpec, JobSpec, ModuleSpec, ScheduleSpec


MODEL = Vit(layers=1, hidden=32, heads=2)


def job(*, precision: str = "bf16", schedule: str = "1f1b", **fields: Any) -> JobSpec:
    """A job of one module, `m`."""
    module = attrs.evolve(ModuleSpec(model="vit", options=MODEL), **fields)
    return JobSpec(
        modules={"m": module},
        data=DataSpec(source="none"),
        batch=BatchSpec(global_size=1),
        schedule=ScheduleSpec(name=schedule),
        precision=precision,
    )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_machine_decides_in_half_precision(precision: str) -> None:
    """Transformer-engine's where they are; else local ones, and the reason is what is missing."""
    spec = job(precision=precision)
    assert TRANSFORMER_ENGINE == choose("m", spec, missing="").engine
    there_is_none = choose("m", spec, missing="no GPU")
    assert (LOCAL, "no GPU") == (there_is_none.engine, there_is_none.reason)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"precision": "fp32"}, "fp32"),
        ({"precision": "fp64"}, "fp64"),
        ({"schedule": "zb-h1"}, "zb-h1"),
        ({"options": Gpt(layers=1, hidden=32, heads=2, vocab=8, experts=2)}, "experts"),
        ({"options": {}}, "not a built-in model"),
        ({"engine": "local"}, "asks for local"),
    ],
)
def test_local_layers_where_the_others_cannot(fields: dict[str, Any], reason: str) -> None:
    """Whatever the machine has; and the reason is told."""
    choice = choose("m", job(**fields), missing="")
    assert LOCAL == choice.engine
    assert reason in choice.reason


@pytest.mark.parametrize("fields", [{"engine": "transformer_engine"}, {"fp8": "hybrid"}])
def test_what_is_asked_for_and_missing_is_an_error(fields: dict[str, Any]) -> None:
    """It names the key, what is missing, and the way out."""
    spec = job(**fields)
    assert [] == list(engine_problems("m", spec))
    assert TRANSFORMER_ENGINE == choose("m", spec, missing="").engine
    with pytest.raises(PlanError, match=f"modules.m.{next(iter(fields))}") as caught:
        choose("m", spec, missing="there is no GPU")
    assert "there is no GPU" in str(caught.value)
    assert "mimogrid[gpu]" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "fact"),
    [
        ({"engine": "transformer_engine", "precision": "fp64"}, "no fp64"),
        ({"engine": "transformer_engine", "schedule": "zb-h2"}, "zb-h2"),
        ({"engine": "transformer_engine", "options": {}}, "not a built-in model"),
        ({"fp8": "hybrid", "engine": "local"}, "local layers do not"),
        ({"fp8": "hybrid", "precision": "fp32"}, "precision is fp32"),
        ({"fp8": "e4m3", "precision": "fp16"}, "precision is fp16"),
        ({"fp8": "hybrid", "grid": GridSpec(tp=4)}, "hidden is 32 over tp = 4"),
        ({"fp8": "hybrid", "grid": GridSpec(cp=2)}, "context parallelism"),
    ],
)
def test_what_no_machine_could_do_is_refused(fields: dict[str, Any], fact: str) -> None:
    """With where it stands in the job file, and why."""
    problems = list(engine_problems("m", job(**fields)))
    key = "fp8" if "fp8" in fields else "engine"
    assert {f"modules.m.{key}"} == {problem.where for problem in problems}
    assert any(fact in problem.message for problem in problems)
