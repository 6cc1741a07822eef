"""The server from which load processes are forked: what it imports is there in each of them.

Python's fork server imports this module by its name. Whoever else imports it changes nothing of its process.
"""

import os
import signal

from mimogrid.shell.world.orphans import end_with_parent
from mimogrid.shell.world.preemption import SIGNALS


if os.environ.pop("MIMOGRID_LOAD_SERVER", None):  # `load_process.SERVER`, which is imported last
    end_with_parent()  # first, because what follows takes seconds
    for number in SIGNALS:  # they are for ranks, which read on to the end of the step
        signal.signal(number, signal.SIG_IGN)

import mimogrid.shell.runtime.load_process  # noqa: F401
