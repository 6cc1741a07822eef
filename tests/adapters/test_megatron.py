"""What programs for megatron-core find here: grids, roles, groups, models and a step, as they know them."""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.model.base import MimoModel
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.utils import get_model_config
from torch import Tensor, nn

import layouts
import megatrons
import specs
from hosts import Trained
from megatrons import alone
from mimogrid.adapters.megatron import (
    EXPERT_VIEW,
    ForwardBackward,
    forward_backward_func,
    from_hyper_comm_grid,
    from_specs,
    job_file_of,
    job_of,
    layer_spec,
    role_of_grids,
    to_hyper_comm_grid,
)
from mimogrid.adapters.megatron.experts import Balance
from mimogrid.adapters.torch_module import Embedded
from mimogrid.core.base.errors import PlanError
from mimogrid.core.base.grid import Axis, Grid
from mimogrid.core.job.spec import BatchSpec, JobSpec
from mimogrid.core.topology.roles import ModuleLayout, ModuleStageInfo, RankRole
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.megatron.names import ProcessGroupCollection
from mimogrid.shell.world.launch import Pool


Opened = Callable[[JobSpec], Job]
VIEWS = hasattr(HyperCommGrid, "register_view")
views = pytest.mark.skipif(not VIEWS, reason="this megatron-core has no views of grids")


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    """Give Megatron's grids a world to fit in, without a process group."""
    with mock.patch.dict(os.environ, {"WORLD_SIZE": "4096"}):
        yield


def hyper(offset: int = 0, **sizes: int) -> HyperCommGrid:
    """A grid of Megatron's with these axes, fastest first."""
    return HyperCommGrid(list(sizes.values()), list(sizes), rank_offset=offset)


# -- grids -------------------------------------------------------------------------------------------------


@given(
    st.permutations(("tp", "cp", "dp", "pp", "gtp")),
    st.lists(st.integers(1, 4), min_size=1, max_size=5),
    st.integers(0, 9),
    st.data(),
)
def test_grids_convert_both_ways(
    names: list[str], sizes: list[int], offset: int, data: st.DataObject
) -> None:
    """There and back is the identity, and along any axes both have the same groups with the same members."""
    grid = Grid(tuple(map(Axis, names, sizes)), offset=offset)
    theirs = to_hyper_comm_grid(grid)
    assert grid == from_hyper_comm_grid(theirs)
    asked = data.draw(st.permutations(theirs.dim_names))[: data.draw(st.integers(1, len(sizes)))]
    assert [list(ranks) for ranks in grid.ranks_along(asked)] == theirs.get_rank_enum(asked)


