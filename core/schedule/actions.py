"""Actions: the words that programs are made of, and their notation.

A rank's program is a list of these values. Each prints as one line and is read back from it:

>>> print(parse("vision.0 SEND_F2 -> language.0"))
vision.0 SEND_F2 -> language.0
>>> parse("language.1 B3") == Compute(Kind.BACKWARD, Stage("language", 1), 3)
True

=====================================  ====================================================================
``language.1 F3``                      forward of microbatch 3; ``B`` backward, or ``I`` the gradient of the
                                       inputs and ``W`` that of the weights
``vision.0 SEND_F2 -> language.0``     post the sends of microbatch 2 (``F`` activations, ``B`` gradients)
``language.0 RECV_F2 <- vision.0``     post the receives
``vision.0 WAIT_SEND_F2 -> language.0``  block until the sends are complete; likewise ``WAIT_RECV``
``vision.0 REDUCE``                    sum the stage's gradients over its dp ranks, and partial ones over tp
``language.0 TIE``                     sum the gradients of weights that both ends of a module hold
``NORM`` and ``UPDATE``                agree on the gradient norm over the world; take the step
=====================================  ====================================================================

SEND, RECV and REDUCE post and return; only WAIT, and the joint actions, block. The microbatch of a transfer is that
of the link's target module. Who exchanges what is in the route table (`routes`), not in the action.
"""

import enum
import re

import attrs

from mimogrid.core.topology.topology import Stage


class Kind(enum.Enum):
    """What a compute action computes."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT_GRADIENT = "I"
    WEIGHT_GRADIENT = "W"


class Direction(enum.Enum):
    """Which way data flows on a link: activations forward, gradients backward."""

    FORWARD = "F"
    BACKWARD = "B"


@attrs.frozen(cache_hash=True)
class Compute:
    """One piece of work on one microbatch; joint over the ranks (tp, cp) that share it."""

    kind: Kind
    stage: Stage
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage} {self.kind.value}{self.microbatch}"


@attrs.frozen(cache_hash=True)
class Send:
    """Post the sends from `stage` to `peer` of one microbatch."""

    stage: Stage
    direction: Direction
    microbatch: int
    peer: Stage

    def __str__(self) -> str:
        return f"{self.stage} SEND_{self.direction.value}{self.microbatch} -> {self.peer}"

    @property
    def at_source(self) -> bool:
        """Whether the stage is at the source of the link: it sends activations."""
        return self.direction is Direction.FORWARD


@attrs.frozen(cache_hash=True)
class Recv:
    """Post the receives by `stage` from `peer` of one microbatch."""

    stage: Stage
    direction: Direction
    microbatch: int
    peer: Stage

    def __str__(self) -> str:
        return f"{self.stage} RECV_{self.direction.value}{self.microbatch} <- {self.peer}"

    @property
    def at_source(self) -> bool:
        """Whether the stage is at the source of the link: it receives gradients."""
        return self.direction is Direction.BACKWARD


@attrs.frozen(cache_hash=True)
class Wait:
    """Block until a transfer that was posted is complete."""

    transfer: Send | Recv

    def __str__(self) -> str:
        return re.sub(" (SEND|RECV)_", r" WAIT_\1_", str(self.transfer))


@attrs.frozen(cache_hash=True)
class Reduce:
    """Post the sum of one bucket of a stage's weight gradients over the ranks that share it."""

    stage: Stage
    bucket: int

    def __str__(self) -> str:
        return f"{self.stage} REDUCE{self.bucket}"


@attrs.frozen(cache_hash=True)
class WaitReduce:
    """Block until the sum of a bucket that was posted is there."""

    stage: Stage
    bucket: int

    def __str__(self) -> str:
        return f"{self.stage} WAIT_REDUCE{self.bucket}"

    @property
    def posted(self) -> Reduce:
        """What it waits for."""
        return Reduce(self.stage, self.bucket)


@attrs.frozen(cache_hash=True)
class Tie:
    """Sum the gradients of tied weights over the stages of a module that hold them."""

    stage: Stage

    def __str__(self) -> str:
        return f"{self.stage} TIE"


@attrs.frozen
class Norm:
    """Agree on the global gradient norm and on whether the step is taken."""

    def __str__(self) -> str:
        return "NORM"


@attrs.frozen
class Update:
    """Take the optimizer step that `Norm` agreed on."""

    def __str__(self) -> str:
        return "UPDATE"


Transfer = Send | Recv
Action = Compute | Send | Recv | Wait | Reduce | WaitReduce | Tie | Norm | Update

_STAGE = r"[A-Za-z_][\w-]*\.\d+(?:\.\d+)?"
_LINE = re.compile(
    rf"(?:(?P<stage>{_STAGE}) )?"
    r"(?:(?P<kind>[FBIW])(?P<compute>\d+)"
    rf"|(?P<wait>WAIT_)?(?P<way>SEND|RECV)_(?P<direction>[FB])(?P<moved>\d+) (?:->|<-) (?P<peer>{_STAGE})"
    r"|(?P<sum>(?:WAIT_)?REDUCE)(?P<bucket>\d+)"
    r"|(?P<word>TIE|NORM|UPDATE))"
)


def matching_op(transfer: Transfer) -> Transfer:
    """Return what the peer posts for a transfer.

    >>> print(matching_op(Send(Stage("vision", 0), Direction.FORWARD, 2, Stage("language", 0))))
    language.0 RECV_F2 <- vision.0
    """
    way = Recv if isinstance(transfer, Send) else Send
    return way(transfer.peer, transfer.direction, transfer.microbatch, transfer.stage)


def parse(line: str) -> Action:
    """Read an action in its notation. Raises ValueError for anything else."""
    line = line.strip()
    found = _LINE.fullmatch(line)
    if found is None:
        raise ValueError(f"'{line}' is no action; one looks like 'vision.0 SEND_F2 -> language.0'")
    stage = parse_stage(found["stage"]) if found["stage"] else None
    action = _joint(found["word"], stage) if stage is None or found["word"] else _of(found, stage)
    if str(action) != line:
        raise ValueError(f"'{line}' is no action; did you mean '{action}'?")
    return action


def parse_stage(text: str) -> Stage:
    """Read a stage, ``module.pp`` or ``module.pp.chunk``."""
    module, pp, *chunk = text.split(".")
    return Stage(module, int(pp), int(chunk[0]) if chunk else 0)


def _joint(word: str | None, stage: Stage | None) -> Action:
    match word, stage:
        case ["TIE", Stage()]:
            return Tie(stage)
        case ["NORM", None]:
            return Norm()
        case ["UPDATE", None]:
            return Update()
        case _:
            raise ValueError(f"{word or 'a compute action'} with stage {stage} is no action")


def _of(found: "re.Match[str]", stage: Stage) -> Compute | Send | Recv | Wait | Reduce | WaitReduce:
    if found["kind"]:
        return Compute(Kind(found["kind"]), stage, int(found["compute"]))
    if found["sum"]:
        return (Reduce if found["sum"] == "REDUCE" else WaitReduce)(stage, int(found["bucket"]))
    way = Send if found["way"] == "SEND" else Recv
    transfer = way(stage, Direction(found["direction"]), int(found["moved"]), parse_stage(found["peer"]))
    return Wait(transfer) if found["wait"] else transfer
