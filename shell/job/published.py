"""Published checkpoints: what a folder of Hugging Face's holds, without reading a value and without torch.

    config.json
    model.safetensors                          or several files, and
    model.safetensors.index.json               which tensor is in which file

``modules.NAME.weights = "FOLDER"`` starts a module from such a folder, and ``weights = "FOLDER"`` at the top of a job
all its modules. What they are comes from its config.json; what the job says comes on top.
"""

import functools
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import attrs

from mimogrid.core.base.errors import PlanError, Problem, nearest
from mimogrid.core.job.lora import ALL, NO_LORA
from mimogrid.core.job.models import Own
from mimogrid.core.job.peft import linears, targeted
from mimogrid.core.models.families import read_config
from mimogrid.core.models.mapping import Recipe, Stored, whole
from mimogrid.core.models.network import THEIRS as UNKNOWN_TOWER
from mimogrid.core.models.network import Model, PublishedModule
from mimogrid.core.models.segments import ONE_EACH
from mimogrid.core.topology.topology import Topology
from mimogrid.shell.job.tables import shown
from mimogrid.shell.job.tensorfile import StoredTensor, header_of
from mimogrid.shell.job.textfiles import json_of, read_text


CONFIG, ONE_FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
THEIRS, TOWER = "hf:", "mimogrid.shell.modules.transformers_tower:build"
"""What the model of a module begins with that transformers' own network runs, and what builds it."""
PARTS = ("vision_tower", "visual", "audio_tower")
"""What transformers calls the towers of the wholes."""
FLOATS = frozenset({"F64", "F32", "BF16", "F16"})
"""The dtypes that weights may have."""
_LOCAL = "Name the folder of a checkpoint on this machine. Nothing is downloaded here."
_REMEDY = "Name the folder of a whole checkpoint in safetensors, or download it again."


@attrs.frozen
class PublishedTensor:
    """A tensor of a checkpoint: the file that holds it, and where and what it is there."""

    file: str
    stored: StoredTensor

    @property
    def dtype(self) -> str:
        """Its dtype, as safetensors writes it."""
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.stored.shape


