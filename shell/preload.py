"""Imported once by the server from which local ranks are forked: what takes seconds to import."""

import mimogrid.shell.parity
import mimogrid.shell.train  # noqa: F401