@views
@given(st.sampled_from([(1, 2), (2, 2), (4, 1), (1, 8)]), st.integers(0, 4), st.data())
def test_views_convert_both_ways(experts: tuple[int, int], offset: int, data: st.DataObject) -> None:
    """The experts of a grid are its view, with Megatron's names of the axes."""
    expert_tp, ep = experts
    base = Grid((Axis("tp", 2), Axis("cp", 1), Axis("dp", 4), Axis("pp", 2)), offset=offset)
    inside = (Axis("expert_tp", expert_tp), Axis("ep", ep), Axis("expert_dp", 8 // expert_tp // ep))
    ours = base.regrouped(inside, keep="pp")
    theirs = to_hyper_comm_grid(base, ours)
    known = ["expt_tp", "ep", "expt_dp", "pp"]
    asked = data.draw(st.permutations(known))[: data.draw(st.integers(1, 4))]
    names = [name.replace("expt", "expert") for name in asked]
    expected = theirs.get_rank_enum(asked, view=EXPERT_VIEW)
    assert expected == [list(ranks) for ranks in ours.ranks_along(names)]
    again = from_hyper_comm_grid(theirs, EXPERT_VIEW)
    assert expected == [list(ranks) for ranks in again.ranks_along(names)]
    with pytest.raises(KeyError, match="not registered"):
        from_hyper_comm_grid(theirs, "other")


def test_a_grid_that_renumbers_is_refused() -> None:
    """With pp inside, experts may lie across ranks as no grid of Megatron's can."""
    base = Grid((Axis("tp", 1), Axis("pp", 2), Axis("dp", 2)))
    experts = base.regrouped((Axis("ep", 2),), keep="pp")
    with pytest.raises(ValueError, match=r"\(0, 2, 1, 3\) is none of Megatron's"):
        to_hyper_comm_grid(experts)


# -- roles -------------------------------------------------------------------------------------------------


def test_roles_need_no_process_group() -> None:
    """An encoder on two dp ranks, a language model of two stages behind it, and a rank too many."""
    grids = {"vision": hyper(dp=2), "language": hyper(2, tp=1, pp=2)}
    roles = [role_of_grids(grids, rank) for rank in range(5)]
    assert {ModuleLayout.NON_COLOCATED} == {role.layout for role in roles} == {role.mode for role in roles}
    assert [["vision"], ["vision"], [], [], []] == [role.modality_module_names for role in roles]
    assert [["vision"], ["vision"], ["language"], ["language"], []] == [[*role.modules] for role in roles]
    assert [False, False, True, False, False] == [role.is_first_stage("language") for role in roles]
    assert [False, False, False, True, False] == [role.is_last_stage("language") for role in roles]
    assert roles[4].is_idle


def test_ranks_that_grids_share_have_all_of_their_modules() -> None:
    """Megatron accepts grids that overlap in part, and then never runs the language model on what they share."""
    grids = {"vision": hyper(dp=2), "language": hyper(1, pp=2)}
    role = role_of_grids(grids, 1)
    assert ModuleLayout.COLOCATED is role.layout
    assert role.has_modality_modules
    assert role.has_language_module


def test_grids_must_be_of_the_modules() -> None:
    """What is missing, and what is too much."""
    with pytest.raises(ValueError, match=r"Missing: \['language'\], Extra: \[\]"):
        role_of_grids({"vision": hyper(dp=2)}, 0)
    with pytest.raises(ValueError, match=r"Missing: \['audio'\], Extra: \['vision'\]"):
        role_of_grids({"vision": hyper(dp=2), "language": hyper(dp=2)}, 0, modalities=["audio"])


@pytest.mark.parametrize(
    "grids",
    [
        {"vision": {"dp": 2}, "language": {"offset": 2, "tp": 2, "pp": 2}},
        {"vision": {"tp": 2, "pp": 2}, "audio": {"offset": 4, "dp": 2}, "language": {"offset": 6, "pp": 3}},
        {"vision": {"tp": 2, "dp": 2}, "language": {"tp": 4, "dp": 1}},
    ],
)
def test_roles_equal_megatrons(grids: Mapping[str, Mapping[str, int]]) -> None:
    """Where every rank has one kind of work, as its `RankRole` says after asking its process groups."""
    theirs = pytest.importorskip("megatron.core.models.mimo.config.role")
    made = {name: hyper(**sizes) for name, sizes in grids.items()}
    for rank in range(max(grid.rank_offset + grid.size for grid in made.values())):
        ours = role_of_grids(made, rank)

        def pipeline(grid: HyperCommGrid, _: str, rank: int = rank) -> specs.OneOf:
            (ranks,) = (ranks for ranks in grid.get_rank_enum("pp") if rank in ranks)
            return specs.OneOf(ranks.index(rank), len(ranks))

        with (
            mock.patch.object(theirs.dist, "get_rank", return_value=rank),
            mock.patch.object(HyperCommGrid, "get_pg", pipeline),
        ):
            role = theirs.RankRole.build([name for name in made if name != "language"], made)
        assert [*role.modules] == [*ours.modules]
        assert role.has_language_module == ours.has_language_module
        assert role.has_modality_modules == ours.has_modality_modules
        assert role.modality_module_names == ours.modality_module_names
        for name in made:
            assert role.is_first_stage(name) == ours.is_first_stage(name)
            assert role.is_last_stage(name) == ours.is_last_stage(name)


# -- job files ---------------------------------------------------------------------------------------------


def test_a_model_with_grids_is_a_job(tmp_path: Path) -> None:
    """Its file opens; sizes and places are those of the model."""
    grids = {"vision": hyper(tp=1, cp=1, dp=2), "language": hyper(2, tp=2, cp=1, dp=1, pp=2)}
    file = tmp_path / "job.toml"
    file.write_text(job_file_of(specs.model_config(), grids, batch=BatchSpec(global_size=4)))
    job = open_job(file)
    language = job.topology.modules["language"]
    assert 2 == language.grid.offset
    assert {"tp": 2, "cp": 1, "dp": 1, "pp": 2} == {a.name: a.size for a in language.grid.axes}
    model = language.model
    assert (2, specs.HIDDEN, 4, specs.VOCAB) == (model.layers, model.hidden, model.heads, model.vocab)  # type: ignore[union-attr]
    assert "mimogrid.shell.job.host:module" == job.spec.modules["vision"].model
    assert specs.SEQUENCE == job.topology.sequence


def test_an_encoder_with_a_transformer_is_a_vit() -> None:
    """Of its size."""
    eye = specs.vision(specs.Pixels, transformer_config=specs.config(layers=3))
    grids = {"vision": hyper(pp=3), "language": hyper(3, dp=1)}
    made = job_of(
        specs.model_config(modality_submodules_spec={"vision": eye}), grids, batch=BatchSpec(global_size=2)
    )
    vision = made.modules["vision"]
    assert ("vit", 3, 3, 0) == (vision.model, vision.options.layers, vision.grid.pp, vision.grid.offset)  # type: ignore[union-attr]


def test_a_language_model_alone_is_a_job() -> None:
    """On any ranks: without a modality there is nothing to feed it."""
    made = job_of(
        specs.model_config(modality_submodules_spec={}, special_token_ids={}),
        {"language": hyper(1, tp=2, dp=2)},
        batch=BatchSpec(global_size=2),
    )
    assert ["language"] == [*made.modules]
    assert (1, 2, 2) == tuple(getattr(made.modules["language"].grid, key) for key in ("offset", "tp", "dp"))


@views
def test_experts_lie_where_a_view_says() -> None:
    """Whatever the configuration, which cuts them over tp where nothing else is said."""
    base = Grid((Axis("tp", 2), Axis("cp", 1), Axis("dp", 2), Axis("pp", 1)), offset=1)
    inside = (Axis("expert_tp", 1), Axis("ep", 4), Axis("expert_dp", 1))
    sizes = {"num_moe_experts": 4, "moe_ffn_hidden_size": 8, "add_bias_linear": False}
    config = specs.config(tensor_model_parallel_size=2, sequence_parallel=True, **sizes)
    made = specs.model_config(language_model_spec=specs.language(config=config))
    of_view = base.regrouped(inside, keep="pp")
    for grid, expected in ((to_hyper_comm_grid(base, of_view), (4, 1)), (to_hyper_comm_grid(base), (1, 2))):
        grids = {"vision": hyper(dp=1), "language": grid}
        said = job_of(made, grids, batch=BatchSpec(global_size=2)).modules["language"].grid
        assert expected == (said.ep, said.expert_tp)


def test_what_a_job_cannot_say_is_an_error() -> None:
    """All of it at once."""
    grids = {"vision": hyper(gtp=2), "language": hyper(2, tp=2, gtp=2)}
    language = specs.language(config=specs.config(attention_dropout=0.5))
    with pytest.raises(PlanError) as refused:
        job_of(specs.model_config(language_model_spec=language), grids, batch=BatchSpec(global_size=2))
    assert ["modules.vision.grid", "modules.language.grid", "modules.language.options.dropout"] == [
        problem.where for problem in refused.value.problems
    ]


def test_a_language_model_that_is_no_gpt_is_refused() -> None:
    """By the name of its class: Megatron's hybrid models have layers that a plan does not know."""

    class MambaModel(torch.nn.Module):
        """A model of Megatron's by its name only."""

    spec = specs.language()
    spec.module = MambaModel
    grids = {"vision": hyper(dp=1), "language": hyper(1, dp=1)}
    with pytest.raises(PlanError, match="language_model_spec: is a MambaModel; a job's program runs"):
        job_of(specs.model_config(language_model_spec=spec), grids, batch=BatchSpec(global_size=2))


@pytest.mark.parametrize(
    ("module", "setting"), [("language", {"quant_recipe": "by pattern"}), ("vision", {"fp8": "e4m3"})]
)
def test_networks_with_a_precision_of_their_own_are_refused(module: str, setting: Mapping[str, str]) -> None:
    """By the name of the setting, of the language model or of an encoder."""
    config = specs.config()
    vars(config).update(setting)  # Transformer-engine would have to be here for it to be built with one.
    eye = specs.vision(specs.Pixels, transformer_config=config if module == "vision" else specs.config())
    text = specs.language(config=config if module == "language" else specs.config())
    model = specs.model_config(language_model_spec=text, modality_submodules_spec={"vision": eye})
    grids = {"vision": hyper(dp=1), "language": hyper(1, dp=1)}
    with pytest.raises(PlanError, match=rf"modules\.{module}\.{next(iter(setting))}: is set.* one precision"):
        job_of(model, grids, batch=BatchSpec(global_size=2))


# -- groups ------------------------------------------------------------------------------------------------


@pytest.mark.world
def test_collections_have_megatrons_groups(pool: Pool, opened: Opened) -> None:
    """Every group of every module has the ranks that Megatron's grid enumerates; afterwards all are gone."""
    job = opened(layouts.job("enc(1,1,2)@0 lm(2,2,2)@0"))
    axes = {
        "tp": "tp",
        "pp": "pp",
        "dp": "dp",
        "mp": ["tp", "pp"],
        "dp_cp": ["cp", "dp"],
        "tp_cp": ["tp", "cp"],
    }
    for rank, (seen, left) in enumerate(pool.run("hosts:collections", 8, job)):
        assert 0 == left
        for name, groups in seen.items():
            grid = to_hyper_comm_grid(job.topology.modules[name].grid)
            for field, along in axes.items():
                (expected,) = (ranks for ranks in grid.get_rank_enum(along) if rank in ranks)
                assert expected == groups[field], (name, field)
            pipeline = grid.get_rank_enum("pp")
            (ends,) = ([ranks[0], ranks[-1]] for ranks in pipeline if rank in ranks)
            assert sorted(set(ends)) == groups["embd"]


# -- models ------------------------------------------------------------------------------------------------


def stage(module: str, pp: int = 0, stages: int = 1) -> ModuleStageInfo:
    """A rank's place in a module."""
    return ModuleStageInfo(module, pp, pp == 0, pp == stages - 1, {})


def role(**stages: ModuleStageInfo) -> RankRole:
    """A rank with these stages."""
    return RankRole(0, ModuleLayout.NON_COLOCATED, stages, ("language",))


def collection(pp: int = 0, stages: int = 1) -> Any:
    """Groups of one rank but for the pipeline."""
    alone, names = (
        specs.OneOf(0, 1),
        ("tp", "cp", "dp", "dp_cp", "ep", "expt_tp", "expt_dp", "tp_cp", "tp_ep"),
    )
    made = ProcessGroupCollection(**dict.fromkeys(names, alone), pp=specs.OneOf(pp, stages))
    made.embd = made.pos_embd = None
    return made


@pytest.fixture
def cpu() -> Iterator[None]:
    """Let megatron-core run in a world of one; without a world it accepts no group."""
    with alone():
        yield


def fill(model: torch.nn.Module) -> None:
    """Draw all weights."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)


@pytest.mark.usefixtures("cpu")
def test_a_whole_model_is_megatrons() -> None:
    """Its state dict loads by name, and the outputs are equal to the last bit."""
    with_groups = specs.language(pg_collection=collection())
    theirs = MimoModel(specs.model_config(language_model_spec=with_groups))
    ours = from_specs(
        specs.language(),
        {"vision": specs.vision(hidden=8)},
        {"vision": specs.IMAGE},
        role=role(vision=stage("vision"), language=stage("language")),
        collections={"language": collection()},
    )
    fill(theirs)
    ours.load_state_dict(theirs.state_dict())
    expected, _ = theirs(**specs.batch())
    said, _ = ours(**specs.batch())
    assert expected.isfinite().all()
    assert torch.equal(expected, said)


@pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning")
@pytest.mark.usefixtures("cpu")
def test_a_projector_of_megatrons_is_built_on_the_groups_of_its_module() -> None:
    """It asks for the tp group alone, where other networks ask for all groups."""
    layers = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    params = {"config": specs.config(), "submodules": layers, "projector_type": "mlp", "input_size": 8}
    eye = specs.vision(hidden=8, projected=False)
    eye.submodules["input_projections"] = [ModuleSpec(MultimodalProjector, params)]
    made = from_specs(
        specs.language(),
        {"vision": eye},
        {"vision": specs.IMAGE},
        role=role(vision=stage("vision"), language=stage("language")),
        collections={"vision": collection(), "language": collection()},
    )
    fill(made)
    said, _ = made(**specs.batch())
    assert (2, specs.SEQUENCE, specs.VOCAB) == said.shape
    projector: Any = made.modality_submodules["vision"].input_projections[0]  # type: ignore[union-attr, index]
    assert made.collections["vision"].tp is projector.encoder.linear_fc1.tp_group


@pytest.mark.usefixtures("cpu")
def test_stages_together_are_the_whole() -> None:
    """Three ranks build what is theirs alone and hand on dictionaries; the last says what the whole would."""
    arguments = {"vision": specs.vision(hidden=8)}, {"vision": specs.IMAGE}
    whole = from_specs(
        specs.language(),
        *arguments,
        role=role(vision=stage("vision"), language=stage("language")),
        collections={"language": collection()},
    )
    fill(whole)
    eye = from_specs(specs.language(), *arguments, role=role(vision=stage("vision")))
    for model in (whole, eye):
        assert specs.HIDDEN == get_model_config(model).hidden_size
    first, last = (
        from_specs(
            specs.language(pp=2),
            *arguments,
            role=role(language=stage("language", pp, 2)),
            collections={"language": collection(pp, 2)},
        )
        for pp in range(2)
    )
    assert eye.language_model is None
    assert not first.modality_submodules
    weights = whole.state_dict()
    names: list[set[str]] = []
    for part, layer in ((eye, 0), (first, 0), (last, 1)):
        mine = {key: key.replace("layers.0.", f"layers.{layer}.") for key in part.state_dict()}
        part.load_state_dict({key: weights[name] for key, name in mine.items()})
        names.append({name for name in mine.values() if not name.endswith("_extra_state")})
    assert {name for name in weights if not name.endswith("_extra_state")} == set.union(*names)
    assert sum(map(len, names)) == len(set.union(*names))

    batch = specs.batch()
    expected, _ = whole(**batch)
    rows, mask = eye(**batch, loss_mask=torch.ones(1))
    assert ["vision"] == [*rows]
    assert torch.equal(torch.ones(1), mask)
    without = batch | {"modality_inputs": None}
    first.set_input_tensor([rows])
    hidden, _ = first(**without)
    assert ["language"] == [*hidden]
    last.set_input_tensor([{"language": [hidden["language"]]}])
    assert torch.equal(expected, last(**without)[0])


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_a_block_of_those_layers_runs_under_sequence_parallelism(normalization: str) -> None:
    """The norm at its end, which Megatron adds, is the configuration's and marked as partial, as those inside are."""
    both: Any = specs.OneOf(0, 2)
    cut = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    groups = collection()
    groups.tp = both
    config = specs.config(**cut, normalization=normalization)
    block = TransformerBlock(config, layer_spec(specs.config(**cut)), pg_collection=groups)
    assert normalization == type(block.final_layernorm).__name__
    assert {True} == {weight.sequence_parallel for weight in block.final_layernorm.parameters()}


def test_a_layer_with_another_norm_than_is_asked_for_is_refused() -> None:
    """The specification has layer norms; a final norm of the configuration's would be another."""
    with pytest.raises(ValueError, match=r"normalization='RMSNorm': set it to 'LayerNorm'"):
        layer_spec(specs.config(normalization="RMSNorm"))


def test_special_tokens_are_those_of_a_model_in_megatrons_wrappers() -> None:
    """A forward step's batches are read by them; its `DistributedDataParallel` has none of its own."""
    model, wrapper = nn.Module(), nn.Module()
    model.special_token_ids = {"vision": specs.IMAGE}  # type: ignore[assignment]
    wrapper.module = model
    embedded = mock.Mock(spec=Embedded)
    assert {"vision": specs.IMAGE} == forward_backward_func(embedded, wrapper).special_token_ids


@pytest.mark.usefixtures("cpu")
def test_checkpoints_of_megatron_have_the_names_of_the_parts() -> None:
    """What the stages would write and read together is, name by name and place by place, what the whole would."""

    def shards(model: Any) -> set[tuple[Any, ...]]:
        held = model.sharded_state_dict(metadata={"non_homogeneous_layers": True}).values()
        return {(s.key, s.global_shape, s.global_offset) for s in held if hasattr(s, "global_shape")}

    spec, tokens = {"vision": specs.vision(hidden=8)}, {"vision": specs.IMAGE}
    layer = layer_spec(specs.config())
    alone = {"vision": collection(), "language": collection()}
    whole = from_specs(
        specs.language(transformer_layer_spec=layer),
        spec,
        tokens,
        role=role(vision=stage("vision"), language=stage("language")),
        collections=alone,
    )
    parts = [
        from_specs(
            specs.language(transformer_layer_spec=layer),
            spec,
            tokens,
            role=role(vision=stage("vision")),
            collections=alone,
        )
    ]
    for pp in range(2):
        place = role(language=stage("language", pp, 2))
        groups = {"language": collection(pp, 2)}
        parts.append(
            from_specs(
                specs.language(pp=2, transformer_layer_spec=layer),
                spec,
                tokens,
                role=place,
                collections=groups,
            )
        )
    found = [shards(part) for part in parts]
    assert shards(whole) == set.union(*found)
    assert sum(map(len, found)) == len(set.union(*found))
    keys = {key for key, *_ in shards(whole)}
    assert "language_model.decoder.layers.1.mlp.linear_fc1.weight" in keys
    assert "modality_submodules.vision.input_projections.0.weight" in keys


def test_every_stage_of_an_encoder_runs() -> None:
    """Two stages that double make 4 of 1. Megatron's later stages only project: there it is 2."""
    spec = {"vision": specs.vision(specs.Doubling, projected=False)}
    ids, ones = torch.full((1, 2), specs.IMAGE), torch.ones(2, 3)
    parts = [
        from_specs(specs.language(), spec, {"vision": specs.IMAGE}, role=role(vision=stage("vision", pp, 2)))
        for pp in range(2)
    ]
    hidden, _ = parts[0](input_ids=ids, modality_inputs={"vision": {"eye": {"pixels": ones}}})
    parts[1].set_input_tensor(hidden)
    rows, _ = parts[1](input_ids=None)
    assert torch.equal(4 * ones, rows["vision"])
    if "hidden_states" in inspect.signature(spec["vision"].module.forward).parameters:
        theirs = spec["vision"].module.from_spec(spec["vision"], is_first_stage=False, is_last_stage=True)
        assert torch.equal(2 * ones, theirs(hidden_states=hidden["vision"]))


def test_an_encoder_that_takes_no_virtual_stage_is_refused() -> None:
    """It would have the same layers in each of them."""
    config = specs.config(pp=2, layers=4, virtual_pipeline_model_parallel_size=2)
    spec = {"vision": specs.vision(specs.Doubling, projected=False, config=config)}
    with pytest.raises(ValueError, match="is cut into virtual stages, and Doubling takes no vp_stage"):
        from_specs(specs.language(), spec, {}, role=role(vision=stage("vision", 0, 2)), vp_stage=0)


class Router:
    """As much of Megatron's router as its auxiliary loss asks for."""

    training, topk, score_function, tp_cp_group = True, 1, "softmax", specs.OneOf(0, 1)

    def routing(self, logits_SBE: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return weights, and choices."""
        logits_TE = logits_SBE.flatten(0, 1)
        return logits_TE.softmax(dim=1), logits_TE == logits_TE.amax(dim=1, keepdim=True)


def test_a_router_that_serves_a_second_job_has_its_auxiliary_loss_once() -> None:
    """The job before has left its own, which says nothing any more."""
    router: Any = Router()
    first, second = Balance(router), Balance(router)
    first.scale = second.scale = 1.0
    router.routing(torch.tensor([[[1.0, 2.0]]]))
    assert first.value is None
    assert second.value is not None


def test_rows_leave_an_encoder_sample_by_sample() -> None:
    """Of two samples of two positions the second row is the first sample's second; Megatron's is the other sample's."""
    spec = {"vision": specs.vision(specs.Doubling, projected=False)}
    hidden_SBH = torch.tensor([[0.0, 10.0], [1.0, 11.0]])[:, :, None]
    last = from_specs(specs.language(), spec, {}, role=role(vision=stage("vision", 1, 2)))
    last.set_input_tensor({"vision": hidden_SBH})
    rows, _ = last(input_ids=None)
    assert [0, 2, 20, 22] == rows["vision"].flatten().tolist()
    theirs = spec["vision"].module.from_spec(spec["vision"])
    (flat,) = theirs.encode({"eye": {"pixels": hidden_SBH}})
    assert [0, 20, 2, 22] == flat.flatten().tolist()


def test_only_what_a_stage_needs_is_built() -> None:
    """A projection on the last stage, encoders on all, and one encoder only where there are several stages."""
    spec = specs.vision(specs.Doubling)
    both = [
        from_specs(specs.language(), {"vision": spec}, {}, role=role(vision=stage("vision", pp, 2)))
        for pp in range(2)
    ]
    built = [model.modality_submodules["vision"] for model in both]
    assert [0, 1] == [len(modality.input_projections) for modality in built]
    assert [True, False] == [modality.encoders["eye"].pre_process for modality in built]
    spec.submodules["encoders"]["ear"] = spec.submodules["encoders"]["eye"]
    with pytest.raises(ValueError, match="one encoder runs through them"):
        from_specs(specs.language(), {"vision": spec}, {}, role=role(vision=stage("vision", 0, 2)))


@pytest.mark.usefixtures("cpu")
def test_models_that_do_not_fit_are_refused() -> None:
    """A role of other modules, a rank in no grid, rows that do not match placeholders, none at all."""
    both = specs.language(), {"vision": specs.vision(hidden=8)}, {"vision": specs.IMAGE}
    with pytest.raises(ValueError, match=r"Missing: \['audio'\]"):
        from_specs(*both, role=role(audio=stage("audio")))
    with pytest.raises(RuntimeError, match="in no module's grid"):
        from_specs(*both, role=role())
    eye = from_specs(*both, role=role(vision=stage("vision")))
    batch = specs.batch()
    with pytest.raises(RuntimeError, match="placeholders for 'vision', and no input"):
        eye(**batch | {"modality_inputs": None})
    language = from_specs(
        *both, role=role(language=stage("language")), collections={"language": collection()}
    )
    without = batch | {"modality_inputs": None}
    language.set_input_tensor({"vision": torch.zeros(4, specs.HIDDEN)})
    with pytest.raises(ValueError, match="'vision' has 5 placeholders and 4 rows"):
        language(**without)
    language.set_input_tensor({})
    with pytest.raises(ValueError, match="placeholders without rows"):
        language(**without)


# -- the training loop -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        schedules.forward_backward_no_pipelining,
        schedules.forward_backward_pipelining_without_interleaving,
        schedules.forward_backward_pipelining_with_interleaving,
    ],
)
def test_a_step_is_called_as_a_schedule(function: Callable[..., Any]) -> None:
    """With the same arguments, all by name, and the same defaults."""

    def shape(called: Callable[..., Any]) -> list[tuple[Any, ...]]:
        parameters = inspect.signature(called).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters if p.name != "self"]

    assert shape(function) == shape(ForwardBackward.__call__)


