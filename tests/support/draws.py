"""Draws: what a job's ranks draw in their networks, step by step, told from inside their worlds.

A draw is told as the state of the generator that it begins at: draws of one shape from equal states are equal,
whatever takes them (torch's attention does not show its mask).
"""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch.nn import functional

from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.runtime.forward_only import predict
from mimogrid.shell.runtime.session import open_session
from mimogrid.shell.runtime.tensor_slices import weights_of
from mimogrid.shell.runtime.train_step import train_step


@attrs.frozen
class Drawn:
    """One draw: of which stage, for what (`dropout` of values, `attention`), and from which state."""

    stage: str
    kind: str
    state: str


@attrs.frozen
class RankDraws:
    """What a rank says of some steps: position by module, draws, losses, and digests of weights and gradients."""

    positions: dict[str, dict[str, int]]
    draws: tuple[Drawn, ...]
    losses: tuple[float, ...]
    gradients: str
    weights: str
    evaluated: tuple[Drawn, ...]


def tell(place: RankPlace, job: Job, steps: tuple[int, ...], update: bool) -> RankDraws | None:
    """Run some steps of a job and then one of them forwards only, listening."""
    with open_session(place, job) as session:
        runtime = session.runtime
        if runtime is None:
            return None
        heard: list[Drawn] = []
        where: list[str] = []
        for stage, runner in runtime.stages.items():
            runner.network.register_forward_pre_hook(lambda *_, name=str(stage): where.append(name))
        with _listening(heard, where):
            outcomes = [train_step(runtime, i, job.step(i), job.step(i + 1), update=update) for i in steps]
        gradients = [w.grad for buffer in runtime.buffers.values() for w in buffer.weights.values()]
        weights = [w for named in weights_of(runtime).values() for w in named.values()]
        quiet: list[Drawn] = []
        with _listening(quiet, where):
            predict(runtime, job.step(steps[0]), job.source)
        return RankDraws(
            positions={r.module.name: r.module.grid.position(place.rank) for r in runtime.stages.values()},
            draws=tuple(heard),
            losses=tuple(outcome.loss for outcome in outcomes),
            gradients=_digest(gradients),
            weights=_digest(weights),
            evaluated=tuple(quiet),
        )


@contextlib.contextmanager
def _listening(heard: list[Drawn], where: list[str]) -> Iterator[None]:
    """Note every draw of dropout while open."""
    dropout, attention = functional.dropout, functional.scaled_dot_product_attention

    def note(kind: str) -> None:
        heard.append(Drawn(where[-1], kind, _digest([torch.get_rng_state()])))

    def noted_dropout(x: Any, p: float = 0.5, training: bool = True, **rest: Any) -> Any:
        if p and training and x.numel():  # Of nothing, nothing is drawn.
            note("dropout")
        return dropout(x, p, training, **rest)

    def noted_attention(*arguments: Any, dropout_p: float = 0.0, **rest: Any) -> Any:
        if dropout_p:
            note("attention")
        return attention(*arguments, dropout_p=dropout_p, **rest)

    functional.dropout, functional.scaled_dot_product_attention = noted_dropout, noted_attention
    try:
        yield
    finally:
        functional.dropout, functional.scaled_dot_product_attention = dropout, attention


def _digest(tensors: list[Any]) -> str:
    whole = hashlib.blake2b(digest_size=12)
    for tensor in tensors:
        whole.update(tensor.detach().numpy().tobytes())
    return whole.hexdigest()
