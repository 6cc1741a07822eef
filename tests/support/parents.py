"""Who started a process: a body that imports nothing."""

import os


def mine(place: object) -> int:
    """Return the id of this process's parent."""
    del place
    return os.getppid()