@pytest.mark.world
def test_a_loop_for_megatron_trains_a_job(pool: Pool, opened: Opened) -> None:
    """Losses and weights are those of the job by itself; what it cannot do is said."""
    spec = layouts.job("enc(1,1,2)@0 lm(1,2,1)@2")
    job = opened(spec)
    (expected,) = (one for one in pool.run("hosts:by_itself", 4, job, 2) if one and one.weights)
    said: list[tuple[Trained, list[float]]] = pool.run("hosts:as_megatron", 4, job, 2)
    for seen, losses in said:
        assert expected.losses == pytest.approx(losses, rel=1e-6)  # Megatron's losses are fp32
        if seen.weights:
            assert all(np.array_equal(w, seen.weights[name]) for name, w in expected.weights.items())


@pytest.mark.world
def test_a_loop_that_asks_for_more_is_refused(pool: Pool, opened: Opened) -> None:
    """With everything that does not fit: other counts, another model, logits of a training step."""
    job = opened(layouts.job("enc(1,1,2)@0 lm(1,2,1)@2"))
    changes = {
        "num_microbatches": 7,
        "collect_non_loss_data": True,
        "model": [torch.nn.Identity()],
    }
    with pytest.raises(PlanError) as refused:
        pool.run("hosts:as_megatron", 4, job, 1, changes)
    wrong = ["batch.microbatches", "model", "schedule"]
    assert wrong == [p.where for p in refused.value.problems]


