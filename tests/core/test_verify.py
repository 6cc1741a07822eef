"""Verify: sound programs pass, broken ones do not, and what passes can be run to its end."""

import collections
import re
from collections.abc import Iterator, Mapping

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cases import CASES
from jobs import edited, program_of
from mimogrid.core.schedule.actions import (
    Action,
    Compute,
    Direction,
    Kind,
    Recv,
    Send,
    Transfer,
    Wait,
    other_end,
)
from mimogrid.core.schedule.lower import Program, link_of
from mimogrid.core.schedule.program import Listing, from_text
from mimogrid.core.schedule.replay import replay
from mimogrid.core.verify import listing_of, verify, verify_each


ROWS = {"vision": (4, 3, 0, 0, 1), "image": (0, 2, 1), "audio": (1, 0, 0, 3), "a": (2, 0), "b": (0, 0, 5)}
SMALL = {
    "chain": ("vision vit > language; language gpt pp2", {}),
    "fan-in, ragged": ("vision vit dp2 > language; language gpt", ROWS),
    "fan-out, ragged": ("vision vit > language; language gpt dp2", ROWS),
    "tp": ("vision vit tp2 > language; language gpt tp2 tied pp2", {}),
    "skip edge": (CASES["skip edge"], {}),
    "frozen": ("vision vit frozen > language; language gpt", {}),
    "shared rank": ("vision vit dp2 > language; language gpt @0", ROWS),
    "other microbatches": ("vision vit m2 > language; language gpt m4 pp2", ROWS),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_every_case_is_sound(case: str, schedule: str) -> None:
    """Every known layout, those that hang or fail elsewhere among them, makes a sound program."""
    for rows in ({}, ROWS):
        assert () == verify(program_of(CASES[case], rows, batch=48, microbatches=4, schedule=schedule))


@pytest.mark.parametrize("counts", [(4, 3, 4, 3), (2, 0, 2, 0), (0, 0, 0, 0), (0, 1, 1, 1)])
@pytest.mark.parametrize("case", ["dp2 1", "dp4 1", "1 dp2", "dp3 dp2", "colocated tp2dp4 tp4dp2"])
def test_ragged_and_absent_rows(case: str, counts: tuple[int, ...]) -> None:
    """Fan-in and fan-out are sound with ragged rows, with images on half the samples, and with none at all."""
    assert () == verify(program_of(CASES[case], {"vision": counts}, batch=48))


def test_counts_that_do_not_divide() -> None:
    """Three microbatches against two: a lane's part of a message may be made before other lanes' parts.

    Here lane 1 makes all it has of a's first microbatch before it makes b's second, which the receiver, who waits
    for lane 0, posts the other way round.
    """
    for feeds in ("a, b", "b, a"):
        text = f"vision vit dp2 m3 @0 > {feeds}; a regressor m2 @2; b regressor m3 @2"
        assert () == verify(program_of(text, batch=12, microbatches=6))


@pytest.mark.parametrize("stages", [2, 7, 16])
@pytest.mark.parametrize("microbatches", [1, 5, 64])
def test_long_chains(stages: int, microbatches: int) -> None:
    """Chains of up to 16 stages and 64 microbatches are sound."""
    text = f"v vit pp2 > l; l gpt pp{stages}"
    for schedule in ("1f1b", "gpipe"):
        program = program_of(text, batch=microbatches, microbatches=microbatches, schedule=schedule)
        assert () == verify(program)


@st.composite
def worlds(draw: st.DrawFn) -> str:
    """Any graph of up to four modules on up to nine ranks each, overlapping as it comes."""
    graph = draw(
        st.sampled_from(
            [
                "a vit {} > c; c gpt {}",
                "a vit {} > c; b vit {} > c; c gpt {}",
                "a vit {} > b, c; b block {} > c; c gpt {}",
                "a vit {} > c; c gpt {} > d; d regressor {}",
                "a vit {} > c, d; b block {} > d; c gpt {}; d regressor {}",
            ]
        )
    )
    grids = [
        "tp{} dp{} pp{} @{} {} {}".format(
            draw(st.sampled_from((1, 1, 2, 3))),
            draw(st.sampled_from((1, 2, 3))),
            draw(st.sampled_from((1, 1, 2))),
            draw(st.integers(0, 6)),
            draw(st.sampled_from(("", "", "m2", "m8"))),
            draw(st.sampled_from(("", "", "frozen"))),
        )
        for _ in range(graph.count("{}"))
    ]
    return graph.format(*grids)


@settings(max_examples=50, deadline=None)
@given(
    worlds(),
    st.sampled_from(["1f1b", "gpipe"]),
    st.lists(st.sampled_from((0, 1, 4)), min_size=1, max_size=24),
)
def test_any_world_is_sound(text: str, schedule: str, rows: list[int]) -> None:
    """Any graph on any overlapping grids with any microbatches and rows makes a sound program; both ways agree."""
    program = program_of(text, {"a": rows, "b": rows[::-1]}, batch=24, schedule=schedule)
    assert () == verify(program) == verify_each(program)


@settings(max_examples=30, deadline=None)
@given(worlds(), st.data())
def test_both_ways_agree_on_broken_lowering(text: str, data: st.DataObject) -> None:
    """Break every rank of a stage in the same way, as wrong lowering would: folded and unfolded say the same."""
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


def broken(listing: Listing, how: str, rank: int, i: int, j: int) -> Listing:
    """Return a listing with one thing wrong at one rank; numbers count around."""
    rank = sorted(listing)[rank % len(listing)]
    actions = list(listing[rank])
    i, j = i % len(actions), j % len(actions)
    match how:
        case "remove":
            del actions[i]
        case "double":
            actions.insert(j, actions[i])
        case "swap":
            actions[i], actions[j] = actions[j], actions[i]
        case "move":
            actions.insert(j, actions.pop(i))
        case _:
            every = [action for others in listing.values() for action in others]
            actions[i] = every[(7 * i + j) % len(every)]
    return {**listing, rank: tuple(actions)}


ANY = st.integers(0, 999)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(SMALL)),
    st.sampled_from(("remove", "double", "swap", "move", "change")),
    st.tuples(ANY, ANY, ANY),
    st.sampled_from((2, 4)),
)
def test_one_thing_wrong(case: str, how: str, where: tuple[int, int, int], microbatches: int) -> None:
    """A listing with an action removed, doubled, swapped, moved or changed is rejected, or it still does the step."""
    text, rows = SMALL[case]
    program = program_of(text, rows, microbatches=microbatches, batch=8)
    listing = listing_of(program)
    changed = broken(listing, how, *where)
    assume(changed != listing)
    faults = verify(program, changed)
    assert verify_each(program, changed) == faults
    same_work = all(collections.Counter(listing[r]) == collections.Counter(changed[r]) for r in listing)
    if not faults:
        assert same_work
        assert Oracle(program, changed).runs()
    elif same_work:
        assert not Oracle(program, changed).runs(), faults


