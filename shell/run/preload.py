"""Preloading: what takes seconds to import, imported once by the server from which local ranks are forked."""

import mimogrid.shell.run.parity
import mimogrid.shell.run.train  # noqa: F401
