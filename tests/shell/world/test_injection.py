"""Faults in their notation: printing, then parsing, is the identity."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from injection import Fault, Harm, parse


moments = st.sampled_from(["rendezvous", "between steps", "l.0 F2", "l.0 WAIT_RECV_F* <- v.0", "NORM"])
seconds = st.floats(0.001, 1e6).map(lambda s: float(f"{s:g}"))
faults = st.builds(
    lambda harm, rank, step, moment, s: Fault(harm, rank, step, moment, s if harm is Harm.DELAY else 0.0),
    st.sampled_from(Harm),
    st.integers(0, 9999),
    st.none() | st.integers(0, 10**9),
    moments,
    seconds,
)


@given(faults)
def test_printing_then_parsing_is_the_identity(fault: Fault) -> None:
    """Of every fault."""
    assert fault == parse(str(fault))


@pytest.mark.parametrize(
    "line",
    [
        "",
        "maim rank 1 step 2 at NORM",
        "kill rank 1 at NORM",
        "kill rank 1 every step 3 at NORM",
        "delay rank 1 step 2 at NORM",
        "kill rank 1 step 2 for 3 s at NORM",
        "stop rank 1 step 2 at ",
    ],
)
def test_what_is_no_fault_is_refused(line: str) -> None:
    """With an example of one."""
    with pytest.raises(ValueError, match=r"is no fault; one looks like 'kill rank"):
        parse(line)
