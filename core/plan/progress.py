"""Progress: what a search says on its way, and how it is stopped.

The core reads no clock. Whoever searches may pass a `Watch`, which is told of the progress and answers whether to go
on. After a no the search ends with the best layout so far; its gap counts all that it has not looked at.
"""

import math
from collections.abc import Callable

import attrs


@attrs.frozen(kw_only=True)
class Progress:
    """How far a search is.

    Attributes:
        bound_s: no layout that is still to come has a lower bound below this.
        best_s: the seconds of the best layout so far, whose memory is perhaps only estimated yet; infinite before there
            is one.
        looked_at: configurations and layouts that were priced.
        simulated: layouts that were simulated.
    """

    bound_s: float
    best_s: float = math.inf
    looked_at: int = 0
    simulated: int = 0


Watch = Callable[[Progress], bool]


def always(_: Progress) -> bool:
    """Go on."""
    return True


def never(_: Progress) -> bool:
    """End at once, with the first layout that is found."""
    return False
