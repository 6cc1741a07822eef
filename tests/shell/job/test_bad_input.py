"""Bad input: whatever is wrong with a job is one clear error, with exit code 2 and nothing written.

An error names the thing, the fact with its numbers, and the way out.
"""

import json
import sys

import pytest

from mimogrid.shell.cli.main import main


VISION = """
[modules.vision]
model = "vit"
feeds = ["language"]
grid = { dp = 2 }
options = { layers = 2, hidden = 64, heads = 4 }
"""
LANGUAGE = """
[modules.language]
model = "gpt"
grid = { pp = 2 }
options = { layers = 4, hidden = 48, heads = 6, vocab = 48 }
"""
REST = """
[data]
source = "synthetic"

[batch]
global_size = 8
microbatches = 4
"""
JOB = VISION + LANGUAGE + REST

CASES = {
    "an unknown key": (
        ["modules.vision.grid.ttp=2"],
        "modules.vision.grid.ttp",
        ["'ttp' is not a known key here", "Did you mean 'tp'?"],
    ),
    "an unknown module in feeds": (
        ['modules.vision.feeds=["langage"]'],
        "modules.vision.feeds",
        ["module 'vision' feeds 'langage', and no module is called so", "Did you mean 'language'?"],
    ),
    "a cycle": (
        [
            "modules.a.model=block",
            'modules.a.feeds=["b"]',
            "modules.a.options={layers=1, hidden=8, heads=2}",
            "modules.b.model=block",
            'modules.b.feeds=["a"]',
            "modules.b.options={layers=1, hidden=8, heads=2}",
        ],
        "modules.a.feeds",
        ["in a cycle: a -> b -> a", "Take one of these edges out"],
    ),
    "a module called like a tensor": (
        ['modules.tokens={model="vit", feeds=["language"], options={layers=1, hidden=8, heads=2}}'],
        "modules.tokens",
        ["'tokens' is the name of a tensor that modules exchange", "Call it otherwise"],
    ),
    "a module that feeds itself": (
        ['modules.language.feeds=["language"]'],
        "modules.language.feeds",
        ["in a cycle: language -> language"],
    ),
    "a grid larger than the world": (
        ["world_size=3"],
        "modules.language.grid",
        ["module 'language' needs ranks 2..3", "pp=2 at offset 2", "ranks 0..2", "world_size = 4 or more"],
    ),
    "heads that tp does not divide": (
        ["modules.language.grid.tp=4"],
        "modules.language.grid.tp",
        ["module 'language' splits 6 attention heads over tp=4: 6 is not a multiple of 4", "1, 2, 3, 6"],
    ),
    "layers that pp does not divide": (
        ["modules.language.grid.pp=3"],
        "modules.language.grid.pp",
        ["module 'language' splits 4 layers over pp=3", "Legal pp for 4 layers: 1, 2, 4", "split = [...]"],
    ),
    "a split of other layers": (
        ["modules.language.split=[1,2]"],
        "modules.language.split",
        ["split = [1, 2] is not 4 layers over pp=2 stages", "2 positive numbers whose sum is 4"],
    ),
    "fewer samples than dp ranks": (
        ["modules.vision.grid.dp=3"],
        "modules.vision.grid.dp",
        [
            "a microbatch of module 'vision' has 2 samples (8 / 4) for dp=3 dp ranks",
            "Use dp <= 2, at most 2 microbatches, or batch.global_size >= 12",
        ],
    ),
    "microbatches that do not divide the batch": (
        ["batch.microbatches=3"],
        "batch.microbatches",
        ["8 samples of a step do not divide into 3 microbatches", "1, 2, 4, 8"],
    ),
    "a zero size": (
        ["modules.language.grid.tp=0"],
        "modules.language.grid.tp",
        ["is 0; it must be 1 or more"],
    ),
    "a negative size": (
        ["modules.vision.options.hidden=-64"],
        "modules.vision.options.hidden",
        ["is -64; it must be 1 or more"],
    ),
    "no samples": (["batch.global_size=0"], "batch.global_size", ["is 0; it must be 1 or more"]),
    "a negative offset": (["modules.vision.grid.offset=-1"], "modules.vision.grid.offset", ["is -1"]),
    "a world too large to be meant": (
        ["modules.vision.grid.dp=100000000"],
        "modules.vision.grid",
        ["is 100,000,000 ranks", "at most 100,000"],
    ),
    "an offset too large to be meant": (
        ["modules.vision.grid.offset=1000000000000"],
        "modules.vision.grid.offset",
        ["is 1,000,000,000,000", "at most 100,000"],
    ),
    "more samples than anybody describes": (
        ["batch.global_size=1000000000000"],
        "batch.global_size",
        ["is 1,000,000,000,000", "at most 1,000,000"],
    ),
    "more experts than anybody has": (
        ["modules.language.options.experts=10001"],
        "modules.language.options.experts",
        ["is 10,001", "at most 10,000"],
    ),
    "a width too large to be meant": (
        ["modules.language.options.vocab=9000000000000000000"],
        "modules.language.options.vocab",
        ["at most 10,000,000"],
    ),
    "no module": (["modules={}"], "modules", ["the job has no module", "[modules.NAME]"]),
    "a module that nobody uses": (
        ["modules.vision.feeds=[]"],
        "modules.vision",
        ["module 'vision' feeds nobody and has no loss", "language"],
    ),
    "an unknown model": (["modules.vision.model=vitt"], "modules.vision.model", ["Did you mean 'vit'?"]),
    "an unknown source": (["data.source=digit"], "data.source", ["'digit'", "Did you mean 'digits'?"]),
    "a pattern that matches nothing": (
        ['modules.vision.trainable=["projector.langage.*"]'],
        "modules.vision.trainable",
        ["'projector.langage.*' matches no parameter of module 'vision'", "projector.language."],
    ),
    "a projector that is not there": (
        ['modules.language.frozen=["projector.*"]'],
        "modules.language.frozen",
        ["'projector.*' matches no parameter of module 'language'"],
    ),
    "both trainable and frozen": (
        ["modules.vision.frozen=true", 'modules.vision.trainable=["*"]'],
        "modules.vision",
        ["says both trainable and frozen"],
    ),
    "a rate that is no number": (["optimizer.lr=nan"], "optimizer.lr", ["is nan", "0 or more"]),
    "a negative rate": (["optimizer.lr=-1"], "optimizer.lr", ["is -1.0", "0 or more"]),
    "betas of one": (["optimizer.betas=[0.9, 1.0]"], "optimizer.betas", ["[0.9, 1.0]", "below 1"]),
    "an optimizer that looks at whole matrices": (
        ["optimizer.name=Muon"],
        "optimizer.name",
        ["orthogonalizes whole matrices", "Use one of adamw"],
    ),
    "an optimizer with a slip": (["optimizer.name=RMSprob"], "optimizer.name", ["'rmsprop'"]),
    "an option of another optimizer": (
        ["optimizer.options={momentun = 0.9}", "optimizer.name=sgd"],
        "optimizer.options.momentun",
        ["SGD has no option", "'momentum'"],
    ),
    "an option of another kind": (
        ["optimizer.options={nesterov = 1}", "optimizer.name=sgd"],
        "optimizer.options.nesterov",
        ["SGD takes a value such as False"],
    ),
    "betas for who has none": (
        ["optimizer.betas=[0.9, 0.9]", "optimizer.name=sgd"],
        "optimizer.betas",
        ["SGD takes no betas"],
    ),
    "a group of a module with a slip": (
        ["optimizer.groups=[{modules = ['visoin'], lr = 0.1}]"],
        "optimizer.groups[0].modules",
        ["no module is called 'visoin'", "'vision'"],
    ),
    "a group that matches nothing": (
        ["optimizer.groups=[{match = ['*.bias']}, {match = ['vision.input.wieght']}]"],
        "optimizer.groups[1].match",
        ["'vision.input.wieght' matches no parameter", "'vision.input.weight'"],
    ),
    "a group of everything": (["optimizer.groups=[{lr = 0.1}]"], "optimizer.groups[0]", ["every parameter"]),
    "a loss scale that rounds": (
        ["optimizer.loss_scale={initial = 1000}"],
        "optimizer.loss_scale.initial",
        ["1000.0, not a power of two"],
    ),
    "a spike that is none": (
        ["optimizer.skip_above={norm = 0.5}"],
        "optimizer.skip_above.norm",
        ["is 0.5", "above 1"],
    ),
    "profiled step beyond the last": (
        ["train.steps=3", "train.profile.steps=[1, 3]"],
        "train.profile.steps",
        ["has 3", "train.steps = 3"],
    ),
    "steps the wrong way round": (["train.skip_steps=[[4, 2]]"], "train.skip_steps", ["has [4, 2]"]),
    "a memory cap of zero": (["schedule.memory_gb=0"], "schedule.memory_gb", ["is 0.0", "above 0"]),
    "a negative seed": (["seed=-3"], "seed", ["is -3"]),
    "a weight without a loss": (
        ["modules.vision.loss_weight=2"],
        "modules.vision.loss_weight",
        ["module 'vision' has no loss that 2.0 could weigh"],
    ),
    "a sequence that rows overflow": (
        ["data.options={sequence = 16, text = [4, 12]}"],
        "data.options.sequence",
        ["module 'language' can have 6 rows and 12 text tokens", "sequence = 18 or more"],
    ),
    "a range the wrong way round": (
        ["data.options.rows.vision=[6,2]"],
        "data.options.rows.vision",
        ["6 is more than 2", "Write [2, 6]"],
    ),
    "rows of a module that is fed": (
        ["data.options.rows.language=[2,6]"],
        "data.options.rows.language",
        ["language model", "Known: vision"],
    ),
    "a builder in no package": (
        ["modules.vision.model=nowhere.at:all", "modules.vision.options={}"],
        "modules.vision.model",
        ["'nowhere.at:all' cannot be imported: there is no module 'nowhere'", "Install it"],
    ),
    "a builder in a misspelt module": (
        ["modules.vision.model=zoo.eyse:build", "modules.vision.options={}"],
        "modules.vision.model",
        ["package zoo has no 'eyse'", "Did you mean 'eyes'?"],
    ),
    "a builder of a misspelt name": (
        ["modules.vision.model=zoo.eyes:biuld", "modules.vision.options={}"],
        "modules.vision.model",
        ["there is no 'biuld' in", "eyes.py", "Did you mean 'build'?"],
    ),
    "a builder in a file that is no Python": (
        ["modules.vision.model=zoo.broken:build", "modules.vision.options={}"],
        "modules.vision.model",
        ["broken.py is not Python", "(line 2)"],
    ),
    "a builder below a module": (
        ["modules.vision.model=zoo.eyes.left:build", "modules.vision.options={}"],
        "modules.vision.model",
        ["zoo.eyes is a module, not a package", "zoo.eyes:function"],
    ),
    "a source that cannot be imported": (
        ["data.source=zoo.eyes:sauce"],
        "data.source",
        ["there is no 'sauce' in", "Did you mean 'source'?"],
    ),
    "experts that do not divide": (
        ["modules.language.grid={tp=2, dp=2, ep=3}", "modules.language.options.experts=4"],
        "modules.language.grid.ep",
        ["ep=3 * expert_tp=1 = 3 ranks", "divide the 4 (tp=2 * cp=1 * dp=2)", "1, 2, 4"],
    ),
    "more experts chosen than there are": (
        ["modules.language.options.experts=2", "modules.language.options.top_k=3"],
        "modules.language.options.top_k",
        ["3 of 2 experts", "top_k <= 2"],
    ),
    "experts over ranks, and none there": (
        ["modules.language.grid={dp=2, ep=2}"],
        "modules.language.options.experts",
        ["lays experts over 2 ranks and has none"],
    ),
}


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The path of a legal job file, with a package of the user's own beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "__init__.py").write_text("")
    (tmp_path / "zoo" / "eyes.py").write_text("def build(): ...\ndef source(): ...\n")
    (tmp_path / "zoo" / "broken.py").write_text("def build():\n) = 3\n")
    path = tmp_path / "job.toml"
    path.write_text(JOB)
    return path


