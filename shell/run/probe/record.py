"""Record: what one rank of a job has measured, as it is handed over to the first."""

from collections.abc import Mapping, Sequence

import attrs

from mimogrid.core.schedule.actions import Norm, Update
from mimogrid.core.topology.topology import Stage
from mimogrid.shell.run.probe.clock import usual
from mimogrid.shell.run.probe.steps import Steps


@attrs.frozen(kw_only=True)
class OfRank:
    """What a rank found.

    Attributes:
        rank: who found it.
        host: the name of its machine.
        own: steps in turns under the job's own schedule.
        others: those under a schedule with backwards the other way, if there is one.
        sums: per stage, seconds of all sums of its gradients.
        core_s: seconds of all threads in a step without turns; None where it is not cores that compute.
        peak: bytes by which memory has grown.
    """

    rank: int
    host: str
    own: Steps
    others: Sequence[Steps]
    sums: Mapping[Stage, float]
    core_s: float | None
    peak: int

    def agreeing(self) -> float:
        """Return the seconds of computing in which the rank agrees on a step with all others."""
        return self.own.worked(Norm())

    def updating(self) -> float:
        """Return the seconds of computing in which its optimizer takes a step."""
        return self.own.worked(Update())

    def planning(self) -> float:
        """Return the seconds of computing in which it plans a step."""
        return usual(self.own.planning)
