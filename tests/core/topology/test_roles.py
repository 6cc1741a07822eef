"""Roles: for every known layout and every rank, what it is, asked anywhere."""

import attrs
import pytest

from cases import CASES
from jobs import job
from mimogrid.core.job.spec import JobSpec, ModuleSpec, SourceFacts
from mimogrid.core.topology.parse import parse
from mimogrid.core.topology.roles import ModuleLayout, role_of, role_on
from mimogrid.core.topology.topology import Topology


def table(text: str, *, world: int | None = None) -> list[str]:
    """Write one line per rank: its stages (F first, L last) with its position on every axis longer than 1."""
    topology = job(text, batch=24, world=world)
    return [line(topology, rank) for rank in range(topology.world_size)]


def line(topology: Topology, rank: int) -> str:
    """Write the role of one rank."""
    role = role_of(topology, rank)
    words: list[str] = []
    for info in role.modules.values():
        ends = "F" * info.is_first_stage + "L" * info.is_last_stage
        words.append(f"{info.module}.{info.pp}{ends}")
        words += [f"{axis}{i}" for axis, i in info.position.items() if axis != "pp" and i]
    return " ".join(words) or "idle"


def test_non_colocated() -> None:
    """Two dp ranks of an encoder in front of a language model of two stages, each on tp ranks of its own."""
    assert [
        "vision.0FL",
        "vision.0FL tp1",
        "vision.0FL dp1",
        "vision.0FL tp1 dp1",
        "language.0F",
        "language.0F tp1",
        "language.1L",
        "language.1L tp1",
    ] == table("vision vit tp2 dp2 > language; language gpt tp2 pp2")


def test_two_encoders_on_the_same_ranks() -> None:
    """Both encoders are on both ranks, stage by stage; the language model is alone on its rank."""
    assert ["image.0F audio.0F", "image.1L audio.1L", "language.0FL"] == table(
        "image vit pp2 @0 > language; audio vit pp2 @0 > language; language gpt @2"
    )


def test_partial_overlap() -> None:
    """Rank 1 has an encoder dp rank and the first stage of the language model; nothing is skipped."""
    assert ["vision.0FL", "vision.0FL dp1 language.0F", "language.1L"] == table(CASES["partial overlap"])


def test_idle_ranks() -> None:
    """Ranks in no grid idle, in front, in between and behind."""
    text = "vision vit @1 > language; language gpt @3"
    assert ["idle", "vision.0FL", "idle", "language.0FL", "idle"] == table(text, world=5)


def test_language_model_alone() -> None:
    """A lone language model of two stages has a first and a last stage on different ranks."""
    assert ["language.0F", "language.1L"] == table(CASES["language pp2 alone"])


def test_colocated() -> None:
    """Eight ranks are tp2 dp4 to the encoder and tp4 dp2 to the language model."""
    rows = table(CASES["colocated tp2dp4 tp4dp2"])
    assert "vision.0FL dp1 language.0FL tp2" == rows[2]
    assert "vision.0FL tp1 dp3 language.0FL tp3 dp1" == rows[7]


def test_both_orders_of_axes() -> None:
    """With pp before dp the second stage of dp rank 0 follows its first; with pp last it comes behind all dp ranks."""
    before, last = table(CASES["pp before dp"]), table(CASES["pp last"])
    assert ["vision.0F", "vision.0F tp1", "vision.1L", "vision.1L tp1"] == before[:4]
    assert ["vision.0F dp1", "vision.0F tp1 dp1", "vision.1L dp1", "vision.1L tp1 dp1"] == before[4:8]
    assert ["vision.0F", "vision.0F tp1", "vision.0F dp1", "vision.0F tp1 dp1"] == last[:4]
    assert ["language.1L", "language.1L tp1", "language.1L dp1", "language.1L tp1 dp1"] == last[12:]


def test_experts_have_positions_of_their_own() -> None:
    """A rank's place among the experts is counted over tp and dp together."""
    assert "language.0FL tp1 dp1 ep3" == table(CASES["tp2dp2ep4"])[7]


@pytest.mark.parametrize("text", CASES.values(), ids=CASES)
def test_every_case(text: str) -> None:
    """In every known layout every rank's position is that of its number in mixed radix, counted from the offset."""
    topology = job(text, batch=24)
    for rank in range(topology.world_size):
        role = role_of(topology, rank)
        for name, module in topology.spec.modules.items():
            grid = module.grid
            offset = topology.modules[name].grid.offset
            here, expected = rank - offset, {}
            for axis in grid.order:
                here, expected[axis] = divmod(here, getattr(grid, axis))
            hosted = rank >= offset and not here
            assert hosted == (name in role.modules)
            assert (hosted and expected["pp"] == 0) == role.is_first_stage(name)
            assert (hosted and expected["pp"] == grid.pp - 1) == role.is_last_stage(name)
            if hosted:
                assert expected == {axis: role.modules[name].position[axis] for axis in grid.order}