def problems(capsys, path, overrides=(), command="check"):
    """What a command that must fail reports, having written nothing."""
    before = sorted(path.parent.rglob("*"))
    assert 2 == main([command, str(path), "--json", *(f"--set={override}" for override in overrides)])
    assert before == sorted(path.parent.rglob("*"))
    captured = capsys.readouterr()
    assert "" == captured.err
    told = json.loads(captured.out)
    assert told["ok"] is False
    return told["problems"]


def test_the_job_is_legal_to_begin_with(job):
    """What follows is wrong by what it overrides alone."""
    assert 0 == main(["check", str(job), "--json"])


@pytest.mark.parametrize("case", CASES)
def test_it_is_an_error_that_says_where_what_and_how_to_go_on(job, capsys, case):
    """The place, the fact with its numbers and the way out are all there."""
    overrides, where, words = CASES[case]
    found = {problem["where"]: problem for problem in reversed(problems(capsys, job, overrides))}
    assert where in found
    said = f"{found[where]['message']}\n{found[where]['remedy']}"
    for word in words:
        assert word in said


@pytest.mark.parametrize("case", CASES)
def test_one_mistake_is_one_error(job, capsys, case):
    """A mistake is not followed by its consequences."""
    overrides, where, _ = CASES[case]
    assert [where] == list(dict.fromkeys(problem["where"] for problem in problems(capsys, job, overrides)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the job file is empty"),
        ("\n# nothing\n", "the job file is empty"),
        ("[modules.vision\n", "is not TOML"),
        (JOB + VISION, "the table [modules.vision] is declared twice, first on line 2 (line"),
        (JOB + LANGUAGE, "the table [modules.language] is declared twice"),
    ],
    ids=["empty", "comments", "no TOML", "two modules of one name", "two losses of one name"],
)
def test_a_file_that_cannot_be_read_is_one_error(job, capsys, text, words):
    """The file is named, with the reason."""
    job.write_text(text)
    [problem] = problems(capsys, job)
    assert str(job) == problem["where"]
    assert words in problem["message"]


