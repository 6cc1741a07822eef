"""Contents: the tensors of a checkpoint are exactly those of its job, and its numbers are possible ones."""

import math
from typing import Any

import attrs
import pytest

import layouts
from mimogrid.core.job.models import Own
from mimogrid.core.job.spec import OptimizerSpec, SourceFacts
from mimogrid.core.topology.parse import assemble
from mimogrid.core.topology.topology import Topology
from mimogrid.core.update.contents import Described, field_faults, table_faults, table_of, written_as


def topology(precision: str = "bf16", **fields: Any) -> Topology:
    """A frozen encoder, a language model that is cut over tp and pp and has tied embeddings."""
    changes = {"enc": {"frozen": True}, "lm": {"options": {"tied_embeddings": True}}}
    return assemble(
        layouts.job("enc(1,1,1)@0 lm(2,2,1)@1", precision=precision, changes=changes, **fields), SourceFacts()
    )


def test_a_table_has_weights_and_the_states_of_trained_ones() -> None:
    """Frozen weights have the dtype of the network, trained ones and their states that of main parameters."""
    table = table_of(topology(), {}, (), steps_taken=1)
    assert Described(frozenset({"BF16"}), (8, 5)) == table["enc.input.weight"]
    assert Described(frozenset({"F32"}), (12, 16)) == table["lm.embedding.weight"]
    assert Described(frozenset({"F32"}), (12, 16)) == table["optimizer.exp_avg_sq.lm.embedding.weight"]
    assert (1,) == table["optimizer.step.lm.embedding.weight"].shape
    assert not any(name.startswith("optimizer.") and ".enc." in name for name in table)
    assert not any(name.startswith("optimizer.") for name in table_of(topology(), {}, (), steps_taken=0))


@pytest.mark.parametrize(
    "name", ["enc.input.bias", "lm.embedding.weight", "optimizer.exp_avg.lm.embedding.weight"]
)
def test_a_tensor_too_few_or_too_many_or_another_is_a_fault(name: str) -> None:
    """Each is said with the name of the tensor."""
    job = topology()
    whole = dict(table_of(job, {}, (), steps_taken=3))
    assert [] == list(table_faults(job, whole, steps_taken=3))
    wrong = Described(frozenset({"F64"}), whole[name].shape)
    other = attrs.evolve(whole[name], shape=(*whole[name].shape, 1))
    cases = {
        "has no": {n: of for n, of in whole.items() if n != name},
        "which its job does not have": whole | {f"{name}s": whole[name]},
        "its job has": whole | {name: wrong},
        "the job needs": whole | {name: other},
    }
    for said, found in cases.items():
        (fault,) = table_faults(job, found, steps_taken=3)
        assert said in fault
        assert name in fault


def test_of_a_custom_module_a_weight_has_all_states_or_none() -> None:
    """Its parameters are not known; what the optimizer keeps of one is."""
    spec = layouts.job("lm(1,1,1)@0", precision="fp32")
    own = attrs.evolve(spec.modules["lm"], model="some.where:network", options={})
    job = assemble(attrs.evolve(spec, modules={"lm": own}), SourceFacts())
    assert isinstance(job.modules["lm"].model, Own)
    weight = Described(frozenset({"F32"}), (3,))
    whole = {
        "lm.w": weight,
        "lm.buffer": weight,
        "optimizer.exp_avg.lm.w": weight,
        "optimizer.exp_avg_sq.lm.w": weight,
    }
    whole["optimizer.step.lm.w"] = attrs.evolve(weight, shape=(1,))
    assert [] == list(table_faults(job, whole, steps_taken=3))
    del whole["optimizer.exp_avg_sq.lm.w"]
    (fault,) = table_faults(job, whole, steps_taken=3)
    assert "optimizer.exp_avg_sq.lm.w" in fault
    assert list(table_faults(job, whole, steps_taken=0))


@pytest.mark.parametrize(("name", "states"), [("sgd", 0), ("nadam", 4), ("asgd", 4), ("adagrad", 2)])
def test_what_is_one_value_for_a_parameter_is_counted_in(name: str, states: int) -> None:
    """Steps and products belong to the state as moments do."""
    table = table_of(topology(optimizer=OptimizerSpec(name=name)), {}, (), steps_taken=1)
    assert states == sum(n.endswith(".lm.embedding.weight") and n.startswith("optimizer.") for n in table)


SKIPS = {"scale": 4.0, "good": 2, "losses": [1.0], "norms": [1.0, 2.0]}
FACTS = {
    "step": 3,
    "steps_taken": 2,
    "watch": SKIPS,
    "job": "",
    "versions": {"torch": "2"},
    "machine": {},
    "created": 1.5,
}
WRONG: dict[str, tuple[Any, ...]] = {
    "step": (-1, 1.0, "3", None, True, 10**20),
    "steps_taken": (4, 10**9, -1, 2.0, [2]),
    "job": (None, 3, ["x"]),
    "versions": (3, {"torch": 2}, []),
    "machine": ({"kernels": None}, "cpu"),
    "created": ("now", math.nan, 10**400),
    "watch": (
        {},
        [],
        *(
            {**SKIPS, key: value}
            for key, values in {
                "scale": (0.0, -1.0, math.inf, math.nan, "1", None, 10**400),
                "good": (4, -1, 0.5, True),
                "losses": ([math.nan], [1.0] * 4, 1.0, ["1"], [10**400]),
                "norms": ([-1.0], [math.inf], None),
                "more": (1,),
            }.items()
            for value in values
        ),
    ),
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG.items() for value in values]
)
def test_a_field_out_of_bounds_is_named(key: str, value: object) -> None:
    """Types and bounds; a field that older manifests lack may be missing."""
    assert any(key in fault for fault in field_faults({**FACTS, key: value}))


def test_a_manifest_of_before_has_fewer_fields() -> None:
    """Versions, machine and time may be missing; what a run goes on from may not."""
    assert [] == list(field_faults(FACTS))
    assert [] == list(field_faults({key: FACTS[key] for key in ("step", "steps_taken", "watch", "job")}))
    assert ["lacks step.", "lacks steps_taken.", "lacks watch.", "lacks job."] == list(field_faults({}))


def test_what_follows_from_job_and_step_is_written_once() -> None:
    """The next sample and the layout are those of the job."""
    written = written_as(topology(), 5)
    assert 5 * 12 == written["data"]["next_sample"]
    assert {"tp": 2, "cp": 1, "dp": 1, "pp": 2, "ep": 1, "chunks": 1, "offset": 1} == written["layout"]["lm"]


def test_a_host_programs_network_has_names_of_its_own() -> None:
    """Its weights are not those of the built-in model; a module of which nothing is there is missing."""
    job = topology("fp32")
    whole = table_of(job, {}, (), steps_taken=3)
    others = {name.replace("enc.", "enc.network."): of for name, of in whole.items()}
    assert [] == list(table_faults(job, others, steps_taken=3))
    without = {name: of for name, of in whole.items() if not name.startswith("enc.")}
    assert "has no 'enc.input.weight'" in next(table_faults(job, without, steps_taken=3))
