"""Laws of the synthetic source: it says what it gives, and gives the same to everyone."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimogrid.core.base.samples import Sample
from mimogrid.core.job.graph import ModuleGraph
from mimogrid.core.job.models import Block, Gpt, Regressor, Vit
from mimogrid.core.job.spec import SourceFacts
from mimogrid.shell.job.sources.synthetic import synthetic


SMALL = {"layers": 1, "hidden": 8, "heads": 2}
MODELS = {
    "vision": Vit(**SMALL),
    "audio": Vit(**SMALL, features=5),
    "fusion": Block(**SMALL),
    "language": Gpt(**SMALL, vocab=11),
    "depth": Regressor(**SMALL, outputs=3),
}
GRAPH = ModuleGraph.of(
    {
        "vision": ("vit", ("fusion", "language")),
        "audio": ("vit", ("fusion",)),
        "fusion": ("block", ("language",)),
        "language": ("gpt", ("depth",)),
        "depth": ("regressor", ()),
    }
)
OPTIONS = {"sequence": 64, "rows": {"vision": [2, 6]}, "absent": {"vision": 0.3}}


def opened(options=OPTIONS, seed=0, graph=GRAPH, models=MODELS):
    """The source, the facts and the problems for some options."""
    return synthetic(graph=graph, models=models, seed=seed, options=options)


def problems(**options):
    """What is wrong with options that must be refused: {where: problem}."""
    source, facts, found = opened(options)
    assert (None, SourceFacts()) == (source, facts)
    return {problem.where: problem for problem in found}


def test_facts_have_the_widths_and_the_most_rows():
    """Widths come from the options, else from the model; rows and text are the most of their ranges."""
    options = OPTIONS | {"features": 7, "text": [3, 9]}
    expected = SourceFacts(
        sequence=64, features={"vision": 7, "audio": 5}, rows={"vision": 6, "audio": 6}, length=9
    )
    assert expected == opened(options)[1]
    assert {"vision": 7, "audio": 16} == opened({"features": {"vision": 7, "audio": 16}})[1].features


def test_a_source_that_is_no_vit_reads_rows_of_its_own_width():
    """Blocks and regressors read rows as wide as they are."""
    models = {"encoder": Block(**SMALL), "head": Regressor(**SMALL)}
    graph = ModuleGraph.of({"encoder": ("block", ("head",)), "head": ("regressor", ())})
    source, facts, _ = opened({"features": 99}, graph=graph, models=models)
    assert {"encoder": 8} == facts.features
    assert (None, 0) == (facts.sequence, source.describe(0).length)


def test_the_default_text_fits_beside_the_longest_rows():
    """Where rows leave little room, there is less text, but never none."""
    assert 8 == opened({"sequence": 64})[1].length
    assert 64 - 60 == opened({"sequence": 64, "rows": {"vision": [1, 25], "audio": [1, 10]}})[1].length
    assert 1 == opened({"sequence": 3})[1].length


@given(sample_id=st.integers(0, 2**40), seed=st.integers(0, 2**40))
def test_counts_stay_within_their_ranges(sample_id, seed):
    """Rows are in the range that is given or 2 to 6, or none where absence is possible; text is 4 to 8."""
    sample = opened(seed=seed)[0].describe(sample_id)
    assert sample.rows["vision"] in {0, 2, 3, 4, 5, 6}
    assert 2 <= sample.rows["audio"] <= 6
    assert 4 <= sample.length <= 8


def test_absence_is_as_frequent_as_asked():
    """Chance 0 is never, 1 is always, and 0.3 is about three in ten."""
    source = opened({"absent": {"vision": 0.3, "audio": 1}})[0]
    samples = [source.describe(i) for i in range(2000)]
    assert math.isclose(0.3, sum(s.rows["vision"] == 0 for s in samples) / 2000, abs_tol=0.03)
    assert {0} == {sample.rows["audio"] for sample in samples}
    assert 0 < min(opened({})[0].describe(i).rows["vision"] for i in range(200))


def test_both_ends_of_a_range_occur():
    """A range includes its ends, and may be one number."""
    source = opened({"rows": {"vision": [0, 2], "audio": [4, 4]}})[0]
    assert {0, 1, 2} == {source.describe(i).rows["vision"] for i in range(100)}
    assert {4} == {source.describe(i).rows["audio"] for i in range(100)}


@pytest.mark.parametrize(
    ("options", "where", "words"),
    [
        ({"rows": {"vison": [1, 2]}}, "data.options.rows.vison", "Did you mean 'vision'?"),
        ({"rows": {"fusion": [1, 2]}}, "data.options.rows.fusion", "is fed by vision, audio"),
        ({"absent": {"language": 0.1}}, "data.options.absent.language", "is a language model"),
        ({"features": {"x": 1}}, "data.options.features.x", "no module is called 'x'"),
        ({"rows": {"vision": [6, 2]}}, "data.options.rows.vision", "6 is more than 2"),
        ({"rows": {"vision": [-1, 2]}}, "data.options.rows.vision", "[-1, 2], from a negative"),
        ({"rows": {"vision": [1]}}, "data.options.rows.vision", "expected 2 integers"),
        ({"rows": {"vision": 4}}, "data.options.rows.vision", "expected a list of integers"),
        ({"text": [8, 4]}, "data.options.text", "8 is more than 4"),
        ({"absent": {"vision": 1.5}}, "data.options.absent.vision", "is 1.5, no chance"),
        ({"absent": {"vision": math.nan}}, "data.options.absent.vision", "is nan, no chance"),
        ({"features": 0}, "data.options.features", "is 0."),
        ({"features": {"vision": -3}}, "data.options.features.vision", "is -3."),
        ({"sequence": 0}, "data.options.sequence", "is 0."),
        ({"sequnce": 3}, "data.options.sequnce", "Did you mean 'sequence'?"),
    ],
)
def test_wrong_options_are_problems_with_their_numbers(options, where, words):
    """Each mistake is one problem with its place."""
    found = problems(**options)
    assert [where] == list(found)
    assert words in str(found[where])


def test_wrong_options_are_reported_together():
    """Several mistakes come at once."""
    assert 3 == len(problems(rows={"vision": [6, 2]}, absent={"x": 0.5}, sequence=-1))


# -- tensors -----------------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    """Torch, imported only here: descriptions are tested without it."""
    return pytest.importorskip("torch")


def test_tensors_hold_what_the_description_counts(torch):
    """Rows, text and targets are as many as the graph makes of a sample's counts."""
    source = opened()[0]
    for i in range(30):
        sample = source.describe(i)
        emitted = GRAPH.rows_out(sample)
        vision = source.load(i, "vision")["rows"]
        assert ((sample.rows["vision"], 16), torch.float32) == (vision.shape, vision.dtype)
        assert (sample.rows["audio"], 5) == source.load(i, "audio")["rows"].shape
        assert {} == source.load(i, "fusion")
        text = source.load(i, "language")
        placeholders = emitted["vision"] + emitted["fusion"]
        for field in ("tokens", "labels", "loss_weights"):
            assert (placeholders + sample.length,) == text[field].shape
        assert [-1] * placeholders == text["tokens"][:placeholders].tolist()
        assert 0 <= text["tokens"][placeholders:].min()
        assert 11 > max(text["tokens"].max(), text["labels"].max())
        weights = [0.0] * placeholders + [1.0] * sample.length
        assert weights == text["loss_weights"].tolist()
        assert (emitted["language"], 3) == source.load(i, "depth")["targets"].shape


