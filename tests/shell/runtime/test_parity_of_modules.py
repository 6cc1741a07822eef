"""Whatever modules are made of, every layout has the loss and the gradients of the same model on one process.

The notation of the jobs is that of `layouts`: ``name(tp,pp,dp)@offset``, of the ranks 0 to 7.
"""

from typing import Any

import attrs
import pytest

from layouts import MODELS, PIPELINE_INSIDE, PIPELINE_LAST, job
from mimogrid.core.job.spec import DataSpec, JobSpec
from parity import Parity, assert_same
from scale import nightly_only, one_of_each


pytestmark = pytest.mark.world


# -- weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [2, *nightly_only([1])])
def test_shared_key_value_heads(parity: Parity, kv_heads: int) -> None:
    """Query heads that share keys and values, sharded by as many ranks as there are of these."""
    changes = {name: {"options": {"kv_heads": kv_heads}} for name in ("enc", "lm")}
    assert_same(parity, job(f"enc({kv_heads},1,2)@0 lm({kv_heads},2,1)@4", changes=changes))


@pytest.mark.parametrize(
    ("grids", "order"),
    one_of_each(
        [
            "lm(2,1,2)@0",
            "enc(1,1,1)@0 lm(2,2,1)@1",
            *nightly_only(["enc(1,1,2)@0 lm(1,1,1)@2", "lm(1,4,2)@0", "lm(2,2,2)@0"]),
        ],
        [PIPELINE_LAST, PIPELINE_INSIDE],
    ),
)
def test_tied_embeddings(parity: Parity, grids: str, order: tuple[str, ...]) -> None:
    """A weight that both ends of a module hold gets the sum of both gradients; both may be one."""
    changes = {"lm": {"options": {"tied_embeddings": True}}}
    assert_same(parity, job(grids, order=order, changes=changes))


@pytest.mark.parametrize(
    ("grids", "tied"),
    one_of_each(
        [
            "enc(2,2,1)@0 lm(2,2,1)@4",
            *nightly_only(["mid(2,1,2)@0 lm(2,1,2)@4", "enc(2,1,1)@0 lm(4,1,1)@2"]),
        ],
        [True, *nightly_only([False])],
    ),
)
def test_sequence_parallel(parity: Parity, grids: str, tied: bool) -> None:
    """Between the linears each tp rank holds a part of the positions."""
    spec = job(grids, data={"sequence": 12}, changes={"lm": {"options": {"tied_embeddings": tied}}})
    assert_same(parity, in_parts(spec))


def in_parts(spec: JobSpec) -> JobSpec:
    """Return the spec with every module sequence parallel."""
    modules = {
        name: attrs.evolve(m, grid=attrs.evolve(m.grid, sequence_parallel=True))
        for name, m in spec.modules.items()
    }
    return attrs.evolve(spec, modules=modules)


# -- losses ------------------------------------------------------------------------------------------------


def test_losses_are_weighed(parity: Parity) -> None:
    """Three losses, in the middle and at the ends of the graph, each with a weight."""
    changes = {"lm": {"loss_weight": 0.5}, "gen1": {"loss_weight": 3.0}, "gen2": {"loss_weight": 0.0}}
    grids = "enc(1,1,2)@0->lm,gen2 lm(1,2,1)@2->gen1 gen1(1,1,3)@4 gen2(1,1,1)@7"
    assert_same(parity, job(grids, changes=changes))


def test_a_loss_without_units_is_nothing(parity: Parity) -> None:
    """No text in the whole step: the language model's loss is 0 over 0, and the generator's still counts."""
    spec = job("enc(1,1,2)@0 lm(1,2,1)@2->gen gen(1,1,1)@4", data={"text": [0, 0], "absent": {"enc": 0.2}})
    assert_same(parity, spec)


def test_samples_without_text(parity: Parity) -> None:
    """Some samples have neither text nor rows."""
    assert_same(parity, job("enc(1,1,3)@0 lm(1,2,2)@3", data={"text": [0, 2], "absent": {"enc": 0.6}}))


