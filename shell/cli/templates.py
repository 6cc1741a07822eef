"""Templates: commented job files to begin with, and the code that one of them names. They are examples of the package.

Beside a job file its schema is written, which the first line of the job names for editors.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import mimogrid
from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.shell.cli.output import write
from mimogrid.shell.job.schema import header, job_schema


FOLDER = Path(mimogrid.__file__).parent / "examples"
SCHEMA = "job.schema.json"
TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "text": ("templates/text.toml",),
    "vision-language": ("templates/vision-language.toml",),
    "omni": ("templates/omni.toml",),
    "own": ("own/job.toml", "own/ears.py", "own/network.py", "own/pulses.py"),
}
"""By name the job file, and the files that lie beside it."""


def write_template(name: str, out: Path, *, force: bool) -> list[Path]:
    """Write a template as the job file `out`, and what it needs beside it; return the files.

    Raises PlanError for files that are there already, unless `force` says to write over them.
    """
    job, *others = TEMPLATES[name]
    texts = {
        out: header(SCHEMA) + _text(job),
        out.with_name(SCHEMA): json.dumps(job_schema(), indent=1) + "\n",
    }
    texts |= {out.with_name(Path(other).name): _text(other) for other in others}
    there = [path for path in texts if path.exists() and path.name != SCHEMA]
    if there and not force:
        remedy = "Name another file: --out. Or write over it: --force."
        raise PlanError(Problem(str(path), "is there already.", remedy) for path in there)
    for path, text in texts.items():
        write(path, [text])
    return list(texts)


def _text(example: str) -> str:
    return (FOLDER / example).read_text(encoding="utf-8")
