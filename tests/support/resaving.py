"""A world that loads a checkpoint and saves it again elsewhere."""

from pathlib import Path

from mimogrid.shell.checkpoint import files as checkpoint
from mimogrid.shell.checkpoint import manifest, saving
from mimogrid.shell.checkpoint.state import manifest_of, restore, slices_to_load, slices_to_save
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.runtime.session import open_session


def in_world(place: RankPlace, job: Job, saved: Path, folder: Path, transport: str | None = None) -> None:
    """Load `saved`, and save what came of it in `folder`."""
    with open_session(place, job, transport=transport) as session:
        assert session.runtime is not None
        facts = manifest.read_manifest(saved)
        checkpoint.load(saved, slices_to_load(session.runtime, facts), session.runtime.group)
        restore(session.runtime, facts)
        again = manifest_of(session.runtime, facts["step"])
        saving.save(folder, slices_to_save(session.runtime), again, session.runtime.group, keep=2)