# -- absence -----------------------------------------------------------------------------------------------

LACKING = {
    "the first": range(3),
    "a middle one": range(3, 6),
    "the last": range(9, 12),
    "all but one": [*range(6), *range(9, 12)],
    "all": range(12),
    "one dp rank of each": [1, 2, 4, 5, 7, 8, 10, 11],
}


@pytest.mark.parametrize(
    ("grids", "lacking"),
    one_of_each(
        [
            "enc(1,1,2)@0 aud(1,2,1)@2 lm(2,1,2)@4",
            "enc(1,2,1)@0 aud(1,1,1)@0 lm(1,2,1)@0",
            "enc(1,1,3)@0->mid,lm mid(2,1,1)@3 aud(1,1,1)@5->mid lm(1,1,2)@6",
        ],
        [
            "the first",
            "all",
            "one dp rank of each",
            *nightly_only(["a middle one", "the last", "all but one"]),
        ],
    ),
)
def test_a_modality_may_be_absent(parity: Parity, grids: str, lacking: str) -> None:
    """Microbatches without rows of an encoder, wherever they stand: no hang, and nothing is missed."""
    missing = {"enc": list(LACKING[lacking])}
    assert_same(parity, written(job(grids, samples=3, data={"absent": {"enc": 0.0}}), missing=missing))


def test_everything_may_be_absent(parity: Parity) -> None:
    """A step without a single row for the only loss has loss 0 and zero gradients."""
    spec = job("enc(1,1,2)@0->gen gen(1,2,1)@2", data={"absent": {"enc": 1.0}})
    assert_same(parity, spec)


@pytest.mark.parametrize(
    "grids",
    [
        "enc(1,1,3)@0->mid,lm mid(1,1,1)@3 lm(1,1,2)@4->gen gen(1,1,1)@6",
        *nightly_only(["enc(1,1,2)@0 aud(1,1,1)@2 lm(2,2,1)@3"]),
    ],
)
def test_placeholders_among_the_text(parity: Parity, grids: str) -> None:
    """Rows stand anywhere in the sequence, and tokens weigh 0, a quarter or a half."""
    assert_same(parity, written(job(grids), spread=True))


def written(spec: JobSpec, **options: Any) -> JobSpec:
    """Return the spec with samples of `own.written`."""
    drawn = {**spec.data.options, "size": spec.batch.global_size, **options}
    return attrs.evolve(spec, data=DataSpec(source="own:written", options=drawn))


# -- what trains -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"enc": {"trainable": ("projector.lm.*",)}, "mid": {"frozen": True}},
        {"lm": {"trainable": ("layers.1.*",)}, "enc": {"frozen": True}},
        *nightly_only(
            [
                {"enc": {"frozen": True}},
                {name: {"frozen": True} for name in ("enc", "mid", "lm", "gen")},
                {"lm": {"frozen": True}},
                {"gen": {"frozen": True}},
                {"enc": {"frozen": True}, "mid": {"frozen": True}, "lm": {"frozen": True}},
                {"enc": {"frozen": True}, "mid": {"frozen": True}},
                {"enc": {"trainable": ("projector.*",)}},
                {"enc": {"trainable": ("projector.mid.bias",)}},
                {"enc": {"frozen": ("input.*", "layers.0.*")}},
                {"mid": {"trainable": ("layers.1.*",)}},
                {"lm": {"trainable": ("output.weight",)}, "enc": {"frozen": True}, "mid": {"frozen": True}},
                {"lm": {"trainable": ("projector.*",)}, "enc": {"frozen": True}, "mid": {"frozen": True}},
                {
                    "lm": {"trainable": ("embedding.weight",)},
                    "enc": {"frozen": True},
                    "mid": {"frozen": True},
                },
            ]
        ),
    ],
    ids=str,
)
def test_frozen_modules(parity: Parity, changes: dict[str, Any]) -> None:
    """What is frozen has no gradient on either side; what trains, behind or before it, has all of its own."""
    grids = "enc(1,1,2)@0->mid,lm mid(1,1,1)@2 lm(1,2,1)@3->gen gen(1,1,2)@5"
    assert_same(parity, job(grids, changes=changes))