@pytest.mark.world
def test_evaluating_trains_nothing(pool: Pool, opened: Opened) -> None:
    """Dropout is off, weights stay, and the next samples of the job stay the next."""
    job = opened(layouts.job("enc(1,1,2)@0 lm(1,2,1)@2", changes={"lm": {"options": {"dropout": 0.5}}}))
    for losses, again, trained, expected in pool.run("hosts:evaluated", 4, job):
        assert losses == again
        assert losses["lm"] > 0
        assert trained == expected


# -- where Megatron's own arithmetic is wrong --------------------------------------------------------------


def full(pool: Pool, job: Job) -> Mapping[str, np.ndarray]:
    """Full gradients of the first step."""
    ((_, gradients),) = (one for one in pool.run("bodies:gradients", job.topology.world_size, job) if one)
    return gradients


@pytest.mark.world
@pytest.mark.parametrize(("encoder", "language"), [(2, 1), (1, 2)])
def test_unequal_dp_scales_no_gradient(pool: Pool, opened: Opened, encoder: int, language: int) -> None:
    """Means over each module's own dp ranks make an encoder's gradients language_dp/encoder_dp of what they are."""
    split = layouts.job(f"enc(1,1,{encoder})@0 lm(1,1,{language})@{encoder}", samples=4)
    alone = layouts.job("enc(1,1,1)@0 lm(1,1,1)@0", samples=4)
    ours, expected = full(pool, opened(split)), full(pool, opened(alone))
    name = "enc.layers.0.mlp.up.weight"
    ratio = float((ours[name] / expected[name]).mean())
    assert 1 == pytest.approx(ratio, abs=1e-6)
    assert language / encoder != pytest.approx(ratio, abs=0.4)


