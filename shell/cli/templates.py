"""Templates: commented job files to begin with, and the code that one of them names. They are examples of the package.

Beside a job file its schema is written, which the first line of the job names for editors.
"""

import json
from pathlib import Path

import mimogrid
from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.shell.cli.arguments import TEMPLATES
from mimogrid.shell.cli.output import write
from mimogrid.shell.job.schema import header, job_schema


FOLDER = Path(mimogrid.__file__).parent / "examples"
SCHEMA = "job.schema.json"


def write_template(name: str, out: Path, *, force: bool) -> list[Path]:
    """Write a template as the job file `out`, and what it needs beside it; return the files.

    Raises PlanError for files that are there already, unless `force` says to write over them.
    """
    job, *others = TEMPLATES[name]
    texts = {out: header(SCHEMA) + _text(job)}
    texts |= {out.with_name(Path(other).name): _text(other) for other in others}
    if there := [path for path in texts if path.exists() and not force]:
        remedy = "Name another file: --out. Or write over it: --force."
        raise PlanError(Problem(str(path), "is there already.", remedy) for path in there)
    for path, text in texts.items():
        write(path, [text])
    return [*texts, write_schema(out)]


def write_schema(job: Path) -> Path:
    """Write the schema beside a job file; return its path. It is derived, and may be written again."""
    path = job.with_name(SCHEMA)
    write(path, [json.dumps(job_schema(), indent=1), "\n"])
    return path


def _text(example: str) -> str:
    return (FOLDER / example).read_text(encoding="utf-8")