@pytest.mark.parametrize("text", CASES.values(), ids=CASES)
def test_every_stage_is_hosted_by_the_ranks_of_its_position(text: str) -> None:
    """A rank has the stages that it holds a dp rank of, chunks included, and their links."""
    topology = job(text, batch=24)
    for rank in range(topology.world_size):
        role = role_of(topology, rank)
        hosted = [
            info
            for info in topology.stages.values()
            for module in (topology.modules[info.stage.module],)
            if any(rank in module.tp_cp_ranks(info.stage, dp_rank) for dp_rank in range(module.dp_size))
        ]
        assert hosted == list(role.stages)
        mine = {info.stage for info in hosted}
        assert {link for link in topology.links if link.target in mine} == set(role.links_in)
        assert {link for link in topology.links if link.source in mine} == set(role.links_out)


def test_chunks() -> None:
    """A rank with several chunks lists all of them. It is first or last if any of them is."""
    topology = job("vision vit > language; language gpt pp2 chunks2")
    first, last = (role_of(topology, rank) for rank in (1, 2))
    assert ["language.0", "language.0.1"] == [str(info.stage) for info in first.stages]
    assert (True, False) == (first.is_first_stage("language"), first.is_last_stage("language"))
    assert (False, True) == (last.is_first_stage("language"), last.is_last_stage("language"))
    assert ["vision.0 -> language.0", "language.1 -> language.0.1"] == [str(link) for link in first.links_in]
    assert ["language.0 -> language.1", "language.0.1 -> language.1.1"] == [*map(str, first.links_out)]
    assert [False, True] == [last.of_chunk(chunk).is_last_stage("language") for chunk in range(2)]
    assert ["language.0.1 -> language.1.1"] == [*map(str, last.of_chunk(1).links_in)]


def test_groups_of_a_rank() -> None:
    """A rank has one group along any axes of a module, or of its experts, but not along axes of both."""
    role = role_of(job(CASES["tp2dp2ep4"], batch=24), 7)
    assert (6, 7) == role.group("language", "tp")
    assert (5, 7) == role.group("language", ("cp", "dp"))
    assert (4, 5, 6, 7) == role.group("language", ("expert_tp", "ep"))
    with pytest.raises(ValueError, match=r"axes \['ep'\] are not among"):
        role.group("language", ("tp", "ep"))


def test_a_role_needs_grids_only() -> None:
    """Grids, chunks and names of language models determine a role, without the layers and links of its stages."""
    topology = job("vision vit dp2 > language; language gpt tp2 pp2 chunks2 @1")
    grids = {name: module.grid for name, module in topology.modules.items()}
    for rank in range(topology.world_size):
        role = role_on(grids, rank, chunks={"language": 2}, language_modules=["language"])
        assert role == attrs.evolve(topology.role(rank), stages=(), links_in=(), links_out=())


def own(spec: JobSpec, facts: SourceFacts) -> Topology:
    """Return a job with a custom module in place of its language model."""
    modules = {**spec.modules, "language": ModuleSpec(model="mine:build", options={}, width=8)}
    return parse(attrs.evolve(spec, modules=modules), facts)


def test_a_custom_language_model() -> None:
    """A custom module with a loss is a language model, unless the source says that there is no text."""
    topology = job("vision vit dp2 > language; language gpt")
    for length, is_language in ((None, True), (5, True), (0, False)):
        role = role_of(own(topology.spec, attrs.evolve(topology.source, length=length)), 2)
        assert is_language == role.has_language_module
        assert is_language != role.has_modality_modules
    assert not role_of(own(topology.spec, topology.source), 0).has_language_module
    assert not role_of(job("vision vit > head; head regressor"), 1).has_language_module


LAYOUTS = {
    "1 1": ModuleLayout.NON_COLOCATED,
    "two encoders on a rank": ModuleLayout.COLOCATED,
    "two encoders on the same ranks": ModuleLayout.COLOCATED,
    "partial overlap": ModuleLayout.COLOCATED,
    "colocated tp2dp4 tp4dp2": ModuleLayout.COLOCATED,
    "colocated tp4dp2 tp4dp2": ModuleLayout.UNIFIED,
    "language pp2 alone": ModuleLayout.UNIFIED,
    "idle ranks": ModuleLayout.NON_COLOCATED,
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layout(case: str) -> None:
    """A layout is unified where all grids are one, colocated where any two share a rank."""
    assert LAYOUTS[case] == role_of(job(CASES[case], batch=24), 0).layout


def test_a_rank_outside_the_world_has_no_role() -> None:
    """To ask for a rank outside the world is an error."""
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=r"is not in the world 0\.\.1"):
            role_of(job(CASES["1 1"]), rank)
