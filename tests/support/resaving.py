"""A world that loads a checkpoint and saves it again elsewhere."""

from pathlib import Path

from mimogrid.shell import checkpoint
from mimogrid.shell.jobs import Job
from mimogrid.shell.place import Place
from mimogrid.shell.session import open_session
from mimogrid.shell.state import pieces_of, restore


def in_world(place: Place, job: Job, saved: Path, folder: Path) -> None:
    """Load `saved`, and save what came of it in `folder`."""
    with open_session(place, job) as session:
        assert session.crew is not None
        facts = checkpoint.read_manifest(saved)
        checkpoint.load(saved, pieces_of(session.crew), session.crew.group)
        restore(session.crew, steps_taken=facts["steps_taken"])
        again = {**facts, "steps_taken": session.crew.steps_taken}
        checkpoint.save(folder, pieces_of(session.crew), again, session.crew.group, keep=2)
