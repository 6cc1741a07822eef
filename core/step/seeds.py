"""Seeds: what the random draws of a network (its dropout) follow from.

A stage's forward begins at seeds that say where and when it runs, and at nothing that ran before it. So two runs
of one layout are bitwise equal, and a resumed run draws what it would have drawn. Along tp there are two kinds of
draws, as in megatron: values that every tp rank holds are masked alike, values that each holds a part of (heads,
or positions under sequence parallelism) are masked apart.

>>> here = {"tp": 0, "cp": 0, "dp": 1, "pp": 0}
>>> one = seeds_of(0, Stage("language", 0), here, step=3, microbatch=2)
>>> other = seeds_of(0, Stage("language", 0), here | {"tp": 1}, step=3, microbatch=2)
>>> one.alike == other.alike, one.apart == other.apart
(True, False)
"""

from collections.abc import Mapping

import attrs

from mimogrid.core.base.hashing import draw_bits
from mimogrid.core.topology.topology import Stage


SEEDS = 2**63
"""How many seeds torch's generators take without a sign."""


@attrs.frozen
class Seeds:
    """Where one stage's draws for one microbatch begin on one rank: alike along tp, and apart."""

    alike: int
    apart: int


def seeds_of(seed: int, stage: Stage, position: Mapping[str, int], *, step: int, microbatch: int) -> Seeds:
    """Return the seeds of a stage at a position on its module's grid."""
    when = f"{stage} dp={position['dp']} cp={position['cp']} step={step} microbatch={microbatch}"
    return Seeds(
        alike=draw_bits(seed, when, "dropout") % SEEDS,
        apart=draw_bits(seed, when, f"dropout tp={position['tp']}") % SEEDS,
    )
