"""Preloading: what takes seconds to import, imported once by the server from which local ranks are forked."""

import gc

import mimogrid.shell.run.parity
import mimogrid.shell.run.train  # noqa: F401


# What a collection of a rank looks at is copied for that rank, and it would look at all that is imported here.
gc.freeze()
