"""Seeds are equal where draws must agree, and nowhere else."""

import attrs
from hypothesis import given
from hypothesis import strategies as st

from mimogrid.core.step.seeds import SEEDS, Seeds, seeds_of
from mimogrid.core.topology.topology import Stage


@attrs.frozen
class Draw:
    """One forward of one rank."""

    seed: int
    stage: Stage
    dp: int
    cp: int
    step: int
    microbatch: int
    tp: int

    @property
    def seeds(self) -> Seeds:
        """What the plan says."""
        position = {"tp": self.tp, "cp": self.cp, "dp": self.dp, "pp": self.stage.pp}
        return seeds_of(self.seed, self.stage, position, step=self.step, microbatch=self.microbatch)


SMALL = st.integers(0, 12)
STAGES = st.builds(Stage, st.sampled_from(("a", "a1", "a-1", "dp")), SMALL, SMALL)
DRAWS = st.builds(Draw, SMALL, STAGES, SMALL, SMALL, SMALL, SMALL, SMALL)


@given(draw=DRAWS, tp=SMALL)
def test_along_tp_one_kind_agrees(draw: Draw, tp: int) -> None:
    """What every tp rank holds is masked alike; what each has a part of is masked apart."""
    other = attrs.evolve(draw, tp=tp)
    assert draw.seeds.alike == other.seeds.alike
    assert (draw.tp == tp) == (draw.seeds.apart == other.seeds.apart)


@given(draws=st.lists(DRAWS, unique=True, max_size=40))
def test_everything_else_differs(draws: list[Draw]) -> None:
    """Any two places, steps, microbatches or job seeds differ in both kinds, and the kinds from each other."""
    places = {attrs.evolve(draw, tp=0) for draw in draws}
    seeds = [draw.seeds.apart for draw in draws] + [place.seeds.alike for place in places]
    assert len(seeds) == len(set(seeds))


@given(draw=DRAWS)
def test_a_generator_takes_them(draw: Draw) -> None:
    """They are what torch's generators accept."""
    assert 0 <= draw.seeds.alike < SEEDS
    assert 0 <= draw.seeds.apart < SEEDS
