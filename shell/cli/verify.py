"""Verification: what `mimogrid verify` reports on a program: the job's own, or one from a file, as `show` prints it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.program.listing import Listing, from_text
from mimogrid.core.program.lower import Program
from mimogrid.core.program.replay import meeting
from mimogrid.core.program.verify import in_flight, listing_of, verify
from mimogrid.core.schedule.actions import Send, Transfer, Wait, WaitCollective
from mimogrid.shell.job.textfiles import read_text


OURS = "This is a fault of mimogrid, not of the job: please report it with the job file."
THEIRS = "`mimogrid show JOB` prints a program that is sound."
WITHOUT_STRICT = "Without --strict it passes: mimogrid has a channel for each direction."


@attrs.frozen
class VerifyReport:
    """What was found in a program: all `problems`, and whether it also passes `strict` verification.

    For a sound program also its size: ranks with actions, actions, messages between ranks, `joint` actions of several
    ranks, and per stage the peak of microbatches in flight with its limit.
    """

    problems: tuple[Problem, ...]
    strict: bool
    ranks: int = 0
    actions: int = 0
    messages: int = 0
    joint: int = 0
    peak_in_flight: Mapping[str, int] = {}
    max_in_flight: Mapping[str, int] = {}

    def as_json(self) -> dict[str, Any]:
        """Return the report for a script."""
        found = attrs.asdict(self)
        if self.problems:
            return {"ok": False, "strict": self.strict, "problems": found["problems"]}
        found["credits"] = found.pop("max_in_flight")
        return {"ok": True, **found}

    def __str__(self) -> str:
        peaks = self.peak_in_flight.items()
        in_flight = ", ".join(f"{stage} {peak}/{self.max_in_flight[stage]}" for stage, peak in peaks)
        return (
            f"{self.ranks} ranks, {self.actions} actions, {self.messages} messages, {self.joint} joint actions: "
            "complete, in order, free of deadlock.\n"
            f"Peak microbatches in flight / limit: {in_flight}.\n"
            f"Also passes with one serial queue per pair of ranks: {'yes' if self.strict else 'no'}."
        )


def report_on(program: Program, path: Path | None, *, strict: bool) -> VerifyReport:
    """Verify a program, or instead of it the one in a file. Raises PlanError for a file that cannot be read."""
    listing = listing_of(program) if path is None else _read(path)
    where, remedy = ("program", OURS) if path is None else (str(path), THEIRS)
    faults = verify(program, listing)
    if faults:
        return VerifyReport(tuple(Problem(where, f"{fault}.", remedy) for fault in faults), strict=False)
    strict_faults = verify(program, listing, strict=True)
    if strict and strict_faults:
        problems = tuple(Problem(where, f"{fault}.", WITHOUT_STRICT) for fault in strict_faults)
        return VerifyReport(problems, strict=False)
    return _counted(program, listing, strict=not strict_faults)


def _read(path: Path) -> Listing:
    """Return the program that a file holds. Raises PlanError."""
    text = read_text(path, "Name a file with what `mimogrid show` prints.")
    try:
        return from_text(text)
    except ValueError as error:  # a line that is no action
        remedy = "`mimogrid show JOB` prints a program in this notation."
        raise PlanError([Problem(str(path), f"{error}.", remedy)]) from None


def _counted(program: Program, listing: Listing, *, strict: bool) -> VerifyReport:
    """Return the report on a sound program."""
    placed = [(rank, action) for rank, actions in listing.items() for action in actions]
    met = {
        (members[0], meeting(action))
        for rank, action in placed
        if not isinstance(action, Transfer | Wait | WaitCollective)
        and len(members := program.joint(rank, action)) > 1
    }
    return VerifyReport(
        problems=(),
        strict=strict,
        ranks=len({rank for rank, _ in placed}),
        actions=len(placed),
        messages=sum(
            peer != rank for rank, a in placed if isinstance(a, Send) for peer in program.peers_of(rank, a)
        ),
        joint=len(met),
        peak_in_flight={str(stage): peak for stage, peak in in_flight(program, listing).items()},
        max_in_flight={str(stage): most for stage, most in program.order.max_in_flight.items()},
    )