def test_a_file_that_is_not_there_is_one_error(job, capsys):
    """So is a folder in its place."""
    [missing] = problems(capsys, job.with_name("other.toml"))
    assert "there is no such file." == missing["message"]
    [folder] = problems(capsys, job.parent)
    assert "is a folder." == folder["message"]


def test_several_mistakes_are_reported_together(job, capsys):
    """Text, modules, builders, data, optimizer and batch: one run names them all, each once."""
    overrides = [
        "modules.vision.grid.ttp=2",
        "modules.language.grid.tp=4",
        "modules.ears.model=nowhere.at:all",
        'modules.ears.feeds=["langage"]',
        "data.source=digit",
        "optimizer.lr=-1",
        "batch.microbatches=5",
    ]
    assert sorted(
        [
            "modules.vision.grid.ttp",
            "modules.language.grid.tp",
            "modules.language.grid.tp",
            "modules.ears.model",
            "modules.ears.feeds",
            "data.source",
            "optimizer.lr",
            "batch.microbatches",
        ]
    ) == sorted(problem["where"] for problem in problems(capsys, job, overrides))


@pytest.mark.parametrize("command", ["roles", "show", "train", "parity"])
def test_every_command_refuses_before_it_starts(job, capsys, command):
    """No command begins with a job that is wrong."""
    [problem] = problems(capsys, job, ["modules.language.grid.pp=3"], command=command)
    assert "modules.language.grid.pp" == problem["where"]