@attrs.frozen(eq=False)
class Published:
    """A checkpoint: its config, its tensors by name, and the model that they are."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, PublishedTensor]
    model: Model

    def module(self, name: str) -> PublishedModule:
        """Return what a module of a job is in the checkpoint: that of its name, or the only one.

        Raises PlanError if the checkpoint has several, none of that name.
        """
        modules = self.model.modules
        if name in modules:
            return modules[name]
        if len(modules) == 1:
            return next(iter(modules.values()))
        message = f"{self.folder} has no module '{name}'; it has {', '.join(modules)}."
        raise PlanError([Problem(f"modules.{name}.weights", message, "Give the module one of these names.")])

    def values(self, name: str) -> int:
        """Return how many values the parameters of a module have; of a tower of no family, all its tensors."""
        module = self.module(name)
        known = sum(recipe.stored_values for recipe in module.recipes.values())
        if module.model != UNKNOWN_TOWER:
            return known
        prefix = tower_prefix(module)
        return known + sum(
            math.prod(t.shape) for tensor, t in self.tensors.items() if tensor.startswith(prefix)
        )

    def recipes(self, name: str, ours: Collection[str]) -> Mapping[str, Recipe]:
        """Return the recipes of a module that has parameters of our names `ours`.

        Those of a tower that transformers runs have the names that the tensors have in the files.
        """
        recipes = self.module(name).recipes
        theirs = {
            tensor: whole(Stored(tensor, self.tensors[tensor].shape))
            for tensor in ours
            if tensor in self.tensors
        }
        if not theirs:
            return recipes
        return theirs | {parameter: recipe for parameter, recipe in recipes.items() if parameter in ours}


@functools.lru_cache(maxsize=4)
def published(folder: Path) -> Published:
    """Return what a folder holds.

    Raises PlanError if it is no checkpoint in safetensors, if its architecture is not known here, and with the names
    of all tensors that are missing, surplus, of another shape or no floats.
    """
    try:
        if not folder.is_dir():
            raise _problem(folder, "is no folder." if folder.exists() else "there is no such folder.", _LOCAL)
        config = _table(folder / CONFIG)
        tensors = _tensors(folder)
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # a circle of links, a name that is too long, a null byte
        raise _problem(folder, f"is no folder that can be read: {error}.") from None
    model = read_config(config, tensors)
    problems = (
        *model.differences({name: t.shape for name, t in tensors.items()}),
        *_no_floats(model, tensors),
    )
    if problems:
        raise PlanError(attrs.evolve(problem, where=str(folder)) for problem in problems)
    return Published(folder, config, tensors, model)


def _no_floats(model: Model, tensors: Mapping[str, PublishedTensor]) -> Iterator[Problem]:
    """Yield the first of the weights that are no floats: whoever quantizes need not say so in the config."""
    used = {tensor.name for recipe in model.recipes().values() for tensor in recipe.tensors}
    strange = sorted(name for name in used & tensors.keys() if tensors[name].dtype not in FLOATS)
    if strange:
        message = f"has {len(strange)} weights that are no floats, such as {strange[0]} ({tensors[strange[0]].dtype})."
        yield Problem("", message, "Use the checkpoint that this one was quantized from.")


def resolved(folder: Path, where: str) -> Path:
    """Return the whole path of a folder, without links. Raises PlanError for a circle of links or a null byte."""
    try:
        return folder.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise PlanError([Problem(where, f"is no path: {error}.", "Name a folder.")]) from None


def origin_of(folders: Mapping[str, str | None], source: Path | None = None) -> Published:
    """Return the checkpoint that all modules of a job start from, or the `source` that stands in for it.

    `folders` are the modules' own. Raises PlanError where a module has none, or there are several, or it is gone.
    """
    if fresh := [name for name, folder in folders.items() if folder is None]:
        message = "is not there: the module starts from random weights, and belongs to no checkpoint."
        remedy = "Start the job from a folder: weights = FOLDER. Without one its weights leave as --to safetensors."
        raise PlanError(Problem(f"modules.{name}.weights", message, remedy) for name in fresh)
    named = list(dict.fromkeys(Path(folder) for folder in folders.values() if folder))
    if source is None and len(named) > 1:
        message = f"start from {len(named)} folders: {', '.join(map(str, named))}."
        raise PlanError(
            [Problem("modules", message, "Name one checkpoint that has all of them: --from FOLDER.")]
        )
    folder = resolved(source or named[0], "--from" if source else "modules")
    if source is None and not folder.is_dir():
        message = "the modules start from this folder, and it is not there any more."
        raise PlanError([Problem(str(folder), message, "Name it where it is now: --from FOLDER.")])
    return published(folder)


def lay_weights(table: MutableMapping[str, Any], folder: Path) -> dict[str, tuple[Problem, ...]]:
    """Lay what checkpoints say of modules under what a job says of them, and make their folders absolute.

    ``weights`` at the top of a job is that of all built-in modules without their own; "" is none. A checkpoint says the
    model, its options, and where the job leaves these out `feeds`, `projector` and what is `frozen`.

    Returns the problems, by the name of the module; those of the job itself under "".
    """
    problems: dict[str, tuple[Problem, ...]] = {}
    written, whole = table.get("modules"), table.pop("weights", None)
    modules: dict[str, Any] = written if isinstance(written, dict) else {}
    if not isinstance(whole, str | None):
        problems[""] = (Problem("weights", f"is {shown(whole)}; expected a string.", "Name a folder."),)
        whole = None
    for name, module in modules.items():
        if not isinstance(module, dict):
            continue
        if whole is not None and ":" not in str(module.get("model")):
            module.setdefault("weights", whole)
        if module.get("weights") == "":
            del module["weights"]
        if str(module.get("model")).startswith(THEIRS):
            module["weights"], _, _ = str(module["model"]).removeprefix(THEIRS).partition("#")
        if isinstance(module.get("weights"), str) and (of := _lay(name, module, folder, tuple(modules))):
            problems[name] = of
    return problems


def _lay(
    name: str, module: MutableMapping[str, Any], folder: Path, names: tuple[str, ...]
) -> tuple[Problem, ...]:
    """Lay a checkpoint's table of a module under the job's; `names` are the modules of the job."""
    try:
        module["weights"] = str(resolved(folder / module["weights"], f"modules.{name}.weights"))
        found = published(Path(module["weights"])).module(name).table()
    except PlanError as error:
        return error.problems
    module.setdefault("model", found["model"])
    if module["model"] == UNKNOWN_TOWER:
        module["model"] = f"{THEIRS}{module['weights']}#{PARTS[0]}"
    if module["model"] == TOWER:
        return ()
    if str(module["model"]).startswith(THEIRS):
        return _lay_tower(name, module, found)
    if module["model"] != found["model"]:
        message = f"is '{module['model']}', and the checkpoint has a '{found['model']}'."
        return (Problem(f"modules.{name}.model", message, "Leave it out."),)
    if isinstance(module.setdefault("options", {}), dict):
        module["options"] = found["options"] | module["options"]
    if targets := [target for target in found.get("feeds", ()) if target in names]:
        module.setdefault("feeds", targets)
    if "frozen" in found and "trainable" not in module and "lora" not in module:
        module.setdefault("frozen", found["frozen"])
    _lay_projectors(module, found.get("projector", {}))
    return _lay_targets(name, module) if isinstance(module.get("lora"), dict) else ()


def _lay_tower(name: str, module: MutableMapping[str, Any], found: Mapping[str, Any]) -> tuple[Problem, ...]:
    """Lay the table of transformers' own tower, which a module of its own runs."""
    model = published(Path(module["weights"])).model
    described = model.modules.get(name)
    _, _, part = str(module["model"]).partition("#")
    where, remedy = f"modules.{name}.model", "Leave the model out: the module is converted."
    own = part_of(tower_prefix(described)) if described and described.feeds else None
    if described is None or own is None:
        return (Problem(where, "runs a tower of a checkpoint that has a language model besides.", remedy),)
    if part != own:
        message = f"names '{part}'; transformers calls this tower '{own}'."
        return (Problem(where, message, f"Write #{own}, or leave the model out: the tower is converted."),)
    if described.option("deepstack_layers"):
        message = "has rows of inner layers that join the language model, and such a module emits those of the last."
        return (Problem(where, message, remedy),)
    stacked = int(described.option("merge"))
    module["model"], module["width"] = TOWER, described.options["hidden"]
    module["options"] = {"folder": module["weights"], "module": name}
    emission = {
        "stride": 2 if described.option("stem") == "whisper" else 1,
        "merge": stacked,
        "pool": described.option("pool"),
        "extra": int(described.option("emit_class_token")),
    }
    if changes := {key: value for key, value in emission.items() if value != getattr(ONE_EACH, key)}:
        module["rows_out"] = changes
    module.setdefault("feeds", list(found.get("feeds", ())))
    if "frozen" in found and "trainable" not in module:
        module.setdefault("frozen", found["frozen"])
    if isinstance(module.get("frozen"), list):
        # What the checkpoint says of the converted tower, which a file of `init` repeats, has its name there.
        recipes = described.recipes
        module["frozen"] = [
            name
            for pattern in module["frozen"]
            for name in ([t.name for t in recipes[pattern].tensors] if pattern in recipes else [pattern])
        ]
    if stacked > 1:  # The tower merges its rows itself.
        module["width"] = model.modules[described.feeds[0]].options["hidden"]
    else:
        _lay_projectors(module, found.get("projector", {}))
    return ()


