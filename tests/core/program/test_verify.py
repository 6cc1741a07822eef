"""Verify: what is wrong with a listing is found and named, and nothing else; sound programs are in `test_soundness`."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import CASES, worlds
from jobs import edited, halved, program_for, program_of
from mimogrid.core.program.listing import Listing, from_text
from mimogrid.core.program.replay import replay
from mimogrid.core.program.verify import in_flight, listing_of, verify, verify_each
from mimogrid.core.schedule.actions import Action
from mimogrid.core.topology.topology import Stage
from scale import drawn


ROWS = {"vision": (4, 3, 0, 0, 1), "image": (0, 2, 1), "audio": (1, 0, 0, 3), "a": (2, 0), "b": (0, 0, 5)}


@settings(max_examples=drawn(15))
@given(worlds(), st.data())
def test_both_ways_agree_on_broken_lowering(text: str, data: st.DataObject) -> None:
    """If every rank of a stage is broken in the same way, `verify` says the same as `verify_each`."""
    program = program_of(text, batch=24)
    listing = listing_of(program)
    victim = data.draw(st.sampled_from([a for actions in listing.values() for a in actions][:200]))
    shift = data.draw(st.sampled_from([-40, -3, -1, 1, 3, 40]))
    broken = {rank: _moved(actions, victim, shift) for rank, actions in listing.items()}
    assert verify_each(program, broken) == verify(program, broken)


def _moved(actions: tuple[Action, ...], victim: Action, shift: int) -> tuple[Action, ...]:
    if victim not in actions:
        return actions
    place = actions.index(victim)
    rest = [*actions[:place], *actions[place + 1 :]]
    rest.insert(min(max(place + shift, 0), len(rest)), victim)
    return tuple(rest)


def test_a_deadlock_names_its_cycle() -> None:
    """Two ranks that each wait for what the other posts later are named, with the actions that they stand before."""
    program = program_of("vision vit > language; language gpt", microbatches=1, batch=1)
    listing = edited(
        listing_of(program),
        0,
        "vision.0 RECV_B0 <- language.0",
        "vision.0 F0",
        "vision.0 SEND_F0 -> language.0",
        "vision.0 WAIT_SEND_F0 -> language.0",
        "vision.0 WAIT_RECV_B0 <- language.0",
        "vision.0 B0",
        "NORM",
        "UPDATE",
    )
    assert () == verify(program, listing)
    listing = edited(
        listing,
        1,
        "language.0 RECV_F0 <- vision.0",
        "language.0 WAIT_RECV_F0 <- vision.0",
        "language.0 F0",
        "language.0 B0",
        "NORM",
        "language.0 SEND_B0 -> vision.0",
        "language.0 WAIT_SEND_B0 -> vision.0",
        "UPDATE",
    )
    (fault,) = verify(program, listing)
    assert (
        "deadlock: rank 0 stands before 'vision.0 WAIT_RECV_B0 <- language.0' and waits for rank 1; "
        "rank 1 stands before 'NORM' and waits for rank 0"
    ) == fault


def test_one_of_several_ranks_alike() -> None:
    """Ranks 0 and 1 have equal lists, but only rank 1's peer answers too late: that is found all the same."""
    program = program_of("vision vit dp2 > language; language gpt dp2", microbatches=1, batch=2)
    listing = listing_of(program)
    assert listing[0] == listing[1]
    late = [line for line in map(str, listing[3]) if line != "UPDATE" and "SEND_B0" not in line]
    answer = ["language.0 SEND_B0 -> vision.0", "language.0 WAIT_SEND_B0 -> vision.0", "UPDATE"]
    order = [line for line in late if "REDUCE" not in line and line != "NORM"]
    sums = ["language.0 REDUCE0", "language.0 WAIT_REDUCE0"]
    (fault,) = verify(program, edited(listing, 3, *order, *sums, "NORM", *answer))
    assert fault.startswith("deadlock: ")
    assert "rank 1 stands before 'vision.0 WAIT_RECV_B0 <- language.0' and waits for rank 3" in fault


def test_a_ring_of_joint_actions_is_a_deadlock() -> None:
    """Two tp ranks that take two microbatches in different orders wait for each other."""
    program = program_of("l gpt tp2", microbatches=2, batch=2, schedule="gpipe")
    listing = edited(listing_of(program), 1, "l.0 F1", "l.0 F0", "l.0 B0", "l.0 B1", "NORM", "UPDATE")
    assert re.fullmatch(
        "deadlock: rank 0 stands before 'l.0 F0' and waits for rank 1; "
        "rank 1 stands before 'l.0 F1' and waits for rank 0",
        *verify(program, listing),
    )


