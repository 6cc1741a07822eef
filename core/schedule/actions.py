"""Actions: what a program is made of, and how each action is written.

A rank's program is a list of these values. Each prints as one line, and `parse` reads the line back:

>>> print(parse("vision.0 SEND_F2 -> language.0"))
vision.0 SEND_F2 -> language.0
>>> parse("language.1 B3") == Compute(Kind.BACKWARD, Stage("language", 1), 3)
True

=====================================  ====================================================================
``language.1 F3``                      forward of microbatch 3; ``B`` its backward, or in two halves ``I``, the
                                       gradients of the inputs, and ``W``, those of the weights
``language.1 B3/8``                    the part of that backward from its begin down to layer 8, which is included
``vision.0 SEND_F2 -> language.0``     post the sends of microbatch 2 (``F`` activations, ``B`` gradients)
``language.0 RECV_F2 <- vision.0``     post the receives
``vision.0 WAIT_SEND_F2 -> language.0``  block until the sends are complete; likewise ``WAIT_RECV``
``vision.0 REDUCE0``                   post the sum of the gradients of bucket 0; ``WAIT_REDUCE0`` waits for it
``vision.0 GATHER0``                   post the all-gather of the weights of bucket 0, likewise ``WAIT_GATHER0``
``language.0 TIE``                     all-reduce the gradients of tied embeddings over the first and the last stage
``NORM`` and ``UPDATE``                agree on the gradient norm over the world; take the step
=====================================  ====================================================================

SEND, RECV, REDUCE and GATHER post and return; the WAITs and the joint actions block. The microbatch of a transfer is
one of the link's target module. An action does not say which rank exchanges which rows: `routes` does.
"""

import enum
import re
from collections.abc import Mapping

import attrs

from mimogrid.core.topology.topology import Stage


class Kind(enum.Enum):
    """What a compute action computes."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT_GRADIENT = "I"
    WEIGHT_GRADIENT = "W"
    BACKWARD_PART = "B/"

    @property
    def letter(self) -> str:
        """Its letter in notations; a backward and its parts have one."""
        return self.value[0]

    __hash__ = object.__hash__  # there is one object of each, and millions are hashed


class Direction(enum.Enum):
    """Which way data flows on a link: activations forward, gradients backward."""

    FORWARD = "F"
    BACKWARD = "B"

    __hash__ = object.__hash__


@attrs.frozen(cache_hash=True)
class Compute:
    """Compute one microbatch on one stage; joint over the tp and cp ranks of a dp rank.

    A part of a backward goes on where the part before it ended, and computes the gradients of everything down to
    `layer`, a layer of the module; after the last part the backward computes the rest. Others have no layer.
    """

    kind: Kind
    stage: Stage
    microbatch: int
    layer: int | None = None

    def __str__(self) -> str:
        return f"{self.stage} {self.name}"

    @property
    def name(self) -> str:
        """Its notation without the stage."""
        return f"{self.kind.letter}{self.microbatch}" + ("" if self.layer is None else f"/{self.layer}")


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
    """Block until a posted transfer is complete."""

    transfer: Send | Recv

    def __str__(self) -> str:
        return re.sub(" (SEND|RECV)_", r" WAIT_\1_", str(self.transfer))


@attrs.frozen(cache_hash=True)
class Reduce:
    """Post the sum of the gradients of one bucket of a stage: an all-reduce, or a reduce-scatter (`update.buckets`)."""

    stage: Stage
    bucket: int

    def __str__(self) -> str:
        return f"{self.stage} REDUCE{self.bucket}"


@attrs.frozen(cache_hash=True)
class WaitReduce:
    """Block until the posted sum of the gradients of a bucket is complete."""

    stage: Stage
    bucket: int

    def __str__(self) -> str:
        return f"{self.stage} WAIT_REDUCE{self.bucket}"

    @property
    def posted(self) -> Reduce:
        """The action that posted it."""
        return Reduce(self.stage, self.bucket)


@attrs.frozen(cache_hash=True)
class Gather:
    """Post the all-gather of the weights of one bucket of a stage, of which each rank has updated its shard."""

    stage: Stage
    bucket: int

    def __str__(self) -> str:
        return f"{self.stage} GATHER{self.bucket}"


@attrs.frozen(cache_hash=True)
class WaitGather:
    """Block until the posted all-gather of the weights of a bucket is complete."""

    stage: Stage
    bucket: int

    def __str__(self) -> str:
        return f"{self.stage} WAIT_GATHER{self.bucket}"

    @property
    def posted(self) -> Gather:
        """The action that posted it."""
        return Gather(self.stage, self.bucket)


@attrs.frozen(cache_hash=True)
class Tie:
    """All-reduce the gradients of tied embeddings over the first and the last stage of a module."""

    stage: Stage

    def __str__(self) -> str:
        return f"{self.stage} TIE"


@attrs.frozen
class Norm:
    """Exchange the records of all ranks: they agree on the gradient norm and on taking or skipping the step."""

    def __str__(self) -> str:
        return "NORM"


@attrs.frozen
class Update:
    """Take the optimizer step, unless `Norm` agreed to skip it."""

    def __str__(self) -> str:
        return "UPDATE"


Transfer = Send | Recv
Collective = Reduce | Gather
"""What is posted for a bucket."""
WaitCollective = WaitReduce | WaitGather
Action = Compute | Send | Recv | Wait | Collective | WaitCollective | Tie | Norm | Update

_STAGE = r"[A-Za-z_][\w-]*\.\d+(?:\.\d+)?"
_LINE = re.compile(
    rf"(?:(?P<stage>{_STAGE}) )?"
    r"(?:(?P<kind>[FBIW])(?P<compute>\d+)(?:/(?P<layer>\d+))?"
    rf"|(?P<wait>WAIT_)?(?P<op>SEND|RECV)_(?P<direction>[FB])(?P<moved>\d+) (?:->|<-) (?P<peer>{_STAGE})"
    r"|(?P<collective>(?:WAIT_)?(?:REDUCE|GATHER))(?P<bucket>\d+)"
    r"|(?P<word>TIE|NORM|UPDATE))"
)


def matching_op(transfer: Transfer) -> Transfer:
    """Return the transfer that the peer posts: the receive of a send, or the send of a receive.

    >>> print(matching_op(Send(Stage("vision", 0), Direction.FORWARD, 2, Stage("language", 0))))
    language.0 RECV_F2 <- vision.0
    """
    op = Recv if isinstance(transfer, Send) else Send
    return op(transfer.peer, transfer.direction, transfer.microbatch, transfer.stage)


def parse(line: str) -> Action:
    """Read an action from its line. Raises ValueError for anything else."""
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


_COLLECTIVES: Mapping[str, type[Reduce | WaitReduce | Gather | WaitGather]] = {
    "REDUCE": Reduce,
    "WAIT_REDUCE": WaitReduce,
    "GATHER": Gather,
    "WAIT_GATHER": WaitGather,
}


def _of(
    found: "re.Match[str]", stage: Stage
) -> Compute | Send | Recv | Wait | Reduce | WaitReduce | Gather | WaitGather:
    if found["kind"]:
        if found["layer"]:
            return Compute(Kind.BACKWARD_PART, stage, int(found["compute"]), int(found["layer"]))
        return Compute(Kind(found["kind"]), stage, int(found["compute"]))
    if found["collective"]:
        return _COLLECTIVES[found["collective"]](stage, int(found["bucket"]))
    op = Send if found["op"] == "SEND" else Recv
    transfer = op(stage, Direction(found["direction"]), int(found["moved"]), parse_stage(found["peer"]))
    return Wait(transfer) if found["wait"] else transfer
