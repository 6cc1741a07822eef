"""Two processes with different hash seeds: what they print alike does not depend on the order of a set."""

import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]


def printed(code: str, test: str) -> set[str]:
    """Return all that a program prints under two hash seeds; it imports helpers, and the file `test` by its name."""
    path = os.pathsep.join(map(str, (ROOT / "src", ROOT / "tests/support", Path(test).parent)))
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    outputs = {process.communicate()[0] for process in running}
    assert [0, 0] == [process.returncode for process in running]
    assert all(outputs)
    return outputs
