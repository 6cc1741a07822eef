"""What modules of the user's generate in a world of ranks, before anything is trained."""

from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.run.evaluate import Answer, Examined, examine
from mimogrid.shell.runtime.session import open_session


def answered(place: RankPlace, job: Job, task: str) -> tuple[Answer, ...]:
    """Answer one step of the held-out samples of a task; the first rank has what was generated after them."""
    with open_session(place, job) as session:
        if session.runtime is None:
            return ()
        assert isinstance(job.source, Examined)
        answers = examine(session.runtime, job.source.held_out(task=task), 1)
        return answers if place.rank == job.topology.ranks[0] else ()
