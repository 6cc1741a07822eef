"""Interruptions: what a run lost that ended and went on, and where the time went.

The clock is that of the hosts. From the last step that was done until that step is done again, the time is

    noticing    from the begin of the action in which the faulty rank ended, until another rank knew
    restart     from then until the first step of the next world is done
    repeated    the steps between the checkpoint and the last step that was done

Where nobody could tell that a rank failed, as when all hosts are lost, noticing and restart are one.

>>> print(Interruption(done=8, resumed_at=6, last_s=10.0, first_s=19.5, again_s=20.0, failed_s=10.2, noticed_s=10.5))
went on after a failure: noticed after 0.3 s, first step 9.0 s later, 2 steps repeated: 10.0 s lost
"""

import attrs


@attrs.frozen(kw_only=True)
class Interruption:
    """A run that went on.

    Attributes:
        done: how many steps were done before.
        resumed_at: the first step afterwards.
        last_s: when the last step was done.
        first_s: when the first step afterwards was done.
        again_s: when as many steps were done as before, or `first_s` if that is later.
        failed_s: when the faulty rank began what it did not end; None: no rank failed, or nobody knows.
        noticed_s: when another rank knew; None as before.
    """

    done: int
    resumed_at: int
    last_s: float
    first_s: float
    again_s: float
    failed_s: float | None = None
    noticed_s: float | None = None

    @property
    def noticing_s(self) -> float | None:
        """Seconds until the failure was noticed."""
        if self.failed_s is None or self.noticed_s is None:
            return None
        return max(0.0, self.noticed_s - self.failed_s)

    @property
    def restart_s(self) -> float:
        """Seconds from then, or from the last step, until the first step was done."""
        return max(0.0, self.first_s - (self.last_s if self.noticed_s is None else self.noticed_s))

    @property
    def repeated(self) -> int:
        """How many steps were done twice."""
        return max(0, self.done - self.resumed_at)

    @property
    def lost_s(self) -> float:
        """Seconds from the last step until the run was as far again."""
        return max(0.0, self.again_s - self.last_s)

    def __str__(self) -> str:
        why = "went on" if self.noticing_s is None else "went on after a failure"
        noticed = "" if self.noticing_s is None else f"noticed after {self.noticing_s:.1f} s, "
        return (
            f"{why}: {noticed}first step {self.restart_s:.1f} s later, "
            f"{self.repeated} steps repeated: {self.lost_s:.1f} s lost"
        )