class Oracle:
    """Another executor, as simple as can be: rank by rank, over and over, with first-in-first-out channels.

    A channel gives the n-th receive the n-th send. It fails where the two differ, where an action finds its data
    missing, or where nobody can go on.
    """

    def __init__(self, program: Program, listing: Listing) -> None:
        self.program = program
        self.listing = listing
        self.at = dict.fromkeys(listing, 0)
        self.done: dict[int, set[Action]] = {rank: set() for rank in listing}
        self.channels: Mapping[tuple[int, int], tuple[list[Transfer], list[Transfer]]] = (
            collections.defaultdict(lambda: ([], []))
        )

    def runs(self) -> bool:
        """Whether every rank gets to its end with the right data."""
        going = True
        while going:
            going = False
            for rank, actions in self.listing.items():
                while self.at[rank] < len(actions) and self.free(rank, actions[self.at[rank]]):
                    action = actions[self.at[rank]]
                    if not self.has_data(rank, action):
                        return False
                    self.post(rank, action)
                    self.done[rank].add(action)
                    self.at[rank] += 1
                    going = True
        through = all(self.at[rank] == len(actions) for rank, actions in self.listing.items())
        return through and all(sent == received for sent, received in self.channels.values())

    def free(self, rank: int, action: Action) -> bool:
        """Whether an action does not block any more."""
        if isinstance(action, Wait):
            return all(self.matched(*ends) for ends in self.ends(rank, action.transfer))
        if isinstance(action, Transfer):
            return True
        others = (r for r in self.program.joint(rank, action) if r != rank)
        return all(
            word(action) in map(word, (*self.done[r], *self.listing[r][self.at[r] :][:1])) for r in others
        )

    def post(self, rank: int, action: Action) -> None:
        """Put a send or a receive into its channels."""
        if isinstance(action, Transfer):
            for pair, sends, value in self.ends(rank, action):
                self.channels[pair][0 if sends else 1].append(value)

    def ends(self, rank: int, transfer: Transfer) -> Iterator[tuple[tuple[int, int], bool, Transfer]]:
        """Yield the channel, the side and the send of each message of a transfer."""
        sends = isinstance(transfer, Send)
        value = transfer if sends else other_end(transfer)
        for peer in self.program.peers_of(rank, transfer):
            yield (rank, peer) if sends else (peer, rank), sends, value

    def matched(self, pair: tuple[int, int], sends: bool, value: Transfer) -> bool:
        """Whether both ends of a message are posted, and at the same place of their channel."""
        sent, received = self.channels[pair]
        mine = sent if sends else received
        return value in mine and mine.index(value) < min(len(sent), len(received))

    def has_data(self, rank: int, action: Action) -> bool:
        """Whether what an action reads has been made or received on this rank."""
        return self.done[rank].issuperset(self.reads(rank, action))

    def reads(self, rank: int, action: Action) -> Iterator[Action]:
        """Yield what must be done on this rank before an action; `listing` has the same actions as it should."""
        own = self.listing[rank]
        match action:
            case Wait(transfer=transfer):
                yield transfer
            case Send(stage=stage, direction=direction, microbatch=k):
                kind = Kind.FORWARD if direction is Direction.FORWARD else Kind.BACKWARD
                for j in self.microbatches(rank, action) if action.at_source else (k,):
                    yield Compute(kind, stage, j)
            case Compute(kind=kind, stage=stage, microbatch=k):
                if kind is Kind.BACKWARD:
                    yield Compute(Kind.FORWARD, stage, k)
                for other in own:
                    if (
                        isinstance(other, Recv)
                        and other.stage == stage
                        and (other.direction.value == kind.value)
                    ):
                        made = self.microbatches(rank, other) if other.at_source else (other.microbatch,)
                        if k in made:
                            yield Wait(other)
            case Recv():
                pass
            case _:
                yield from (a for a in own if isinstance(a, Compute) and a.kind is Kind.BACKWARD)
                finish = list(self.program.finish(rank))
                yield from finish[: finish.index(action)]

    def microbatches(self, rank: int, transfer: Transfer) -> set[int]:
        """Return the microbatches of the link's source that a transfer has rows of."""
        link = link_of(self.program.topology, transfer)
        return {j for m in self.program.routes.sent_by(rank, link, transfer.microbatch) for j in m.made_by}


