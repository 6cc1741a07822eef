"""Jobs that start from checkpoints: the folder says what modules are, and what the job says comes on top."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mimogrid.core.base.errors import PlanError
from mimogrid.core.job.models import BUILT_IN, Gpt, Vit
from mimogrid.core.job.projectors import Projector
from mimogrid.core.job.spec import JobSpec
from mimogrid.shell.job import jobfile
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.job.published import published
from mimogrid.shell.job.sources.synthetic import grids_of
from tiny_checkpoints import MODELS, save


Write = Callable[..., Path]
REST = """
[data]
source = "synthetic"
options = { sequence = 96 }

[batch]
global_size = 4
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny checkpoints, each written once."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def checkpoint(name: str) -> Path:
        return folder / name if (folder / name).exists() else save(name, folder / name)

    return checkpoint


@pytest.fixture
def write(tmp_path: Path, checkpoints: Callable[[str], Path]) -> Write:
    """A job file that starts from a checkpoint."""

    def written(name: str, *tables: str, top: str = "") -> Path:
        path = tmp_path / "job.toml"
        modules = tables or tuple(
            f"[modules.{module}]" for module in ("vision", "audio", "language") if module in KINDS[name]
        )
        path.write_text("\n".join((f'weights = "{checkpoints(name)}"', top, *modules, REST)))
        return path

    return written


KINDS = {
    "llava": ("vision", "language"),
    "qwen2.5-vl": ("vision", "language"),
    "qwen3-vl": ("vision", "language"),
    "qwen2-audio": ("audio", "language"),
    "llama": ("language",),
    "clip": ("vision",),
}


def read(path: Path, *overrides: str) -> JobSpec:
    """The spec of a job file without problems of its text."""
    found = jobfile.read(path, overrides)
    assert () == found.problems
    assert found.spec
    return found.spec


def test_weights_of_a_job_are_those_of_its_modules(write: Write, checkpoints: Callable[[str], Path]) -> None:
    """A job without options: the checkpoint has the models, their options, edges, projectors and what never trains."""
    spec = read(write("qwen2-audio"))
    audio, language = spec.modules.values()
    assert isinstance(audio.options, Vit)
    assert isinstance(language.options, Gpt)
    assert ("whisper", 2, 259) == (audio.options.stem, audio.options.pool, language.options.vocab)
    assert (("language",), ("positions.weight",)) == (audio.feeds, audio.frozen)
    assert {str(checkpoints("qwen2-audio"))} == {audio.weights, language.weights}
    llava = read(write("llava")).modules["vision"]
    assert {"language": Projector(kind="mlp", ffn=24)} == llava.projector


def test_what_a_job_says_wins(write: Write) -> None:
    """Key by key; a projector of another kind is the job's alone, and without weights nothing is laid."""
    vision = '[modules.vision]\nfrozen = true\n[modules.vision.projector.language]\nactivation = "silu"'
    spec = read(write("llava", vision, "[modules.language]\noptions = { dropout = 0.1 }"))
    assert spec.modules["vision"].frozen is True
    assert {"language": Projector(kind="mlp", ffn=24, activation="silu")} == spec.modules["vision"].projector
    assert isinstance(spec.modules["language"].options, Gpt)
    assert (0.1, 259) == (spec.modules["language"].options.dropout, spec.modules["language"].options.vocab)
    another = '[modules.vision]\n[modules.vision.projector.language]\nkind = "linear"'
    fresh = '[modules.language]\nmodel = "gpt"\nweights = ""\noptions = { layers = 1, hidden = 8, heads = 1, vocab = 9}'
    spec = read(write("llava", another, fresh))
    assert {"language": Projector()} == spec.modules["vision"].projector
    assert spec.modules["language"].weights is None
    alone = read(write("llava", "[modules.vision]", '[modules.other]\nmodel = "mine:build"'))
    assert ((), {}) == (alone.modules["vision"].feeds, alone.modules["vision"].projector)


def test_a_written_job_reads_back(write: Write, tmp_path: Path) -> None:
    """What a run records is the whole job: options, projectors and all."""
    for name in ("qwen3-vl", "llava"):
        spec = read(write(name))
        again = tmp_path / "again.toml"
        again.write_text(jobfile.dump(spec))
        assert spec == read(again)


def refused(path: Path, *overrides: str) -> list[tuple[str, str]]:
    """The problems of a job that cannot be opened."""
    with pytest.raises(PlanError) as raised:
        open_job(path, overrides)
    return [(problem.where, problem.message) for problem in raised.value.problems]


def test_a_folder_that_is_not_there_is_one_problem(write: Write, tmp_path: Path) -> None:
    """Nothing that the folder should have said is reported as missing."""
    ((where, message),) = refused(write("llava"), "weights=lava")
    assert (str(tmp_path / "lava"), "there is no such folder.") == (where, message)


@pytest.mark.parametrize(
    ("override", "where", "message"),
    [
        ("modules.language.options.hidden=48", "modules.language.options", "make embedding.weight (259, 48)"),
        ("modules.language.options.vocab=260", "modules.language.options", "the checkpoint has (259, 24)"),
        ("modules.language.model=vit", "modules.language.model", "the checkpoint has a 'gpt'"),
        ("weights=1", "weights", "is 1; expected a string"),
    ],
)
def test_what_contradicts_the_checkpoint_is_refused(
    write: Write, override: str, where: str, message: str
) -> None:
    """Before anything starts, with the shapes."""
    problems = refused(write("llama"), override)
    assert problems[0][0] == where
    assert message in problems[0][1]


@pytest.mark.parametrize("name", [name for name in MODELS if "both" not in name])
def test_synthetic_images_are_such_as_a_tower_can_read(name: str, checkpoints: Callable[[str], Path]) -> None:
    """Grids that are drawn for a published tower fit it."""
    for module in published(checkpoints(name)).model.modules.values():
        options: Any = jobfile.CONVERTER.structure(module.table()["options"], BUILT_IN[module.model])
        for grid in grids_of(options):
            options.expect(grid)
            assert options.emission.rows(grid) > 0
