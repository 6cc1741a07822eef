"""Record: what one rank of a job has measured, as it sends it to the first."""

from collections.abc import Mapping, Sequence

import attrs

from mimogrid.core.schedule.actions import Norm, Update
from mimogrid.core.topology.topology import Stage
from mimogrid.shell.run.probe.clock import usual
from mimogrid.shell.run.probe.steps import Steps


@attrs.frozen(kw_only=True)
class RankProbe:
    """What a rank measured.

    Attributes:
        rank: the rank.
        host: the name of its machine.
        own: steps in turns under the job's own schedule.
        others: steps under a schedule that splits backwards if the job's does not, and the other way round.
        sums: seconds of all sums of gradients, by stage.
        gathers: seconds of all gathers of weights, by stage.
        core_s: CPU seconds of all threads in a step without turns; None where the rank does not compute on cores.
        peak: bytes by which memory has grown.
    """

    rank: int
    host: str
    own: Steps
    others: Sequence[Steps]
    sums: Mapping[Stage, float]
    gathers: Mapping[Stage, float]
    core_s: float | None
    peak: int

    def agreeing(self) -> float:
        """Return the CPU seconds of the grad-norm sync of a step."""
        return self.own.busy_s(Norm())

    def updating(self) -> float:
        """Return the CPU seconds of an optimizer step."""
        return self.own.busy_s(Update())

    def planning(self) -> float:
        """Return the CPU seconds of planning a step."""
        return usual(self.own.planning)
