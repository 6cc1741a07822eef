"""Pickled: how many bytes a rank pickles to put the state of a job together."""

import pickle
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from mimogrid.shell.checkpoint.state import gather
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.runtime.session import open_session


def in_world(place: RankPlace, job: Job) -> tuple[int, int] | None:
    """Return the bytes that this rank pickles, and those of the full tensors that it gets."""
    pickled = 0
    gather_object, all_gather_object = dist.gather_object, dist.all_gather_object

    def gathering(value: Any, *others: Any, **named: Any) -> None:
        nonlocal pickled
        pickled += len(pickle.dumps(value))
        gather_object(value, *others, **named)

    def all_gathering(every: list[Any], value: Any, **named: Any) -> None:
        nonlocal pickled
        pickled += len(pickle.dumps(value))
        all_gather_object(every, value, **named)

    with open_session(place, job) as session:
        if session.runtime is None:
            return None
        with (
            patch.object(dist, "gather_object", gathering),
            patch.object(dist, "all_gather_object", all_gathering),
        ):
            full = gather(session.runtime)
    return pickled, sum(tensor.nbytes for tensor in full.values())
