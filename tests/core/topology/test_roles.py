"""Roles: for every known layout and every rank, what it is, asked anywhere."""

import pytest

from cases import CASES
from jobs import job
from mimogrid.core.topology.roles import ModuleLayout, role_of
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
        assert role.is_idle == (not role.modules)
        texts = [n for n in role.modules if topology.spec.modules[n].model == "gpt"]
        assert bool(texts) == role.has_language_module
        assert tuple(n for n in role.modules if n not in texts) == role.modality_module_names
        assert bool(role.modality_module_names) == role.has_modality_modules


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
