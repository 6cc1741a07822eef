"""The server of load processes: only the process that Python's fork server starts takes no signals."""

import importlib
import signal

import mimogrid.shell.runtime.load_server as server
from mimogrid.shell.world.preemption import SIGNALS


def test_to_import_it_changes_no_signals():
    """Documentation tools and test runners import every module; ranks that they start still hear signals."""
    before = [signal.getsignal(number) for number in SIGNALS]
    importlib.reload(server)
    assert before == [signal.getsignal(number) for number in SIGNALS]
    assert signal.SIG_IGN not in before
