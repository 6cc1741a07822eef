"""Parity: what the fixture `parity` returns, and what must hold for it."""

from collections.abc import Callable

from mimogrid.core.job.spec import JobSpec
from mimogrid.shell.job import jobfile
from mimogrid.shell.run.parity import TOLERANCE, ParityReport


Parity = Callable[..., ParityReport]


def assert_same(parity: Parity, spec: JobSpec, *, steps: int = 1) -> None:
    """The layout of a spec is the same as one process."""
    found = parity(spec, steps=steps)
    assert found.passed, (found, jobfile.dump(spec))
    assert max(found.loss, found.gradients) <= TOLERANCE[spec.precision]
