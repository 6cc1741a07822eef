"""Seeds: where the random draws of a network (its dropout) start.

A built-in module draws by a key of the step and by what it draws for, so that all layouts draw alike. What follows is
for networks of users and host programs, which keep random states.

Each forward of a stage starts from seeds of its own. They depend on where and when it runs, and not on what ran
before. So two runs of one layout are bitwise equal, and a resumed run draws what an uninterrupted one draws.

Along tp there are two kinds of draws, as in Megatron. All tp ranks mask values that each of them holds *alike*.
They mask values of which each holds a part (heads, or positions under sequence parallelism) *apart*.

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
"""Number of non-negative seeds that torch's generators accept."""


def draw_key(seed: int, module: str, *, step: int) -> int:
    """Return the key of all draws of a built-in module in a step (`shell/megatron/draws.py`): alike on all ranks."""
    return draw_bits(seed, module, f"dropout step={step}") % SEEDS


@attrs.frozen
class Seeds:
    """The seeds of one stage for one microbatch on one rank: alike along tp, and apart."""

    alike: int
    apart: int


def seeds_of(seed: int, stage: Stage, position: Mapping[str, int], *, step: int, microbatch: int) -> Seeds:
    """Return the seeds of a stage for a position on its module's grid."""
    when = f"{stage} dp={position['dp']} cp={position['cp']} step={step} microbatch={microbatch}"
    return Seeds(
        alike=draw_bits(seed, when, "dropout") % SEEDS,
        apart=draw_bits(seed, when, f"dropout tp={position['tp']}") % SEEDS,
    )
