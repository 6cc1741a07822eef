"""Listings: programs as text, rank by rank, and back.

A program lowers a rank when asked. A *listing* is the result for all ranks, a plain mapping from rank to actions.
`verify` checks listings, so it can check one from a text file, a test or another planner. In the text a # starts a
comment.

>>> text = '''
... rank 0
...     vision.0 F0
...     vision.0 SEND_F0 -> language.0
... rank 1
...     language.0 RECV_F0 <- vision.0
... '''
>>> to_text(from_text(text)) == text.lstrip()
True
"""

from collections.abc import Mapping

from mimogrid.core.schedule.actions import Action, parse


Listing = Mapping[int, tuple[Action, ...]]


def to_text(listing: Listing) -> str:
    """Return a listing as text, one action a line."""
    lines: list[str] = []
    for rank, actions in listing.items():
        lines.append(f"rank {rank}")
        lines += [f"    {action}" for action in actions]
    return "\n".join(lines) + "\n"


def from_text(text: str) -> Listing:
    """Read a listing from text. Raises ValueError, naming the line, for anything else."""
    listing: dict[int, list[Action]] = {}
    actions: list[Action] | None = None
    for number, written in enumerate(text.splitlines(), 1):
        line = written.partition("#")[0].strip()
        match line.split():
            case []:
                pass
            case ["rank", rank] if rank.isdecimal():
                if int(rank) in listing:
                    raise ValueError(f"line {number}: rank {rank} has a list already")
                actions = listing[int(rank)] = []
            case _ if actions is None:
                raise ValueError(f"line {number}: '{line}' stands before any 'rank R'")
            case _:
                try:
                    actions.append(parse(line))
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from None
    return {rank: tuple(actions) for rank, actions in listing.items()}
