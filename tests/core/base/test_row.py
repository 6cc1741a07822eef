"""A row holds every position once, ranks have equal parts of it, and a query sees its own segment only."""

from hypothesis import given
from hypothesis import strategies as st

from mimogrid.core.base.row import pairs, pieces, row_length, runs
from mimogrid.core.base.zigzag import ZigZag


LENGTHS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 40)), max_size=12).map(tuple)
SIZES = st.integers(1, 4)


def present(lengths):
    """The lengths that are not zero."""
    return tuple(length for length in lengths if length)


def seen(found, lengths):
    """Yield (query, key) of every pair that some runs make, as positions of the row."""
    for run in found:
        for start in range(run.start, run.stop, run.length):
            assert start + run.length in {sum(lengths[: i + 1]) for i in range(len(lengths))}
            for query in run.queries:
                for key in run.keys:
                    yield start + query, start + key


@given(LENGTHS, SIZES)
def test_ranks_have_every_position_once_and_equally_many(lengths, size):
    """The parts partition the row; they differ by one position, and the largest is the row of each rank."""
    parts = [
        [p for ranges in pieces(lengths, ZigZag(rank, size)) for piece in ranges for p in piece]
        for rank in range(size)
    ]
    assert list(range(sum(lengths))) == sorted(p for part in parts for p in part)
    counts = [len(part) for part in parts]
    assert max(counts) - min(counts) <= 1
    if any(lengths):
        assert max(counts) == row_length(sum(lengths), parts=size, multiple=1)


@given(st.integers(1, 30), st.integers(1, 4))
def test_segments_that_divide_are_cut_as_one_sequence_is(count, size):
    """Each segment alone is in zig-zag, and all of them are one run for each chunk."""
    length = 2 * size * 3 if size > 1 else 5
    for rank in range(size):
        cut = ZigZag(rank, size)
        mine = sorted(p for ranges in pieces((length,) * count, cut) for piece in ranges for p in piece)
        expected = [i * length + p for i in range(count) for p in cut.positions(length)]
        assert expected == mine
        found = runs(pieces((length,) * count, cut), (length,) * count, causal=True)
        assert [1] * len(cut.chunks) == [len(of_chunk) for of_chunk in found]


@given(LENGTHS, SIZES, st.booleans(), st.sampled_from([0, 1, 2, 7]))
def test_a_query_sees_its_segment(lengths, size, causal, window):
    """Over all ranks every pair is there once: of a segment, and causally, the keys up to the query in its window."""
    lengths = present(lengths)
    of = [s for s, length in enumerate(lengths) for _ in range(length)]
    expected = {
        (q, k)
        for q in range(len(of))
        for k in range(len(of))
        if of[q] == of[k] and (not causal or k <= q) and (not causal or not window or k > q - window)
    }
    found = []
    for rank in range(size):
        cut = ZigZag(rank, size)
        every = runs(pieces(lengths, cut), lengths, causal=causal, window=window if causal else 0)
        local = [p for ranges in pieces(lengths, cut) for piece in ranges for p in piece]
        asking = [
            start + q
            for run in sum(every, ())
            for start in range(run.start, run.stop, run.length)
            for q in run.queries
        ]
        assert local == asking
        found += [
            (q, k)
            for q, k in seen(sum(every, ()), lengths)
            if not causal or (k <= q and (not window or k > q - window))
        ]
    assert sorted(expected) == sorted(found)
    if not window:
        assert pairs(lengths, causal=causal) == len(found)


@given(LENGTHS, st.integers(1, 3))
def test_finer_segments_divide_the_same_row(lengths, size):
    """A layer with windows computes the same positions, within its own segments."""
    lengths = present(lengths)
    finer = present(part for length in lengths for part in (length // 2, length - length // 2))
    for rank in range(size):
        of = pieces(lengths, ZigZag(rank, size))
        for found in runs(of, finer, causal=False):
            assert all(range(run.length) == run.keys for run in found)
        asking = [
            start + q
            for run in sum(runs(of, finer, causal=False), ())
            for start in range(run.start, run.stop, run.length)
            for q in run.queries
        ]
        assert asking == [p for ranges in of for piece in ranges for p in piece]