def test_a_lone_regressor_gets_rows_and_targets(torch):
    """A regressor that nothing feeds reads rows and is told its targets."""
    graph = ModuleGraph.of({"depth": ("regressor", ())})
    source = opened({"rows": {"depth": [4, 4]}}, graph=graph, models=MODELS)[0]
    shapes = {key: tuple(value.shape) for key, value in source.load(0, "depth").items()}
    assert {"rows": (4, 8), "targets": (4, 3)} == shapes


def test_the_same_sample_is_the_same_for_everyone(torch):
    """Tensors hang on (seed, id, module, field) alone: not on the order of calls or global random state."""
    one, other = opened(seed=5)[0], opened(seed=5)[0]
    other.load(8, "vision")
    torch.manual_seed(1)
    for module in ("vision", "audio", "language", "depth"):
        again = other.load(3, module)
        for key, tensor in one.load(3, module).items():
            assert torch.equal(tensor, again[key])


def test_samples_modules_seeds_and_fields_differ(torch):
    """No two of them share their numbers."""
    options = {"rows": {"vision": [4, 4], "audio": [4, 4]}, "features": {"vision": 5}}
    one, other = opened(options)[0], opened(options, seed=1)[0]
    rows = [one.load(0, "vision"), one.load(1, "vision"), one.load(0, "audio"), other.load(0, "vision")]
    assert 4 == len({tuple(tensors["rows"].flatten().tolist()) for tensors in rows})
    text = one.load(0, "language")
    assert not torch.equal(text["tokens"], text["labels"])


