"""Imported once by the server from which local ranks are forked: what takes seconds to import."""

import mimogrid.shell.run.parity
import mimogrid.shell.run.train  # noqa: F401
