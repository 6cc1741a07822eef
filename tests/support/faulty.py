"""`mimogrid` with a fault on purpose: ``python -m faulty train JOB``, and the fault's line in MIMOGRID_FAULT.

The processes of a local world import this file, too, so the fault strikes there. After a restart by a launcher the
fault is over.
"""

import os
import sys

from injection import injected
from mimogrid.shell.cli.main import main


VARIABLE = "MIMOGRID_FAULT"

if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
    kept = injected(os.environ[VARIABLE])  # It ends when nothing refers to it.
    kept.__enter__()

if __name__ == "__main__":
    sys.exit(main())
