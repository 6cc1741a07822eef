"""A histogram counts every number once, in few bins of equal width."""

from hypothesis import given
from hypothesis import strategies as st

from mimogrid.core.data.histogram import BINS_MOST, histogram, operations
from mimogrid.core.draw.histograms import histogram_text, histograms_svg


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=60))
def test_every_number_is_in_the_bin_that_has_it(values: list[int]) -> None:
    """And quantiles are numbers of the list, in order."""
    found = histogram("n", values)
    assert len(found.counts) <= BINS_MOST
    for index, count in enumerate(found.counts):
        least, most = found.bounds(index)
        assert count == sum(least <= value <= most for value in values)
    assert sum(found.counts) == len(values)
    assert list(found.quantiles) == sorted(found.quantiles)
    assert (found.quantiles[0], found.quantiles[3]) == (min(values), max(values))
    assert sum(value <= found.quantiles[2] for value in values) >= 0.95 * len(values)


def test_the_longest_bar_is_the_fullest_bin() -> None:
    """As text and as SVG; an empty bin has no bar, and a bin with one number has one."""
    found = histogram("n", [0, *[7] * 400])
    bars = [line.count("█") for line in histogram_text(found)][1:]
    assert bars == [1, 0, 0, 0, 0, 0, 0, 40]
    page = histograms_svg("numbers", [found, found])
    assert page.count("<title>7: 400</title>") == 2


def test_bins_with_long_names_are_named_by_their_first_number() -> None:
    """Names that would overlap in the picture are cut; the text has them whole."""
    short, long = (histogram("n", [start, start + 70]) for start in (0, 10_000_000))
    assert ">0-4<" in histograms_svg("n", [short])
    assert ">10,000,000<" in histograms_svg("n", [long])
    assert "10,000,000-10,000,004" in "".join(histogram_text(long))


def test_operations_have_a_unit_that_tells_them_apart() -> None:
    """The largest has three digits or more, and rounding hides less than a percent of it."""
    assert operations("x", [3.0, 99_000.0]).name == "FLOPs of x"
    found = operations("x", [2e12, 3.126e14])
    assert (found.name, found.quantiles) == ("TFLOPs of x", (2, 2, 313, 313))
