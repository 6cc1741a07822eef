"""Verdicts: what the fixture `verdict` gives, and what it must be."""

from collections.abc import Callable

from mimogrid.core.job.spec import JobSpec
from mimogrid.shell.job import jobfile
from mimogrid.shell.run.parity import TOLERANCE, Verdict


Verdicts = Callable[..., Verdict]


def assert_same(verdict: Verdicts, spec: JobSpec, *, steps: int = 1) -> None:
    """The layout of a spec is the same as one process."""
    found = verdict(spec, steps=steps)
    assert found.passed, (found, jobfile.dump(spec))
    assert max(found.loss, found.gradients) <= TOLERANCE[spec.precision]