def _lay_targets(name: str, module: MutableMapping[str, Any]) -> tuple[Problem, ...]:
    """Replace the targets of LoRA, which may be names of the checkpoint, by our names of the linear layers."""
    lora, checkpoint = module["lora"], published(Path(module["weights"]))
    paths = linears(checkpoint.module(name).recipes)
    targets = lora.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        return ()  # reading the table says what is wrong
    found = dict(targeted(targets, paths, has_towers=len(checkpoint.model.modules) > 1))
    words = tuple(dict.fromkeys(path.rpartition(".")[2] for path in paths.values()))
    lora["targets"] = [ALL] if ALL in targets else list(dict.fromkeys(itertools.chain(*found.values())))
    if any(ours.endswith(".qkv") for ours in paths):
        lora.setdefault("fused_qkv", True)
    return tuple(
        Problem(
            f"modules.{name}.lora.targets",
            f"'{target}' is no linear layer of module '{name}'; {NO_LORA}.",
            nearest(target, words),
        )
        for target, names in found.items()
        if not names
    )


def tower_prefix(described: PublishedModule) -> str:
    """Return what the names of a tower's tensors begin with."""
    if described.model == UNKNOWN_TOWER:
        return described.carried[0].removesuffix("*")
    names = (
        described.recipes[name].tensors
        for name in ("input.weight", "input.conv1.weight")
        if name in described.recipes
    )
    first = next(iter(next(names))).name
    for end in ("embeddings.patch_embedding.weight", "patch_embed.proj.weight", "conv1.weight"):
        first = first.removesuffix(end)
    return first