def word(action: Action) -> str:
    """Name a joint action as all its members know it: the two ends of a module have one tie."""
    return re.sub(r"\.\d+ TIE", " TIE", str(action))


def test_the_oracle_runs_sound_programs() -> None:
    """The tests' own executor gets through every small program."""
    for text, rows in SMALL.values():
        program = program_of(text, rows)
        assert Oracle(program, listing_of(program)).runs()


def test_a_deadlock_names_its_cycle() -> None:
    """Two ranks that each wait for what the other posts later are named with what they stand before."""
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
    order = [line for line in late if line != "language.0 REDUCE"]
    (fault,) = verify(program, edited(listing, 3, *order[:-1], "language.0 REDUCE", "NORM", *answer))
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


def test_faults_are_told_in_words() -> None:
    """What is missing, doubled, out of place or too early is named with its rank, rank by rank."""
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
    """A backward in two parts is accepted, in order, and its weight part may come later."""
    program = program_of("l gpt", microbatches=2, batch=2)
    for right in (
        ["l.0 F0", "l.0 I0", "l.0 F1", "l.0 I1", "l.0 W0", "l.0 W1"],
        ["l.0 F0", "l.0 I0", "l.0 W0", "l.0 F1", "l.0 B1"],
    ):
        assert () == verify(program, edited({}, 0, *right, "NORM", "UPDATE"))
    for wrong in (
        ["l.0 F0", "l.0 W0", "l.0 I0", "l.0 F1", "l.0 B1"],
        ["l.0 F0", "l.0 I0", "l.0 F1", "l.0 B1"],
        ["l.0 F0", "l.0 I0", "l.0 W0", "l.0 B0", "l.0 F1", "l.0 B1"],
    ):
        assert () != verify(program, edited({}, 0, *wrong, "NORM", "UPDATE"))


def test_replay_starts_everything_once() -> None:
    """A sound listing's replay starts every action of every rank, in its order."""
    program = program_of(CASES["unequal encoders"])
    listing = listing_of(program)
    walk = replay(program, listing)
    assert () == walk.blocked
    for rank, actions in listing.items():
        assert actions == tuple(action for r, action in walk.started if r == rank)


def test_evaluation_is_sound() -> None:
    """Programs without training pass, too, and end with the last wait."""
    from mimogrid.core.schedule.lower import plan_step  # noqa: PLC0415

    for text in (
        "vision vit dp3 > language; language gpt dp2 pp2",
        CASES["generator"],
        CASES["partial overlap"],
    ):
        step = program_of(text, ROWS, batch=24).routes.step
        program = plan_step(step, training=False)
        assert () == verify(program)
        assert not any(str(a) == "NORM" for actions in listing_of(program).values() for a in actions)
