"""Verdicts: what `mimogrid verify` finds in a program, the job's own or one from a file, as `show` prints it."""

from collections.abc import Mapping
from pathlib import Path

import attrs

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.program.listing import Listing, from_text
from mimogrid.core.program.lower import Program
from mimogrid.core.program.replay import meeting
from mimogrid.core.program.verify import in_flight, listing_of, verify
from mimogrid.core.schedule.actions import Send, Transfer, Wait, WaitReduce


OURS = "This is a fault of mimogrid, not of the job: please report it with the job file."
THEIRS = "`mimogrid show JOB` prints a program that is sound."
WITHOUT = "Without --strict it passes: mimogrid has a channel for each direction."


@attrs.frozen
class Verdict:
    """What was found: all `problems`, and whether the program is sound even where it passes strictly.

    Of a sound program also how much there is of it: ranks with something to do, actions, messages between
    ranks, meetings of several ranks, and by stage how many microbatches are in flight at most, and how many may be.
    """

    problems: tuple[Problem, ...]
    strict: bool
    ranks: int = 0
    actions: int = 0
    messages: int = 0
    joint: int = 0
    peak_in_flight: Mapping[str, int] = {}
    max_in_flight: Mapping[str, int] = {}

    def __str__(self) -> str:
        peaks = self.peak_in_flight.items()
        flying = ", ".join(f"{stage} {peak} of {self.max_in_flight[stage]}" for stage, peak in peaks)
        return (
            f"{self.ranks} ranks, {self.actions} actions, {self.messages} messages, {self.joint} joint actions: "
            "complete, in order, free of deadlock.\n"
            f"Microbatches in flight at most, of those that may be: {flying}.\n"
            f"Also passes with one serial queue per pair of ranks: {'yes' if self.strict else 'no'}."
        )


def verdict(program: Program, path: Path | None, *, strict: bool) -> Verdict:
    """Judge a program, or instead of it what a file has. Raises PlanError for a file that cannot be read."""
    listing = listing_of(program) if path is None else _read(path)
    where, remedy = ("program", OURS) if path is None else (str(path), THEIRS)
    faults = verify(program, listing)
    if faults:
        return Verdict(tuple(Problem(where, f"{fault}.", remedy) for fault in faults), strict=False)
    strictly = verify(program, listing, strict=True)
    if strict and strictly:
        return Verdict(tuple(Problem(where, f"{fault}.", WITHOUT) for fault in strictly), strict=False)
    return _counted(program, listing, strict=not strictly)


def _read(path: Path) -> Listing:
    try:
        return from_text(path.read_text(encoding="utf-8"))
    except OSError as error:
        problem = Problem(
            str(path), f"cannot be read: {error.strerror}.", "Name a file that `show` has printed."
        )
    except ValueError as error:  # a line that is no action, or bytes that are no text
        problem = Problem(str(path), f"{error}.", "`mimogrid show JOB` prints a program in the notation.")
    raise PlanError([problem])


def _counted(program: Program, listing: Listing, *, strict: bool) -> Verdict:
    placed = [(rank, action) for rank, actions in listing.items() for action in actions]
    met = {
        (members[0], meeting(action))
        for rank, action in placed
        if not isinstance(action, Transfer | Wait | WaitReduce)
        and len(members := program.joint(rank, action)) > 1
    }
    return Verdict(
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
