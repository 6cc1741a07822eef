"""Imported once by the server from which local ranks are forked: what takes seconds to import."""

import mimogrid.shell.parity  # noqa: F401