@pytest.mark.parametrize(
    ("trainable", "sequence_parallel"),
    one_of_each(["*weight", "*.bias", *nightly_only(["*.attention.qkv.bias"])], [False, True]),
)
def test_biases_and_weights_apart(parity: Parity, trainable: str, sequence_parallel: bool) -> None:
    """Of a sharded layer the bias may train and the weight not, or the other way round."""
    changes = {name: {"trainable": (trainable,)} for name in ("enc", "lm")}
    spec = job("enc(2,1,1)@0 lm(2,2,1)@2", data={"sequence": 12}, changes=changes)
    assert_same(parity, in_parts(spec) if sequence_parallel else spec)


@pytest.mark.parametrize(
    "trainable",
    [
        ("embedding.weight",),
        *nightly_only([("layers.0.*",), ("layers.1.*",), ("output.weight", "embedding.weight")]),
    ],
)
def test_patterns_and_tied_embeddings(parity: Parity, trainable: tuple[str, ...]) -> None:
    """A tied weight trains at both ends or at none."""
    changes = {"lm": {"options": {"tied_embeddings": True}, "trainable": trainable[-1:]}}
    assert_same(parity, job("enc(1,1,2)@0 lm(2,2,1)@2", changes=changes))


# -- modules of the user's ---------------------------------------------------------------------------------


def test_modules_of_the_user(parity: Parity) -> None:
    """An encoder of the user's feeds a language model, and that one's rows a loss of the user's."""
    spec = job("enc(1,1,2)@0 lm(1,2,1)@2->gen gen(1,1,3)@4", changes={"gen": {"loss_weight": 0.5}})
    changed = {
        "enc": attrs.evolve(spec.modules["enc"], model="own:encoder", options={"width": 6, "features": 5}),
        "gen": attrs.evolve(spec.modules["gen"], model="own:judge", options={"features": 16}),
    }
    data = attrs.evolve(spec.data, options={**spec.data.options, "features": {"enc": 5}})
    assert_same(parity, attrs.evolve(spec, modules={**spec.modules, **changed}, data=data))


def test_a_module_without_weights(parity: Parity) -> None:
    """Rows pass through a module of the user's that holds nothing to train, before and behind what trains."""
    spec = job("enc(1,1,2)@0->mid mid(1,1,1)@2->gen gen(1,2,1)@3", changes={"enc": {"frozen": True}})
    passing = attrs.evolve(spec.modules["mid"], model="own:passing", options={"width": 16})
    for frozen in (True, False):
        enc = attrs.evolve(spec.modules["enc"], frozen=frozen, options=attrs.evolve(MODELS["vit"], hidden=16))
        modules = {**spec.modules, "enc": enc, "mid": passing}
        assert_same(parity, attrs.evolve(spec, modules=modules))


def test_targets_that_are_called_alike(parity: Parity) -> None:
    """The projector of one edge may train and that of another, whose target's name begins alike, not."""
    changes = {"enc": {"trainable": ("projector.lm2.*",)}}
    assert_same(parity, job("enc(1,1,2)@0->lm,lm2 lm(1,1,1)@2 lm2(1,1,1)@3", changes=changes))


# -- precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grids",
    [
        "enc(2,1,2)@0 lm(2,2,1)@4",
        *nightly_only(
            ["enc(1,1,2)@0 lm(1,1,1)@2", "enc(1,1,3)@0->mid,lm mid(2,1,1)@3 lm(1,2,1)@5->gen gen(1,1,1)@7"]
        ),
    ],
)
def test_single_precision(parity: Parity, grids: str) -> None:
    """In fp32 layouts agree as closely as its rounding lets them."""
    assert_same(parity, job(grids, precision="fp32"))
