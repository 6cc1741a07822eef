"""JSON files of a checkpoint: objects that are read with care, and written so that equal values give equal bytes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mimogrid.core.base.errors import PlanError, Problem


BYTES_MOST = 1 << 28
"""The largest file that is read into memory."""

OTHER = "Take another checkpoint."


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a checkpoint. Raises PlanError with the name of the file."""

    def refused(message: str) -> PlanError:
        return PlanError([Problem(str(path.parent), f"'{path.name}' {message}.", OTHER)])

    try:
        if (size := path.stat().st_size) > BYTES_MOST:
            raise refused(f"has {size} bytes; at most {BYTES_MOST} are read")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise refused("is missing") from None
    except OSError as error:
        raise refused(f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise refused(f"is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise refused("is no JSON object")
    return value


def canonical(value: Mapping[str, object]) -> str:
    """Write a JSON object so that equal values give equal bytes: keys in order, a line for each."""
    lines = (f"{json.dumps(key)}: {json.dumps(value[key], sort_keys=True)}" for key in sorted(value))
    return "{\n" + ",\n".join(lines) + "\n}\n"
