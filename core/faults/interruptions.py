"""Interruptions: what a run lost each time that it ended and went on, and where the time went.

The clock is that of the hosts. From the last step that was done until that step is done again, the time is

    noticing    from the begin of the action in which the faulty rank ended, until another rank knew
    restart     from then until the first step of the next world is done
    repeated    the steps between the checkpoint and the last step that was done

Where nobody could tell that a rank failed, as when all hosts are lost, noticing and restart are one.

>>> begun = Interruption(done=8, resumed_at=6, last_s=10.0, failed_s=10.2, noticed_s=10.5)
>>> print(begun.after(7, now_s=19.5).after(8, now_s=20.0))
went on after a failure: noticed after 0.3 s, first step 9.0 s later, 2 steps repeated: 10.0 s lost

A run may end again before it is as far as it was. Then the first interruption lasts until the last step before the
second one, and the second one until the run is as far as it ever was. So the seconds lost and the steps repeated of all
interruptions add up. A world that ends before its first step only makes a restart longer.

>>> first, second = following(begun.after(7, now_s=19.5), Interruption(done=7, resumed_at=6, last_s=19.5))
>>> print(first)
went on after a failure: noticed after 0.3 s, first step 9.0 s later, 1 steps repeated: 9.5 s lost
>>> second.done, second.after(8, now_s=33.0).is_over
(8, True)
"""

from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class Interruption:
    """A run that goes on.

    Attributes:
        done: how many steps were done before.
        resumed_at: the first step afterwards.
        last_s: when the last step was done.
        failed_s: when the faulty rank began what it did not end; None: no rank failed, or nobody knows.
        noticed_s: when another rank knew; None as before.
        report: what was reported of the failure; None as before.
        starts: how many worlds were started until one did a step.
        reached: how many steps are done now.
        first_s: when the first step afterwards was done.
        again_s: when the last of the steps that are done now was done.
    """

    done: int
    resumed_at: int
    last_s: float
    failed_s: float | None = None
    noticed_s: float | None = None
    report: str | None = None
    starts: int = 1
    reached: int = attrs.field(default=attrs.Factory(lambda self: self.resumed_at, takes_self=True))
    first_s: float = attrs.field(default=attrs.Factory(lambda self: self.last_s, takes_self=True))
    again_s: float = attrs.field(default=attrs.Factory(lambda self: self.last_s, takes_self=True))

    def after(self, steps: int, *, now_s: float) -> "Interruption":
        """Return the interruption when so many steps are done."""
        first_s = self.first_s if self.has_step else now_s
        return attrs.evolve(self, reached=steps, first_s=first_s, again_s=now_s)

    @property
    def has_step(self) -> bool:
        """Whether a step was done afterwards."""
        return self.reached > self.resumed_at

    @property
    def is_over(self) -> bool:
        """Whether a step was done afterwards, and as many are done as before."""
        return self.has_step and self.reached >= self.done

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
        """How many steps were done again."""
        return max(0, min(self.done, self.reached) - self.resumed_at)

    @property
    def lost_s(self) -> float:
        """Seconds from the last step until the run was as far again, or was interrupted again."""
        return max(0.0, self.again_s - self.last_s)

    @property
    def facts(self) -> dict[str, Any]:
        """The attributes and what follows from them, by name."""
        derived = ("noticing_s", "restart_s", "repeated", "lost_s")
        return attrs.asdict(self) | {name: getattr(self, name) for name in derived}

    def __str__(self) -> str:
        why = "went on" if self.noticing_s is None else "went on after a failure"
        noticed = "" if self.noticing_s is None else f"noticed after {self.noticing_s:.1f} s, "
        starts = "" if self.starts == 1 else f" ({self.starts} starts)"
        return (
            f"{why}: {noticed}first step {self.restart_s:.1f} s later{starts}, "
            f"{self.repeated} steps repeated: {self.lost_s:.1f} s lost"
        )


def following(before: Interruption, found: Interruption) -> tuple[Interruption | None, Interruption]:
    """Return how an interruption ended that was not over when the run ended again, and the one that begins then.

    `found` is how the next world finds the run. An interruption in which no step was done goes on as one.
    """
    if not before.has_step:
        resumed = found.resumed_at
        return None, attrs.evolve(before, resumed_at=resumed, reached=resumed, starts=before.starts + 1)
    ended = attrs.evolve(before, reached=found.done, again_s=found.last_s)
    return ended, attrs.evolve(found, done=max(before.done, found.done))
