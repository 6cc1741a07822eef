"""Job files: read strictly, with every mistake named; written so that they read back equal."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimogrid.core.base.errors import PlanError
from mimogrid.core.job.models import Block, Gpt, Regressor, Vit
from mimogrid.core.job.spec import (
    BatchLayoutSpec,
    BatchSpec,
    DataSpec,
    GridSpec,
    GroupSpec,
    JobSpec,
    LayoutSpec,
    LossScaleSpec,
    ModuleLayoutSpec,
    ModuleSpec,
    OptimizerLayoutSpec,
    OptimizerSpec,
    ProfileSpec,
    ScheduleLayoutSpec,
    ScheduleSpec,
    SkipSpec,
    TrainSpec,
)
from mimogrid.shell.job import jobfile


JOB = """
[modules.vision]
model = "vit"
feeds = ["language"]
grid = { dp = 2 }
options = { layers = 2, hidden = 64, heads = 4 }

[modules.language]
model = "gpt"
options = { layers = 4, hidden = 64, heads = 4, vocab = 64 }

[data]
source = "digits"

[batch]
global_size = 64
microbatches = 8
"""


@pytest.fixture
def job(tmp_path):
    """A function that writes a job file and returns its path."""

    def write(text):
        path = tmp_path / "job.toml"
        path.write_text(text)
        return path

    return write


def problems(path, overrides=()):
    """What is wrong with a job file: {where: problem}."""
    with pytest.raises(PlanError) as caught:
        jobfile.load(path, overrides)
    return {problem.where: problem for problem in caught.value.problems}


def test_a_job_file_is_read_as_written(job):
    """Keys become fields, lists tuples, options the options of the named model; the rest has defaults."""
    spec = jobfile.load(job(JOB))
    assert spec == JobSpec(
        modules={
            "vision": ModuleSpec(
                model="vit",
                feeds=("language",),
                grid=GridSpec(dp=2),
                options=Vit(layers=2, hidden=64, heads=4),
            ),
            "language": ModuleSpec(model="gpt", options=Gpt(layers=4, hidden=64, heads=4, vocab=64)),
        },
        data=DataSpec(source="digits"),
        batch=BatchSpec(global_size=64, microbatches=8),
    )


def test_modules_keep_the_order_of_the_file(job):
    """The order of modules is that of the file, also of those that overrides add."""
    swapped = JOB.replace("modules.vision", "modules.zebra")
    options = "{ layers = 1, hidden = 64, heads = 4, vocab = 4 }"
    more = ['modules.apple.model="gpt"', f"modules.apple.options={options}"]
    assert ["zebra", "language", "apple"] == list(jobfile.load(job(swapped), more).modules)


def test_an_integer_serves_as_a_number_and_true_as_no_integer(job):
    """Integers are accepted for floats; booleans are no integers, and floats neither."""
    path = job(JOB)
    assert 1.0 == jobfile.load(path, ["optimizer.lr=1"]).optimizer.lr
    assert isinstance(jobfile.load(path, ["optimizer.lr=1"]).optimizer.lr, float)
    found = problems(path, ["train.steps=true", "seed=2.0"])
    assert {"train.steps", "seed"} == set(found)
    assert "is true, a boolean; expected an integer." in found["train.steps"].message
    assert "Write 2." == found["seed"].remedy


def test_an_own_model_keeps_its_options_as_a_mapping(job):
    """Options of ``package.module:function`` are for its builder and are not judged here."""
    text = JOB.replace('model = "vit"', 'model = "zoo.eyes:build"')
    options = jobfile.load(job(text)).modules["vision"].options
    assert {"layers": 2, "hidden": 64, "heads": 4} == options


@pytest.mark.parametrize(
    ("override", "where", "remedy"),
    [
        ("modules.vision.grid.ttp=2", "modules.vision.grid.ttp", "Did you mean 'tp'?"),
        ("modules.vision.options.hiden=2", "modules.vision.options.hiden", "Did you mean 'hidden'?"),
        ("modules.vision.options.vocab=2", "modules.vision.options.vocab", "Known: activation, aux_loss,"),
        ("modules.vision.tp=2", "modules.vision.tp", "'tp' belongs in modules.vision.grid."),
        ("modules.vision.layers=2", "modules.vision.layers", "belongs in modules.vision.options."),
        ("modules.vision.feed=2", "modules.vision.feed", "Did you mean 'feeds'?"),
        ("batch.global=2", "batch.global", "Did you mean 'global_size'?"),
        ("steps=2", "steps", "'steps' belongs in [train]."),
        ("optimizer.seed=1", "optimizer.seed", "'seed' belongs in the top of the file."),
        ("modules.vision.model=vitt", "modules.vision.model", "Did you mean 'vit'?"),
        ("modules.vision.model=a.b:", "modules.vision.model", "Name a module of Python"),
        ("modules.vision.feeds=language", "modules.vision.feeds", 'Write ["language"].'),
        ("modules.vision.feeds=[1]", "modules.vision.feeds[0]", 'Write it in quotes: "1".'),
        ("modules.vision.grid=2", "modules.vision.grid", "Use a table"),
        ("modules.vision.options=2", "modules.vision.options", "Use a table"),
        ("modules.vision.frozen=1", "modules.vision.frozen", "Use true or false or a list of strings."),
        ('modules.vision.grid.tp="2"', "modules.vision.grid.tp", "Write 2 without quotes."),
        ("optimizer.betas=[0.9]", "optimizer.betas", "Give 2 of them."),
    ],
)
def test_a_mistake_names_its_place_and_the_way_out(job, override, where, remedy):
    """One mistake is one problem: its dotted place, the override that it comes from, and a remedy."""
    found = problems(job(JOB), [override])
    assert [where] == list(found)
    assert remedy in found[where].remedy
    assert f"(Given by --set {override}.)" in found[where].message


def test_all_mistakes_are_reported_together(job):
    """Unknown keys, wrong types and missing keys of all tables come in one error."""
    text = JOB.replace("global_size", "globl_size").replace("heads = 4, vocab = 64", "heads = 4.5")
    found = problems(job(f"sed = 1\n{text}"), ["train.steps=many", "modules.vision.grid.q=1"])
    assert {
        "sed",
        "batch.globl_size",
        "modules.language.options.heads",
        "modules.language.options.vocab",
        "modules.vision.grid.q",
        "train.steps",
    } == set(found)
    assert "is missing." == found["modules.language.options.vocab"].message


@pytest.mark.parametrize("table", ["modules", "data", "batch"])
def test_required_tables_are_asked_for(job, table):
    """What is missing at the top says what to add."""
    kept = "".join(f"[{p}" for p in JOB.split("[") if p.strip() and not p.startswith(table))
    assert f"[{table}" in problems(job(kept))[table].remedy


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the job file is empty."),
        ("# only a comment\n", "the job file is empty."),
        ("modules = {\n", "(line 1, column "),
        ("[batch]\nglobal_size = = 3\n", "(line 2, column 15)"),
        (f"{JOB}\n[modules.vision]\n", "the table [modules.vision] is declared twice, first on line 2"),
        ("[batch]\nglobal_size = 1\nglobal_size = 2\n", "given twice (line 3, column 16)"),
    ],
)
def test_text_that_cannot_be_read_says_why_and_where(job, text, words):
    """Empty files, files that are no TOML, and tables declared twice: one problem with the place."""
    path = job(text)
    found = problems(path)
    assert [str(path)] == list(found)
    assert words in found[str(path)].message


def test_a_file_that_is_not_there_points_to_one_that_is(job):
    """A misspelt file name gets the nearest job file of the folder."""
    path = job(JOB).with_name("jbo.toml")
    assert "Did you mean 'job.toml'?" == problems(path)[str(path)].remedy
    assert "is a folder." == problems(path.parent)[str(path.parent)].message


def test_bytes_that_are_no_text_are_refused(job):
    """A binary file is not decoded by guess."""
    path = job("")
    path.write_bytes(b"a = 1\n\xff\xfe")
    assert "is not a text file in UTF-8 (line 2)." == problems(path)[str(path)].message


def test_a_byte_order_mark_and_dos_lines_do_no_harm(job):
    """What editors on Windows leave behind is read past."""
    path = job("")
    path.write_bytes(b"\xef\xbb\xbf" + JOB.replace("\n", "\r\n").encode())
    assert 64 == jobfile.load(path).batch.global_size


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("schedule.name=gpipe", "gpipe"),
        ('schedule.name="gpipe"', "gpipe"),
        ("schedule.name=1f1b", "1f1b"),
        ("schedule.name=2024-01-01", "2024-01-01"),
        ("schedule.name=a=b", "a=b"),
        ("schedule.name=", ""),
    ],
)
def test_an_override_is_a_value_of_toml_or_else_a_string(job, override, value):
    """Quotes are optional where the text is no other value."""
    assert value == jobfile.load(job(JOB), [override]).schedule.name


@pytest.mark.parametrize("override", ["train.steps", "=3", "a..b=3", "", "a b=3"])
def test_an_override_of_another_form_is_refused(job, override):
    """Without a key and a value there is nothing to override."""
    assert "is not of the form" in problems(job(JOB), [override])[f"--set {override}"].message


def test_an_override_below_a_value_is_refused(job):
    """A number has no keys."""
    found = problems(job(JOB), ["batch.global_size.x=3"])
    assert "batch.global_size is 64, not a table" in found["--set batch.global_size.x=3"].message


def test_the_last_of_two_overrides_wins(job):
    """Overrides are laid over the file in their order."""
    assert 7 == jobfile.load(job(JOB), ["train.steps=5", "train.steps=7"]).train.steps


def test_a_misspelt_key_still_lets_the_plan_be_judged(job):
    """`read` takes a misspelt key for its nearest neighbour, and says which tables are in doubt."""
    reading = jobfile.read(job(JOB.replace("feeds", "feed")), ["modules.vision.grid.zzz=1"])
    assert reading.spec is not None
    assert ("language",) == reading.spec.modules["vision"].feeds
    assert ("modules.vision",) == reading.doubtful
    assert 2 == len(reading.problems)


# -- writing -----------------------------------------------------------------------------------------------

counts = st.integers(1, 9)
numbers = st.floats(allow_nan=False)
words = st.text(max_size=8)
names = st.text(min_size=1, max_size=6)
transformer = {"layers": counts, "hidden": counts, "heads": counts, "kv_heads": counts, "dropout": numbers}
options = {
    "vit": st.builds(Vit, **transformer, features=st.none() | counts),
    "block": st.builds(Block, **transformer, ffn=counts),
    "gpt": st.builds(Gpt, **transformer, vocab=counts, tied_embeddings=st.booleans()),
    "regressor": st.builds(Regressor, **transformer, outputs=counts),
    "zoo.eyes:build": st.dictionaries(
        names,
        st.recursive(
            numbers | words | st.booleans() | st.integers(-(2**63), 2**63 - 1),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
            max_leaves=4,
        ),
        max_size=3,
    ),
}
grids = st.builds(
    GridSpec,
    tp=counts,
    pp=counts,
    offset=st.none() | counts,
    order=st.lists(words, max_size=4).map(tuple),
    sequence_parallel=st.booleans(),
)
modules = st.sampled_from(sorted(options)).flatmap(
    lambda model: st.builds(
        ModuleSpec,
        model=st.just(model),
        options=options[model],
        feeds=st.lists(words, max_size=2).map(tuple),
        grid=grids,
        frozen=st.booleans() | st.lists(words, max_size=2).map(tuple),
        trainable=st.none() | st.lists(words, max_size=2).map(tuple),
        split=st.none() | st.lists(counts, max_size=3).map(tuple),
        loss_weight=numbers,
        width=st.none() | counts,
    )
)
groups = st.builds(
    GroupSpec,
    modules=st.lists(words, max_size=2).map(tuple),
    match=st.lists(words, max_size=2).map(tuple),
    lr=st.none() | numbers,
)
layouts = st.builds(
    LayoutSpec,
    ranks=counts,
    modules=st.dictionaries(
        names,
        st.builds(
            ModuleLayoutSpec,
            grid=grids,
            split=st.none() | st.lists(counts, max_size=3).map(tuple),
            recompute=st.none() | words,
        ),
        max_size=2,
    ),
    batch=st.builds(BatchLayoutSpec, microbatches=st.none() | counts),
    schedule=st.builds(ScheduleLayoutSpec, name=st.none() | words),
    optimizer=st.builds(OptimizerLayoutSpec, sharded=st.none() | st.booleans()),
)
specs = st.builds(
    JobSpec,
    modules=st.dictionaries(names, modules, max_size=3),
    data=st.builds(DataSpec, source=words, options=options["zoo.eyes:build"]),
    batch=st.builds(BatchSpec, global_size=counts, microbatches=counts),
    schedule=st.builds(ScheduleSpec, name=words, memory_gb=st.none() | numbers),
    optimizer=st.builds(
        OptimizerSpec,
        lr=numbers,
        betas=st.none() | st.tuples(numbers, numbers),
        options=options["zoo.eyes:build"],
        groups=st.lists(groups, max_size=2).map(tuple),
        loss_scale=st.builds(LossScaleSpec, initial=numbers),
        skip_above=st.builds(SkipSpec, norm=numbers, window=counts),
    ),
    train=st.builds(
        TrainSpec,
        steps=counts,
        run_dir=st.none() | words,
        profile=st.builds(
            ProfileSpec,
            steps=st.lists(counts, max_size=2).map(tuple),
            ranks=st.lists(counts, max_size=2).map(tuple),
        ),
        skip_steps=st.lists(counts | st.tuples(counts, counts), max_size=3).map(tuple),
    ),
    seed=counts,
    world_size=st.none() | counts,
    layouts=st.just("plan") | st.lists(layouts, max_size=2).map(tuple),
)


@given(specs)
def test_a_spec_that_is_written_reads_back_equal(tmp_path_factory, spec):
    """``load(dump(spec)) == spec`` for any spec, the order of its modules included."""
    path = tmp_path_factory.mktemp("jobs", numbered=True) / "job.toml"
    path.write_text(jobfile.dump(spec), encoding="utf-8", newline="")
    again = jobfile.load(path)
    assert spec == again
    assert list(spec.modules) == list(again.modules)


def test_what_is_written_is_short(job):
    """Defaults are left out, and small tables stay on one line."""
    text = jobfile.dump(jobfile.load(job(JOB)))
    lines = JOB.replace("{ ", "{").replace(" }", "}").splitlines()
    assert sorted(filter(None, lines)) == sorted(filter(None, text.splitlines()))


def test_reading_a_job_imports_no_torch(job):
    """The job file is read on machines without torch."""
    code = (
        "import sys; from mimogrid.shell.job import jobfile; jobfile.load(sys.argv[1]); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(job(JOB))], capture_output=True, text=True, check=True
    )
    assert "False\n" == done.stdout


@pytest.mark.parametrize(
    ("override", "where", "remedy"),
    [
        ("modules.languag.grid.dp=2", "modules.languag", "Did you mean 'language'?"),
        ("language.grid.dp=2", "language", "'language' is a module: write modules.language."),
        ("optimizer.learning_rate=0.1", "optimizer.learning_rate", "Did you mean 'lr'?"),
        ("batch.global_batch_size=8", "batch.global_batch_size", "Did you mean 'global_size'?"),
        (
            "modules.vision.options.num_layers=3",
            "modules.vision.options.num_layers",
            "Did you mean 'layers'?",
        ),
        (
            "modules.vision.grid.tensor_parallel_size=2",
            "modules.vision.grid.tensor_parallel_size",
            "Did you mean 'tp'?",
        ),
    ],
)
def test_what_a_newcomer_writes_is_told_from_what_was_meant(job, override, where, remedy):
    """One problem for one mistake, also where a module is named wrongly, or a key as in another library."""
    with pytest.raises(PlanError) as caught:
        jobfile.load(job(JOB), [override])
    (problem,) = caught.value.problems
    assert (where, remedy) == (problem.where, problem.remedy)


def test_an_override_may_add_a_whole_module(job):
    """If it has a model, it is one."""
    added = 'modules.audio={ model = "vit", feeds = ["language"], options = { layers = 1, hidden = 8, heads = 1 } }'
    assert {"vision", "language", "audio"} == jobfile.load(job(JOB), [added]).modules.keys()