def test_receives_in_another_order_are_named() -> None:
    """Receives posted in another order than the sends are an error even where tags would keep them apart."""
    program = program_of("vision vit > language; language gpt", microbatches=2, batch=2, schedule="gpipe")
    actions = list(map(str, listing_of(program)[1]))
    first, second = (actions.index(f"language.0 RECV_F{k} <- vision.0") for k in (0, 1))
    actions[first], actions[second] = actions[second], actions[first]
    (fault,) = verify(program, edited(listing_of(program), 1, *actions))
    assert fault.startswith("rank 1 posts its receives from rank 0 in another order than rank 0 sends")


def test_problems_are_described() -> None:
    """What is missing, doubled, out of place or too early is named, rank by rank."""
    program = program_of("vision vit > language; language gpt", microbatches=1, batch=1)
    listing = from_text(
        """
        rank 0
            vision.0 SEND_F0 -> language.0
            vision.0 F0
            vision.0 RECV_B0 <- language.0
            vision.0 WAIT_RECV_B0 <- language.0
            vision.0 WAIT_SEND_F0 -> language.0
            vision.0 B0
            vision.0 B0
            NORM
            UPDATE
        rank 1
            language.0 F1
        rank 7
            NORM
        """
    )
    faults = verify(program, listing)
    assert "rank 0: 'vision.0 B0' is there 2 times" in faults
    assert "rank 0: 'vision.0 SEND_F0 -> language.0' comes before 'vision.0 F0', which it needs" in faults
    assert "rank 1: 'language.0 F1' has no place in this program" in faults
    assert "rank 1: 'language.0 F0' is missing" in faults
    assert "rank 7 hosts no module but has actions" == faults[-1]


def test_split_backwards_are_as_good() -> None:
    """A backward in two parts is accepted, in order, once each; a stage is split on all ranks or on none."""
    program = program_of("l gpt", microbatches=2, batch=2)
    right = ["l.0 F0", "l.0 I0", "l.0 W0", "l.0 F1", "l.0 I1", "l.0 W1"]
    assert () == verify(program, edited({}, 0, *right, "NORM", "UPDATE"))
    for wrong, fault in (
        (["l.0 F0", "l.0 W0", "l.0 I0", *right[3:]], "'l.0 W0' comes before 'l.0 I0', which it needs"),
        ([*right[:4], "l.0 W1", "l.0 I1"], "'l.0 W1' comes before 'l.0 I1', which it needs"),
        (["l.0 F0", "l.0 I0", *right[3:]], "'l.0 W0' is missing"),
        ([*right, "l.0 W0"], "'l.0 W0' is there 2 times"),
        ([*right[:3], "l.0 B0", *right[3:]], "'l.0 I0' has no place in this program"),
    ):
        assert f"rank 0: {fault}" in verify(program, edited({}, 0, *wrong, "NORM", "UPDATE"))


def test_a_stage_is_split_on_all_ranks_or_on_none() -> None:
    """Ranks that share a microbatch cannot do one half each with a whole: their collectives would not meet.

    Where some are split and some are not, those are wrong that are not as the order has them.
    """
    program = program_of("l gpt tp2", microbatches=1, batch=1)
    listing = listing_of(program)
    assert () == verify(program, halved(listing))
    faults = verify(program, {**listing, 1: halved(listing)[1]})
    assert "rank 1: 'l.0 I0' has no place in this program" in faults
    assert "rank 1: 'l.0 B0' is missing" in faults
    program = program_of("v vit > l; l gpt dp2", microbatches=1, batch=2, schedule="zb-h1")
    listing = listing_of(program)
    actions = [str(action) for action in listing[1] if str(action) != "l.0 W0"]
    actions[actions.index("l.0 I0")] = "l.0 B0"
    wrong = ("'l.0 B0' has no place in this program", "'l.0 I0' is missing", "'l.0 W0' is missing")
    assert tuple(f"rank 1: {fault}" for fault in wrong) == verify(program, edited(listing, 1, *actions))


def test_halves_of_a_backward_stand_where_data_and_sums_allow() -> None:
    """A gradient is sent on after the first half, and summed after the last second one."""
    program = program_of("v vit dp2 > l; l gpt", microbatches=1, batch=2)
    listing = halved(listing_of(program))
    actions = list(map(str, listing[2]))
    i, sent = actions.index("l.0 I0"), actions.index("l.0 SEND_B0 -> v.0")
    actions[i], actions[sent] = actions[sent], actions[i]
    (fault,) = verify(program, edited(listing, 2, *actions))
    assert "rank 2: 'l.0 SEND_B0 -> v.0' comes before 'l.0 I0', which it needs" == fault
    actions = [action for action in map(str, listing[0]) if action != "v.0 W0"]
    actions.insert(actions.index("v.0 REDUCE0") + 1, "v.0 W0")
    (fault,) = verify(program, edited(listing, 0, *actions))
    assert "rank 0: 'v.0 REDUCE0' comes before 'v.0 W0', which it needs" == fault


