"""The error file: where a rank leaves why it failed, for torchrun to print.

torchrun names a file for each rank. It reads the files of the ranks that failed, and calls the failure with the
earliest time the root cause (`torch.distributed.elastic.multiprocessing.errors`). Times are whole seconds there.
"""

import contextlib
import json
import os
import time
from pathlib import Path


VARIABLE = "TORCHELASTIC_ERROR_FILE"
LATER_S = 1.0
"""How much later a rank that was cut off ends: torchrun stops all ranks, and reads their files, when the first ends."""


def record_failure(text: str, *, is_echo: bool = False) -> None:
    """Write the error file of this rank, if its launcher has named one; `is_echo`: another rank failed first.

    A file that cannot be written is passed over, because the failure itself is what is to be reported.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return
    # A rank that was cut off often fails in the same second as the one that it was cut off by.
    extra = {"py_callstack": text, "timestamp": str(int(time.time()) + is_echo)}
    with contextlib.suppress(OSError):
        Path(path).write_text(
            json.dumps({"message": {"message": text, "extraInfo": extra}}), encoding="utf-8"
        )
    if is_echo:
        time.sleep(LATER_S)
