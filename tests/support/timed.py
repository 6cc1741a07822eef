"""Timed jobs: jobs on small grids with any rows, costs and duration factors, drawn at random; timed rank by rank."""

import attrs
from hypothesis import note
from hypothesis import strategies as st

from jobs import job, step_with
from mimogrid.core.job.costs import Costs, EdgeCosts, StageCosts
from mimogrid.core.program.lower import Program
from mimogrid.core.simulate.rank_classes import each_alone
from mimogrid.core.simulate.simulation import simulate
from mimogrid.core.simulate.timeline import Timeline
from mimogrid.core.simulate.unevenness import DurationFactors


SCHEDULES = ["1f1b", "gpipe", "zb-h1", "zb-h2"]
BACKWARDS = [("backward",), ("input_gradient", "weight_gradient")]
seconds = st.integers(0, 6).map(lambda n: n / 4 + n / 7)
LINES = [
    "a vit {0} > z; z gpt {1}",
    "a vit {0} frozen > z; b vit {1} > z; z gpt {2}",
    "a vit {0} > m; m block {1} > z; z gpt {2}",
    "a vit {0} > z, y; y regressor {1}; z gpt {2}",
    "a vit {0} @0 > z; z gpt {1} @0",
    "a vit {0} @0 > z; b vit {1} @0 > z; z gpt {2} @1",
]
GRIDS = [
    "dp4",
    "dp3",
    "dp2 tp2",
    "tp3",
    "tp2 sp",
    "cp2",
    "cp2 dp2",
    "dp2 pp2",
    "dp4 pp2",
    "tp2 dp4 ep4 x4",
    "dp4 m8",
]
GRIDS += ["dp2 m2", "pp2 chunks2 dp2", "dp2 tp2 pp2 order=tp,cp,pp,dp"]


@st.composite
def timed_jobs(draw):
    """A job on any grids, with any rows and costs."""
    line = draw(st.sampled_from(LINES)).format(*(draw(st.sampled_from(GRIDS)) for _ in range(3)))
    schedule = "interleaved" if "chunks" in line else draw(st.sampled_from(SCHEDULES))
    topology = job(line, batch=64, microbatches=4, schedule=schedule)
    rows = st.lists(st.integers(0, 3), min_size=1, max_size=4)
    given_rows = {n: draw(st.one_of(st.just([6]), rows)) for n in topology.graph.sources}
    edge = EdgeCosts(
        latency=draw(seconds),
        bytes_per_s=draw(st.sampled_from([100.0, float("inf")])),
        overlap=draw(st.booleans()),
    )
    names = map(str, topology.stages)
    stages = {
        n: StageCosts(
            **{key: draw(seconds) for key in ("forward", "reduce", *draw(st.sampled_from(BACKWARDS)))}
        )
        for n in names
    }
    edges = {
        str(e): attrs.evolve(edge, overlap=not edge.overlap) for e in topology.edges if draw(st.booleans())
    }
    note(f"{line} {given_rows} {schedule}")
    step = step_with(topology, given_rows)
    ragged, jitter = draw(st.sampled_from([(False, 0.0), (True, 0.0), (False, 0.25), (True, 0.25)]))
    return Costs(stages=stages, edge=edge, edges=edges), DurationFactors(step, ragged=ragged, jitter=jitter)


def rank_by_rank(
    program: Program, costs: Costs, *, duration_factors: DurationFactors | None = None
) -> Timeline:
    """Simulate a step in which no rank stands for another."""
    alone = each_alone(program.topology.ranks)
    return simulate(program, costs, duration_factors=duration_factors, classes=alone)
