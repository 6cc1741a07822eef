"""Traces: bodies that tell what the ranks of a world read, planned, trained and kept; for `test_known_faults`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from torch import Tensor

from mimogrid.core.base.samples import Sample
from mimogrid.core.topology.groups import Ranks, Slot, channels_of, groups_of
from mimogrid.shell.checkpoint import files as checkpoint
from mimogrid.shell.checkpoint import manifest, saving
from mimogrid.shell.checkpoint.state import manifest_of, restore, slices_to_load, slices_to_save
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.job.sources.source import Source
from mimogrid.shell.runtime.optimizer import states_of
from mimogrid.shell.runtime.session import Session, open_session
from mimogrid.shell.runtime.tensor_slices import weights_of
from mimogrid.shell.runtime.train_step import train_step
from own import WithFacts, written


# -- what is read ------------------------------------------------------------------------------------------


@attrs.frozen
class Noted:
    """A source that notes which samples a rank loads for which module."""

    inner: Source
    seen: list[tuple[str, int]]

    def describe(self, sample_id: int) -> Sample:
        """Describe as the inner source does."""
        return self.inner.describe(sample_id)

    def load(self, sample_id: int, module: str) -> Mapping[str, Tensor]:
        """Load as the inner source does, and note it."""
        self.seen.append((module, sample_id))
        return self.inner.load(sample_id, module)


def read(place: RankPlace, job: Job) -> dict[str, tuple[int, frozenset[int]]]:
    """Return this rank's dp rank of each module that it loads samples for, and their ids."""
    assert job.source is not None
    noted = Noted(job.source, [])
    with open_session(place, attrs.evolve(job, source=noted)) as session:
        if session.runtime is not None:
            step = job.step(0)
            train_step(session.runtime, 0, step, step)
    return {
        name: (
            job.topology.modules[name].dp_rank_of(place.rank),
            frozenset(i for module, i in noted.seen if module == name),
        )
        for name, _ in noted.seen
    }


# -- what is planned ---------------------------------------------------------------------------------------


def planned(place: RankPlace, job: Job) -> tuple[tuple[Slot, ...], tuple[Ranks, ...]]:
    """Return the groups and channels that this process would make, in its order."""
    return groups_of(job.topology), channels_of(job.topology)


# -- what trains -------------------------------------------------------------------------------------------


@attrs.frozen
class Trained:
    """Parameters of a rank by ``module.name``: those that may train by plan, those that do, and that changed."""

    planned: frozenset[str]
    asking: frozenset[str]
    changed: frozenset[str]


def trainable(place: RankPlace, job: Job) -> Trained | None:
    """Train two steps; return what trained."""
    with open_session(place, job) as session:
        if session.runtime is None:
            return None
        names = [f"{i.stage.module}.{n}" for i in job.topology.role(place.rank).stages for n in i.trainable]
        weights = _weights(session)
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        for index in range(2):
            train_step(session.runtime, index, job.step(index), job.step(index + 1))
        changed = {name for name, weight in weights.items() if not weight.equal(before[name])}
        asking = {name for name, weight in weights.items() if weight.requires_grad}
        return Trained(frozenset(names), frozenset(asking), frozenset(changed))


def _weights(session: Session) -> dict[str, Tensor]:
    assert session.runtime is not None
    return {f"{s.module}.{n}": w for s, own in weights_of(session.runtime).items() for n, w in own.items()}


# -- what is kept ------------------------------------------------------------------------------------------


Kept = dict[str, tuple[int, dict[str, np.ndarray]]]
"""By ``module.name``: the optimizer's step count and its moments."""


def saved(place: RankPlace, job: Job, folder: Path, steps: int) -> Kept:
    """Train some steps and save; return the optimizer's state."""
    with open_session(place, job) as session:
        assert session.runtime is not None
        for index in range(steps):
            train_step(session.runtime, index, job.step(index), job.step(index + 1))
        facts = manifest_of(session.runtime, steps)
        saving.save(folder, slices_to_save(session.runtime), facts, session.runtime.group, keep=1)
        return _kept(session)


def loaded(place: RankPlace, job: Job, folder: Path) -> Kept:
    """Load the newest checkpoint into new weights; return the optimizer's state."""
    with open_session(place, job) as session:
        assert session.runtime is not None
        newest = manifest.newest(folder)
        assert newest is not None
        facts = manifest.read_manifest(newest)
        checkpoint.load(newest, slices_to_load(session.runtime, facts), session.runtime.group)
        restore(session.runtime, facts)
        return _kept(session)


def _kept(session: Session) -> Kept:
    assert session.runtime is not None
    assert session.runtime.optimizer is not None
    states = {
        f"{stage.module}.{shard.part.name}": states_of(session.runtime.optimizer, shard)
        for stage, of_stage in session.runtime.buffers.items()
        for buffer in of_stage.buffers
        for shard in buffer.shards
    }
    return {
        name: (int(state["step"]), {k: v.numpy().copy() for k, v in state.items() if k != "step"})
        for name, state in states.items()
    }


# -- content that looks like padding -----------------------------------------------------------------------


@attrs.frozen
class Blank(WithFacts):
    """Samples whose every row, token and label is the number that padding is made of."""

    def load(self, sample_id: int, module: str) -> Mapping[str, Tensor]:
        """Load zeros for content; placeholders and loss weights stay."""
        loaded = dict(super().load(sample_id, module))
        for name in loaded.keys() & {"rows", "tokens", "labels"}:
            loaded[name] = loaded[name].clamp(max=0) if name == "tokens" else loaded[name] * 0
        return loaded


def blank(**given: Any) -> Blank:
    """Return samples that are all zeros; options are those of `own.written`."""
    honest = written(**given)
    return Blank(honest.inner, honest.known)
