import attrs


@attrs.frozen
class Event:
    rank: int
    action: object
    begin_s: float
    end_s: float


def perfetto(events, *, names):
    return {}