@pytest.mark.world
def test_an_encoder_of_megatrons_trains_alike_on_any_dp_ranks(pool: Pool, opened: Opened) -> None:
    """Its gradients are those of one process, so two dp ranks of it before one of the language model change nothing."""

    def trained(grids: str) -> Trained:
        spec = layouts.job(grids, samples=4)
        encoder = attrs.evolve(
            spec.modules["enc"], model="mimogrid.shell.job.host:module", options={}, width=specs.HIDDEN
        )
        data = attrs.evolve(spec.data, options={**spec.data.options, "features": {"enc": specs.PIXELS}})
        job = opened(attrs.evolve(spec, modules={**spec.modules, "enc": encoder}, data=data))
        (found,) = (t for t in pool.run("hosts:own_modality", 3, job, 2) if t.weights)
        return found

    one, two = trained("enc(1,1,1)@0 lm(1,1,1)@1"), trained("enc(1,1,2)@0 lm(1,1,1)@2")
    assert one.losses == pytest.approx(two.losses, rel=1e-12)
    for name in ("encoders.eye.linear.weight", "input_projections.0.bias"):
        np.testing.assert_allclose(
            one.weights[f"enc.{name}"], two.weights[f"enc.{name}"], rtol=1e-6, atol=1e-9
        )


@pytest.mark.world
def test_a_module_with_two_consumers_gets_both_gradients(pool: Pool, opened: Opened) -> None:
    """Megatron's bridges write both under one key and the last stays: with equal consumers, half of the sum."""

    def weighted(one: float, other: float) -> Mapping[str, np.ndarray]:
        changes = {"lm": {"loss_weight": one}, "gen": {"loss_weight": other}}
        return full(
            pool, opened(layouts.job("enc(1,1,1)@0->lm,gen lm(1,1,1)@1 gen(1,1,1)@2", changes=changes))
        )

    both, first, last = weighted(1, 1), weighted(1, 0), weighted(0, 1)
    name = "enc.layers.0.mlp.up.weight"
    np.testing.assert_allclose(first[name] + last[name], both[name], rtol=1e-9, atol=1e-12)
    assert abs(first[name]).max() > 0
    assert abs(both[name] - last[name]).max() > 0