# -- what is in flight -------------------------------------------------------------------------------------


def test_no_more_in_flight_than_the_limit() -> None:
    """A forward too many is named with rank, stage, number and limit; an order with a higher limit allows it."""
    ahead = ["l.0 F0", "l.0 F1", "l.0 B0", "l.0 F2", "l.0 B1", "l.0 B2", "NORM", "UPDATE"]
    program = program_of("l gpt", microbatches=3, batch=3)
    (fault,) = verify(program, edited({}, 0, *ahead))
    assert "rank 0: 'l.0 F1' gives l.0 2 microbatches in flight; it may have 1" == fault
    program = program_of("l gpt", microbatches=3, batch=3, schedule="gpipe")
    assert () == verify(program, edited({}, 0, *ahead))
    assert {"l.0": 2} == {
        str(stage): most for stage, most in in_flight(program, edited({}, 0, *ahead)).items()
    }


def test_in_flight_until_the_gradient_of_the_weights() -> None:
    """The first half of a backward frees nothing."""
    program = program_of("l gpt", microbatches=2, batch=2)
    late = ["l.0 F0", "l.0 I0", "l.0 F1", "l.0 W0", "l.0 I1", "l.0 W1", "NORM", "UPDATE"]
    (fault,) = verify(program, edited({}, 0, *late))
    assert "rank 0: 'l.0 F1' gives l.0 2 microbatches in flight; it may have 1" == fault


@pytest.mark.parametrize("training", [True, False])
def test_outputs_that_wait_are_counted(training: bool) -> None:
    """A stage without backward holds an output until all of its sends have been waited for, also in evaluation."""
    text = "v vit frozen > l; l gpt"
    step = program_of(text, microbatches=4, batch=4).routes.step
    program = program_for(step, training=training)
    listing = listing_of(program)
    assert 1 <= in_flight(program)[Stage("v", 0)] <= program.order.max_in_flight[Stage("v", 0)] == 2
    first = "v.0 WAIT_SEND_F0 -> l.0"
    actions = [action for action in map(str, listing[0]) if action != first]
    actions.insert(actions.index("v.0 WAIT_SEND_F2 -> l.0"), first)
    forwards = [action for action in actions if " WAIT" not in action]
    waits = [action for action in actions if " WAIT" in action]
    end = len(forwards) - (2 if training else 0)
    (fault,) = verify(program, edited(listing, 0, *forwards[:end], *waits, *forwards[end:]))
    assert "rank 0: 'v.0 F2' gives v.0 3 outputs that wait to be read; it may have 2" == fault


# -- joint actions -----------------------------------------------------------------------------------------

SUMS = ["{1}.0 REDUCE0", "{0}.0 REDUCE0", "{0}.0 WAIT_REDUCE0", "{1}.0 WAIT_REDUCE0"]
BOTH = ["{0}.0 F0", "{1}.0 F0", "{1}.0 B0", "{0}.0 B0", *SUMS, "NORM", "UPDATE"]


def test_colocated_modules_in_different_order() -> None:
    """Two modules whose tp groups cross on the same ranks: one swap does not deadlock, a ring of swaps does."""
    program = program_of(
        "a gpt tp2 dp2 @0; b gpt tp2 dp2 order=dp,tp,cp,pp @0", microbatches=1, batch=2, schedule="gpipe"
    )
    listing: Listing = {}
    for rank in range(4):
        listing = edited(listing, rank, *(action.format("a", "b") for action in BOTH))
    assert () == verify(program, listing)
    swapped = [action.format("b", "a") for action in BOTH]
    assert (
        ()
        == verify(program, edited(listing, 1, *swapped))
        == verify_each(program, edited(listing, 1, *swapped))
    )
    (fault,) = verify(program, edited(edited(listing, 1, *swapped), 2, *swapped))
    assert (
        "deadlock: rank 0 stands before 'a.0 F0' and waits for rank 1; "
        "rank 1 stands before 'b.0 F0' and waits for rank 3; "
        "rank 3 stands before 'a.0 F0' and waits for rank 2; "
        "rank 2 stands before 'b.0 F0' and waits for rank 0"
    ) == fault


