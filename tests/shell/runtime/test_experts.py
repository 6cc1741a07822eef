"""Experts are exact: wherever they lie and tokens come from, loss and gradients are those of one process.

The notation of the jobs is that of `layouts`, ``name(tp,pp,dp)@offset``; behind a bar stand axes of grids, options
of models and fields of modules that differ, ``lm.ep=2 lm.experts=4 lm.recompute=full lm.sp``.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest

import layouts
from mimogrid.core.job.spec import GridSpec, JobSpec
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.run.parity import TOLERANCE
from mimogrid.shell.world.launch import Pool
from parity import Parity, assert_same
from running import trained
from scale import nightly_only, one_of_each


world = pytest.mark.world


def spread(line: str, *, absent: Mapping[str, float] | None = None, **options: Any) -> JobSpec:
    """Return the job of a line."""
    grids, _, words = line.partition("|")
    spec = layouts.job(grids, data={"absent": absent or {}}, **options)
    modules = dict(spec.modules)
    for word in words.split():
        name, _, what = word.partition(".")
        modules[name] = _changed(modules[name], *what.partition("=")[::2])
    sequence = max(spec.data.options["sequence"], 16)
    # Context parallelism cuts a sequence into chunks.
    data = attrs.evolve(spec.data, options={**spec.data.options, "sequence": -(-sequence // 16) * 16})
    return attrs.evolve(spec, modules=modules, data=data)


def _changed(module: Any, key: str, value: str) -> Any:
    if key == "sp":
        return attrs.evolve(module, grid=attrs.evolve(module.grid, sequence_parallel=True))
    if key == "frozen":
        return attrs.evolve(module, frozen=True)
    if key in {field.name for field in attrs.fields(GridSpec)}:
        return attrs.evolve(module, grid=attrs.evolve(module.grid, **{key: int(value)}))
    if key in {"experts", "top_k", "aux_loss"}:
        number = float(value) if key == "aux_loss" else int(value)
        return attrs.evolve(module, options=attrs.evolve(module.options, **{key: number}))
    return attrs.evolve(module, **{key: tuple(value.split(",")) if key == "trainable" else value})


# -- layouts -----------------------------------------------------------------------------------------------

CASES = [
    # Experts over one rank: copies on every tp rank and part of a sequence.
    "enc(1,1,1)@0 lm(2,1,1)@1 | lm.experts=4 lm.aux_loss=0.1 lm.sp",
    # Over dp ranks, over tp ranks, cut over expert_tp, and all of it.
    "enc(1,1,1)@0 lm(2,1,2)@1 | lm.experts=4 lm.ep=2 lm.expert_tp=2 lm.aux_loss=0.1",
    # Other microbatches.
    "enc(1,1,2)@0 lm(1,1,2)@2/2 | lm.experts=4 lm.ep=2 enc.experts=4 enc.ep=2 enc.aux_loss=0.3",
    # Context parallelism: other tokens of the same samples.
    "enc(1,1,1)@0 lm(1,1,1)@1 | lm.cp=2 lm.experts=4 lm.ep=2 lm.aux_loss=0.1",
    # Blocks in a pipeline, and regressors.
    "enc(1,1,1)@0->mid mid(1,2,2)@1 lm(1,1,1)@5->gen gen(1,1,2)@6 | mid.experts=2 mid.ep=2 gen.experts=2 gen.ep=2",
    *nightly_only(
        [
            "enc(1,1,1)@0 lm(1,1,2)@1 | lm.experts=4",
            "enc(1,1,1)@0 lm(1,2,2)@1 | lm.experts=4 lm.ep=2 lm.aux_loss=0.1",
            "enc(1,1,1)@0 lm(2,1,1)@1 | lm.experts=4 lm.aux_loss=0.1",
            "enc(1,1,1)@0 lm(1,1,2)@1 | lm.experts=4 lm.ep=2 lm.aux_loss=0.1",
            "enc(1,1,1)@0 lm(1,1,3)@1 | lm.experts=6 lm.ep=3 lm.aux_loss=0.1 lm.top_k=3",
            "enc(1,1,1)@0 lm(2,1,2)@1 | lm.experts=4 lm.ep=4 lm.aux_loss=0.1 lm.sp",
            "enc(1,1,1)@0 lm(1,1,4)@1 | lm.experts=2 lm.ep=2 lm.top_k=1 lm.aux_loss=0.1",
            "enc(1,1,1)@0 lm(2,1,1)@1 | lm.experts=4 lm.ep=2",
            "enc(1,1,1)@0 lm(2,1,1)@1 | lm.experts=3 lm.expert_tp=2 lm.aux_loss=0.1",
            "enc(1,1,1)@0 lm(2,1,3)@1 | lm.experts=3 lm.ep=3 lm.aux_loss=0.1 lm.top_k=1",
            "enc(1,1,1)@0 lm(4,1,1)@1 | lm.experts=2 lm.ep=2 lm.expert_tp=2 lm.sp",
            "enc(1,1,1)@0 lm(1,1,4)@1 | lm.experts=2 lm.expert_tp=4",
            "enc(2,1,2)@0 lm(2,2,2)@0 "
            "| lm.experts=4 lm.ep=2 lm.aux_loss=0.1 enc.experts=2 enc.ep=2 enc.aux_loss=0.3",
            "enc(1,1,1)@0 lm(2,1,1)@1 | lm.cp=2 lm.experts=4 lm.ep=2 lm.expert_tp=2 lm.aux_loss=0.1 lm.sp",
            "enc(2,1,1)@0 lm(1,1,2)@4 "
            "| lm.cp=2 lm.experts=4 lm.ep=4 enc.cp=2 enc.experts=2 enc.ep=2 enc.aux_loss=0.3",
            "enc(1,1,2)@0 lm(1,1,1)@2 | enc.experts=4 enc.ep=2 enc.aux_loss=0.3",
            "enc(2,2,2)@0 lm(1,1,1)@0 | enc.experts=4 enc.ep=4 enc.aux_loss=0.3 enc.sp",
        ]
    ),
]


@world
@pytest.mark.parametrize("line", CASES)
def test_any_layout_of_experts_is_the_model(parity: Parity, line: str) -> None:
    """Ragged samples, some without a modality, over ranks that each hold some experts or a part of them."""
    assert_same(parity, spread(line))


@world
@pytest.mark.parametrize(
    ("line", "absent"),
    one_of_each(
        [
            "enc(1,2,2)@0 lm(1,1,2)@4 | enc.experts=4 enc.ep=2 enc.aux_loss=0.3 enc.top_k=1",
            "enc(2,1,2)@0 lm(2,1,1)@4 | enc.experts=2 enc.ep=2 enc.expert_tp=2 enc.aux_loss=0.3 enc.sp",
            *nightly_only(
                [
                    "enc(1,1,2)@0 lm(1,1,2)@4 | enc.cp=2 enc.experts=4 enc.ep=4 enc.aux_loss=0.3",
                    "enc(1,1,4)@0 lm(1,1,1)@4 | enc.experts=4 enc.ep=4 enc.aux_loss=0.3",
                    "enc(2,1,3)@0 lm(2,1,1)@0 | enc.experts=3 enc.ep=3 enc.recompute=full enc.aux_loss=0.3",
                ]
            ),
        ],
        [0.8, 1.0],
    ),
)
def test_dp_ranks_without_rows_lend_their_experts(parity: Parity, line: str, absent: float) -> None:
    """Where dp ranks compute together some have no sample with images in a microbatch; in places none has."""
    assert_same(parity, spread(line, absent={"enc": absent}, samples=4))


@world
@pytest.mark.parametrize("recompute", ["full", *nightly_only(["selective"])])
def test_what_is_recomputed_is_routed_alike(parity: Parity, recompute: str) -> None:
    """Tokens cross twice; the auxiliary loss counts once."""
    words = f"lm.experts=4 lm.ep=2 lm.expert_tp=2 lm.aux_loss=0.1 lm.recompute={recompute}"
    assert_same(parity, spread(f"enc(1,1,1)@0 lm(2,1,2)@1 | {words}"))


@world
@pytest.mark.parametrize(
    "words",
    [
        "enc.trainable=projector.* lm.trainable=layers.0.mlp.experts.3.down.bias",
        *nightly_only(
            [
                "enc.trainable=layers.1.mlp.experts.0.*",
                "enc.trainable=layers.0.mlp.router.weight",
                "enc.trainable=layers.1.* lm.frozen",
                "enc.frozen",
            ]
        ),
    ],
)
def test_partly_frozen_experts(parity: Parity, words: str) -> None:
    """Ranks whose own experts are frozen still take part in the backward of those that train."""
    experts = "enc.experts=2 enc.ep=2 enc.aux_loss=0.3 lm.experts=4 lm.ep=2 lm.aux_loss=0.1"
    assert_same(parity, spread(f"enc(1,1,2)@0 lm(1,2,2)@2 | {experts} {words}"))


@world
@pytest.mark.parametrize("order", [("dp", "tp", "cp", "pp"), *nightly_only([("tp", "pp", "dp", "cp")])])
def test_axes_in_any_order(parity: Parity, order: tuple[str, ...]) -> None:
    """Experts lie over consecutive ranks, whatever these share."""
    words = (
        "enc.experts=2 enc.expert_tp=2 enc.aux_loss=0.3 lm.experts=4 lm.ep=2 lm.expert_tp=2 lm.aux_loss=0.1"
    )
    assert_same(parity, spread(f"enc(2,2,2)@0 lm(2,1,2)@0 | {words}", order=order))


# -- against the plain model -------------------------------------------------------------------------------

PLAIN = [
    "enc(1,1,2)@0 lm(1,2,2)@2 | enc.experts=4 enc.ep=2 enc.aux_loss=0.3 lm.experts=4 lm.ep=2 lm.aux_loss=0.1",
    "enc(2,1,2)@0 lm(2,1,2)@4 | enc.experts=3 enc.expert_tp=4 enc.top_k=1 enc.aux_loss=0.3 "
    "lm.experts=4 lm.ep=2 lm.expert_tp=2 lm.sp lm.top_k=3",
    "enc(1,1,2)@0 lm(1,1,1)@4 | enc.cp=2 enc.experts=4 enc.ep=2 enc.aux_loss=0.3 "
    "lm.cp=4 lm.experts=2 lm.ep=2 lm.top_k=1 lm.aux_loss=0.1",
]


@world
@pytest.mark.parametrize("line", [PLAIN[0], *nightly_only(PLAIN[1:])])
def test_experts_are_those_of_the_plain_model(
    pool: Pool, opened: Callable[[JobSpec], Job], line: str
) -> None:
    """The same comparison with a model in mere torch, which routes token by token."""
    job = opened(spread(line, absent={"enc": 0.5}))
    said = pool.run("against_plain:parity_in_world", job.topology.world_size, job)
    (found,) = [one for one in said if one is not None]
    assert max(found.loss, found.gradients) <= TOLERANCE["fp64"], found


@world
@pytest.mark.parametrize("line", [PLAIN[1], *nightly_only([PLAIN[0], PLAIN[2], *CASES])])
def test_the_norm_that_clips_counts_every_expert_once(
    pool: Pool, opened: Callable[[JobSpec], Job], line: str
) -> None:
    """It is the norm of the full gradients, each shard and copy of an expert among them."""
    job = opened(spread(line))
    said = pool.run("against_plain:norms_in_world", job.topology.world_size, job)
    ((clips, expected),) = [one for one in said if one is not None]
    assert clips == pytest.approx(expected, rel=1e-12)


# -- runs --------------------------------------------------------------------------------------------------

DIGITS = Path(__file__).resolve().parents[3] / "examples" / "digits" / "job.toml"
EXPERTS = ["modules.language.options.experts=4", "modules.language.options.aux_loss=0.01"]
ONE_WAY = ["modules.language.grid={dp=2, ep=2}", "modules.vision.grid={}"]
OTHER_WAY = ["modules.language.grid={tp=2, expert_tp=2}", "modules.vision.grid={dp=2}"]


@world
def test_a_run_with_experts_goes_on_under_another_layout(pool: Pool, tmp_path: Path) -> None:
    """Experts and their moments move; losses, the auxiliary one by its name, go on as if they had not."""

    def train(folder: Path, *layout: str, resume: bool = False) -> Mapping[str, Any]:
        settings = ["precision=fp64", "train.steps=4", "train.checkpoint_every=2", "train.evaluate=false"]
        job = open_job(DIGITS, ["batch.global_size=16", *settings, *EXPERTS, *layout])
        return trained(pool, job, folder, resume=resume)

    expected = train(tmp_path, *ONE_WAY)["losses_by_module"]
    (tmp_path / "report.json").unlink()
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000004")
    found = train(tmp_path, *OTHER_WAY, resume=True)["losses_by_module"]
    assert {"language", "language.aux"} == set(expected) == set(found)
    for name, losses in expected.items():
        assert losses == pytest.approx(found[name], rel=1e-9)