# -- shards of encoders ------------------------------------------------------------------------------------


def encoder_shards(tp_rank: int = 0, *, tp: int = 1, pp: int = 0, stages: int = 1) -> dict[str, Any]:
    """What a rank of an encoder with a transformer hands to Megatron's distributed checkpoints."""
    eye = {"layers": 2, "tp": tp, "pp": stages}
    config = megatrons.config_of(layers=2, language={}, eye=eye, here={"vision": 2 // stages})
    groups = collection(pp, stages)
    groups.tp = groups.tp_cp = specs.OneOf(tp_rank, tp)
    parts = from_specs(
        config.language_model_spec,
        config.modality_submodules_spec,
        config.special_token_ids,
        role=role(vision=stage("vision", pp, stages)),
        collections={"vision": groups},
    )
    found = parts.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    return {part.key: part for part in found.values() if hasattr(part, "local_shape")}


@pytest.mark.usefixtures("cpu")
def test_an_encoder_cut_over_tp_is_saved_as_shards() -> None:
    """Each tp rank writes its own part of a cut weight, and one of them writes what both hold."""
    first, second = encoder_shards(0, tp=2), encoder_shards(1, tp=2)
    assert first.keys() == second.keys()
    cut = [key for key in first if first[key].global_shape != tuple(first[key].local_shape)]
    assert {"linear_fc1.weight", "linear_fc2.weight", "linear_qkv.weight"} <= {
        ".".join(key.split(".")[-2:]) for key in cut
    }
    for key, part in first.items():
        other = second[key]
        assert part.global_shape == other.global_shape
        if key in cut:
            assert part.global_offset != other.global_offset, key
        else:
            assert [part.replica_id, other.replica_id].count((0, 0, 0)) == 1, key


@pytest.mark.usefixtures("cpu")
def test_stages_of_an_encoder_save_their_own_layers() -> None:
    """Both stages together write what one rank with all layers would, and nothing twice."""
    stages = [encoder_shards(tp=2, pp=pp, stages=2) for pp in range(2)]
    assert not stages[0].keys() & stages[1].keys()
    assert encoder_shards(tp=2).keys() == stages[0].keys() | stages[1].keys()