def test_overlapping_groups_in_a_ring() -> None:
    """Three modules on ranks that overlap in part, each rank beginning with another."""
    program = program_of("a gpt tp2 @0; b gpt tp2 @1; c gpt tp3 @0", microbatches=1, batch=1)

    def together(*orders: str) -> Listing:
        listing: Listing = {}
        for rank, order in enumerate(orders):
            done = [f"{name}.0 {kind}0" for name in order for kind in "FB"]
            listing = edited(listing, rank, *done, "NORM", "UPDATE")
        return listing

    assert () == verify(program, together("ac", "abc", "bc")) == verify(program, together("ca", "cba", "cb"))
    (fault,) = verify(program, together("ac", "bac", "cb"))
    assert (
        "deadlock: rank 0 stands before 'a.0 F0' and waits for rank 1; "
        "rank 1 stands before 'b.0 F0' and waits for rank 2; "
        "rank 2 stands before 'c.0 F0' and waits for rank 0, 1"
    ) == fault


def test_dp_ranks_that_share_experts_compute_together() -> None:
    """Where experts lie over two dp ranks, the dp ranks must take microbatches in one order; else they need not."""
    turned = ["l.0 F1", "l.0 F0", "l.0 B0", "l.0 B1", "NORM", "UPDATE"]
    for experts, faults in (("ep2 x2", 1), ("", 0)):
        program = program_of(f"l gpt dp2 {experts}", microbatches=2, batch=4, schedule="gpipe")
        ends = [str(action) for action in listing_of(program)[1] if "REDUCE" in str(action)]
        listing = edited(listing_of(program), 1, *turned[:4], *ends, *turned[4:])
        found = verify(program, listing)
        assert faults == len(found)
        if found:
            assert (
                "deadlock: rank 0 stands before 'l.0 F0' and waits for rank 1; "
                "rank 1 stands before 'l.0 F1' and waits for rank 0"
            ) == found[0]


# -- one queue per pair ------------------------------------------------------------------------------------


def test_a_queue_of_both_directions_is_jammed() -> None:
    """A receive posted before the send that it answers blocks it, where the two share a queue."""
    program = program_of("vision vit > language; language gpt", microbatches=1, batch=1)
    listing = listing_of(program)
    assert () == verify(program)
    (fault,) = verify(program, strict=True)
    assert (
        "deadlock with one queue per pair of ranks: rank 1 stands before 'language.0 WAIT_RECV_F0 <- vision.0'; "
        "in its queue with rank 0 'language.0 RECV_F0 <- vision.0' is next here and "
        "'vision.0 RECV_B0 <- language.0' is next there, and each waits for what comes behind the other"
    ) == fault
    early = "vision.0 RECV_B0 <- language.0"
    actions = [action for action in map(str, listing[0]) if action != early]
    actions.insert(actions.index("vision.0 SEND_F0 -> language.0") + 1, early)
    assert () == verify(program, edited(listing, 0, *actions), strict=True)


def test_what_stays_on_a_rank_is_in_no_queue() -> None:
    """Modules on one rank exchange data in memory, and ranks that only send need one queue."""
    assert () == verify(program_of("vision vit > language; language gpt @0"), strict=True)
    assert () == verify(program_of("vision vit dp2 frozen > language; language gpt", ROWS), strict=True)


def test_a_strict_replay_finds_every_deadlock() -> None:
    """What deadlocks with a channel for each direction also deadlocks with one queue."""
    program = program_of("l gpt tp2", microbatches=2, batch=2, schedule="gpipe")
    listing = edited(listing_of(program), 1, "l.0 F1", "l.0 F0", "l.0 B0", "l.0 B1", "NORM", "UPDATE")
    assert verify(program, listing) == verify(program, listing, strict=True) != ()


def test_replay_starts_everything_once() -> None:
    """The replay of a sound listing starts every action of every rank once, in its order."""
    program = program_of(CASES["unequal encoders"])
    listing = listing_of(program)
    walk = replay(program, listing)
    assert () == walk.blocked
    for rank, actions in listing.items():
        assert actions == tuple(action for r, action in walk.started if r == rank)


def test_evaluation_is_sound() -> None:
    """Programs without training have no NORM; they end with the last wait."""
    for text in (
        "vision vit dp3 > language; language gpt dp2 pp2",
        CASES["generator"],
        CASES["partial overlap"],
    ):
        step = program_of(text, ROWS, batch=24).routes.step
        program = program_for(step, training=False)
        assert () == verify(program)
        assert not any(str(a) == "NORM" for actions in listing_of(program).values() for a in actions)
