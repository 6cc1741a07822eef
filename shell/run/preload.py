"""Preloading: what takes seconds to import, imported once by the server from which local ranks are forked."""

import gc

from mimogrid.shell.world.orphans import end_with_parent


end_with_parent()  # first, because what follows takes seconds

import mimogrid.shell.run.parity  # noqa: E402
import mimogrid.shell.run.train  # noqa: E402, F401


# What a collection of a rank looks at is copied for that rank, and it would look at all that is imported here.
gc.freeze()