def test_rows_are_standard_normal(torch):
    """Mean 0 and deviation 1, up to chance."""
    source = opened({"rows": {"vision": [500, 500]}, "sequence": 2000})[0]
    rows = source.load(0, "vision")["rows"]
    assert math.isclose(0, rows.mean(), abs_tol=0.05)
    assert math.isclose(1, rows.std(), abs_tol=0.05)


def test_a_sample_without_a_modality_has_no_rows(torch):
    """Absence is a tensor of no rows, not a missing one."""
    source = opened({"absent": {"vision": 1.0}})[0]
    assert (0, 16) == source.load(0, "vision")["rows"].shape
    assert Sample(0, 0, {"vision": 0, "audio": 0}).rows["vision"] == source.describe(0).rows["vision"]


TOWER = Vit(**SMALL, features=12, merge=2, positions="rotary_2d")
SEEING = ModuleGraph.of(
    {"vision": ("vit", ("language",)), "language": ("gpt", ())}, {"vision": TOWER.emission}
)


def images(**options):
    """The source of a tower of images and a language model."""
    models = {"vision": TOWER, "language": MODELS["language"]}
    return opened(options, graph=SEEING, models=models)


def test_a_tower_of_images_reads_segments():
    """Each has one of the grids, as many as the range says, and what is loaded are their rows."""
    grids = {"vision": [[1, 2, 4], [2, 2, 2]]}
    source, facts, found = images(
        grids=grids, segments={"vision": [0, 3]}, absent={"vision": 0.2}, sequence=40
    )
    assert () == found
    assert ({"vision": 24}, {"vision": ((1, 2, 4),) * 3}) == (facts.rows, facts.segments)
    drawn = [source.describe(i) for i in range(60)]
    assert {0, 1, 2, 3} == {len(sample.segments["vision"]) for sample in drawn}
    assert {(1, 2, 4), (2, 2, 2)} == {grid for sample in drawn for grid in sample.segments["vision"]}
    for sample in drawn[:9]:
        assert (sample.rows["vision"], 12) == source.load(sample.id, "vision")["rows"].shape
        assert sample.rows["vision"] == 8 * len(sample.segments["vision"])
        assert len(source.load(sample.id, "language")["tokens"]) == sample.rows["vision"] // 4 + sample.length


def test_grids_that_no_tower_reads_are_refused():
    """Sides that do not divide, grids of two sizes, and rows beside segments."""
    assert "cannot be merged 2 by 2" in images(grids={"vision": [[1, 3, 4]]})[2][0].message
    assert "data.options.grids.vision" == images(grids={"vision": [[3, 4]]})[2][0].where
    both = images(grids={"vision": [[1, 2, 2]]}, rows={"vision": [1, 2]})[2]
    assert "has both rows and segments" in both[0].message
