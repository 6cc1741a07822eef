"""Lines: what a rule for orders comes to, team by team: sequences and credits.

A stage may have as many microbatches in flight as the stages that it feeds, and `lead` more: counted from the
loss on, over the deepest path, in samples where microbatches differ. So no stage waits for a backward that
the stages below could give only after more forwards than it will send them.

The ranks of a pipeline with several chunks go through groups of microbatches: all of a group on the first
chunk, then on the next one. Before the last chunk goes back on a microbatch, it must have gone forward on as
many more as the modules below may have in flight; that, counted in forwards of all chunks, is the credit of
the last rank, and each rank before it has two more.
"""

import math
from collections.abc import Iterator, Mapping

import attrs

from mimogrid.core.base.samples import overlapping
from mimogrid.core.schedule.actions import Kind
from mimogrid.core.schedule.scheduler import Line
from mimogrid.core.schedule.work import Team, Work
from mimogrid.core.topology.topology import Stage


@attrs.frozen
class Rule:
    """What makes an order.

    Attributes:
        all_forwards_first: no backward before the last forward.
        splits: backwards are split where they can be.
        lead: how many more microbatches than the next stage a stage may have in flight.
        extra: further forwards ahead, by the first stage of a team; the stages before it get as many more.
        limit: a stage has no more of the job's microbatches in flight, unless those that it feeds need more.
    """

    all_forwards_first: bool = False
    splits: bool = False
    lead: int = 1
    extra: Mapping[Stage, int] = attrs.field(factory=dict[Stage, int])
    limit: float = math.inf


RULES: Mapping[str, Rule] = {
    "1f1b": Rule(),
    "interleaved": Rule(),
    "zb-h1": Rule(splits=True),
    "zb-h2": Rule(splits=True, lead=2),
    "gpipe": Rule(all_forwards_first=True),
}
"""The orders that have names. Interleaved is 1F1B: what interleaves is that ranks have several chunks."""


@attrs.frozen
class Lines:
    """The line of every team, in order of the work's teams, and the queues of stages without backward.

    Attributes:
        teams: the lines.
        queues: how many microbatches such a stage may have waiting for those that read them.
    """

    teams: tuple[Line, ...]
    queues: Mapping[Stage, int]


def lines_of(work: Work, rule: Rule) -> Lines:
    """Return what a rule comes to for some work, module by module from the loss on."""
    credit: dict[Stage, int] = {}
    lines: dict[Team, Line] = {}
    for name in reversed(work.topology.graph.order):
        ahead = 0
        trained: list[Team] = []
        for team in reversed([team for team in work.teams if team[0].module == name]):
            line = Line(work.sequences[work.teams.index(team)])
            if line.sequences.backwards:
                ahead = _ahead(work, team, line, rule, credit=credit, behind=ahead)
                line = attrs.evolve(line, credit=math.inf if rule.all_forwards_first else ahead)
                credit |= _credits(work, team, line, ahead)
                trained.append(team)
            lines[team] = line
        for team in trained:
            lines[team] = attrs.evolve(lines[team], lag=max(0, ahead - lines[team].credit))
        for info in reversed(work.topology.modules[name].stages):
            if info.stage not in work.backward:
                credit[info.stage] = _below(work, info.stage, credit) + 1 + rule.extra.get(info.stage, 0)
    queues = {stage: most for stage, most in credit.items() if stage not in work.backward}
    return Lines(tuple(attrs.evolve(lines[t], room=_room(work, t, queues)) for t in work.teams), queues)


def _credits(work: Work, team: Team, line: Line, ahead: int) -> dict[Stage, int]:
    """Return how many microbatches each stage of a team has in flight before it gives anything back."""
    if len(team) == 1:
        return {team[0]: min(ahead, work.count(team[0])) if line.credit == ahead else work.count(team[0])}
    return work.in_flight(_strict(work, line))


def _ahead(
    work: Work, team: Team, line: Line, rule: Rule, *, credit: Mapping[Stage, int], behind: int
) -> int:
    """Return how many forwards a team may be ahead of its backwards, given the next team's number, if any.

    Ranks with chunks wait for each other both ways round. So there what comes on top is the same for all of
    them, and only the last one's counts.
    """
    first, interleaves = team[0], len(team) > 1
    if behind and interleaves:
        return behind + 2
    if behind:
        ahead = behind + rule.lead
    else:
        ahead = _turned_around(work, team, line, credit) + (rule.lead - 1 if credit else 0)
    ahead += rule.extra.get(first, 0)
    if interleaves or rule.limit == math.inf:
        return ahead
    topology = work.topology
    samples = rule.limit * topology.spec.batch.global_size // topology.spec.batch.microbatches
    least = max(1, _bound_to(work, first, credit))
    return max(least, min(ahead, int(samples // topology.samples_per_microbatch[first.module])))


def _turned_around(work: Work, team: Team, line: Line, credit: Mapping[Stage, int]) -> int:
    """Return how many forwards the last team of a module does before what they make comes back."""
    last = team[-1]
    below = _below(work, last, credit)
    forward = [i for i, action in enumerate(line.sequences.forwards) if work.actions[action].stage == last]
    backward = [i for i, action in enumerate(line.sequences.backwards) if work.actions[action].stage == last]
    furthest = len(forward) - 1
    return max(forward[min(j + below, furthest)] + 1 - i for j, i in enumerate(backward))


def _below(work: Work, stage: Stage, credit: Mapping[Stage, int]) -> int:
    """Return how many microbatches of a stage cover what the stages that it feeds may have in flight."""
    size = work.topology.samples_per_microbatch
    needs = (
        math.ceil(credit[link.target] * size[link.target.module] / size[stage.module])
        for link in work.topology.links_from(stage)
    )
    return max(needs, default=0)


def _bound_to(work: Work, stage: Stage, credit: Mapping[Stage, int]) -> int:
    """Return with how many microbatches in flight a stage gets all its gradients back; with fewer it is stuck.

    A stage that it feeds gives the last gradient of a microbatch back only when it is `credit` forwards further. What
    these read may lie in one microbatch more than would hold as many samples: the window need not begin where one does.
    """
    least = 0
    for link in work.topology.links_from(stage):
        own, theirs = work.count(stage), work.count(link.target)
        for k in range(own):
            last = overlapping(k, own, theirs)[-1]
            furthest = min(last + credit[link.target], theirs) - 1
            least = max(least, overlapping(furthest, theirs, own)[-1] + 1 - k)
    return least


def _strict(work: Work, line: Line) -> Iterator[int]:
    """Yield forwards until the credit is used up, then a backward, each with its weights, before every other."""
    forwards, backwards, ahead = list(line.sequences.forwards)[::-1], list(line.sequences.backwards)[::-1], 0
    while forwards or backwards:
        goes_on = bool(forwards) and (ahead < line.credit or not backwards)
        action = (forwards if goes_on else backwards).pop()
        yield action
        stage = work.actions[action].stage
        if not goes_on and stage in work.split:
            yield work.number(Kind.WEIGHT_GRADIENT, stage, work.actions[action].microbatch)
        ahead += stage in work.backward if goes_on else -1


def _room(work: Work, team: Team, queues: Mapping[Stage, int]) -> Mapping[int, tuple[int, ...]]:
    """Return, per forward of the stages with a queue, the forwards that must have read earlier outputs."""
    return {
        work.number(Kind.FORWARD, stage, k): tuple(work.read_by(stage, k - queues[stage]))
        for stage in team
        if stage in queues
        for k in range(queues[stage], work.count(stage))
    }