def part_of(prefix: str) -> str | None:
    """Return what transformers calls a tower whose tensors have names with a prefix; None if it has no such name."""
    return next((part for part in prefix.split(".") if part in PARTS), None)


def _lay_projectors(module: MutableMapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> None:
    """Lay the checkpoint's projectors under those of a job, unless these are of another kind."""
    feeds, written = module.get("feeds"), module.setdefault("projector", {})
    if not isinstance(feeds, list) or not isinstance(written, dict):
        return
    for target in feeds:
        own, table = written.get(target, {}), found.get(str(target))
        if table and isinstance(own, dict) and own.get("kind", table["kind"]) == table["kind"]:
            written[target] = {**table, **own}


def shape_problems(topology: Topology) -> Iterator[Problem]:
    """Yield the modules that options of the job make of other shapes than the checkpoint has, padding apart."""
    for name, module in topology.modules.items():
        folder = topology.spec.modules[name].weights
        if folder is None or isinstance(module.model, Own):
            continue
        recipes = published(Path(folder)).module(name).recipes
        for parameter in module.parameters:
            shape = parameter.unpadded_shape
            stored = recipes[parameter.name].shape if parameter.name in recipes else shape
            if stored != shape:
                message = f"make {parameter.name} {shape}, and the checkpoint has {stored}."
                yield Problem(f"modules.{name}.options", message, "Leave out what changes sizes.")
                break


def _tensors(folder: Path) -> dict[str, PublishedTensor]:
    if not (folder / INDEX).exists():
        if not (folder / ONE_FILE).exists():
            _refuse_pickled(folder)
        if not (folder / ONE_FILE).exists() and not (folder / ONE_FILE).is_symlink():
            raise _problem(folder, f"has neither {ONE_FILE} nor {INDEX}.")
        return _header(folder / ONE_FILE)
    places = _table(folder / INDEX).get("weight_map")
    if not isinstance(places, dict):
        raise _problem(folder / INDEX, "has no weight_map.")
    if strange := [file for file in places.values() if not _is_name(file)]:
        raise _problem(folder / INDEX, f"names {strange[0]!r}, which is no file of the folder.")
    found = {file: _header(folder / file) for file in sorted(set(places.values()))}
    if lost := sorted(name for name, file in places.items() if name not in found[file]):
        raise _problem(folder / INDEX, f"names {lost[0]} in {places[lost[0]]}, where it is not.")
    return {name: found[file][name] for name, file in places.items()}


def _refuse_pickled(folder: Path) -> None:
    """Raise PlanError, with how to convert them, if there are files whose reading runs code."""
    pickled = (
        sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED) if folder.is_dir() else []
    )
    if pickled:
        message = f"is pickled ({Path(pickled[0]).suffix}), which is never read here: {pickled[0]} may run any code."
        remedy = (
            "Convert it where you trust it: AutoModel.from_pretrained(folder).save_pretrained(new), with the class "
            "that config.json names."
        )
        raise PlanError([Problem(str(folder), message, remedy)])


def _is_name(file: object) -> bool:
    """Whether this names a file in a folder, not one elsewhere."""
    return isinstance(file, str) and file not in {"", ".", ".."} and "/" not in file and "\0" not in file


def _header(path: Path) -> dict[str, PublishedTensor]:
    """Return the tensors of a file, and check that it is complete."""
    try:
        if path.exists() and not path.is_file():
            raise _problem(path, "is no regular file.")
        return {name: PublishedTensor(path.name, stored) for name, stored in header_of(path).items()}
    except OSError as error:
        raise _problem(path, f"cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise _problem(path, f"is no whole file of safetensors: it {error}.") from None


def _table(path: Path) -> dict[str, Any]:
    try:
        table = json_of(read_text(path, _REMEDY))
    except ValueError as error:
        raise _problem(path, f"is no JSON that can be read: {error}.") from None
    if not isinstance(table, dict):
        raise _problem(path, "holds no table.")
    return table


def _problem(path: Path, message: str, remedy: str = _REMEDY) -> PlanError:
    return PlanError([Problem(str(path), message, remedy)])
