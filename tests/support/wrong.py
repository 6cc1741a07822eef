"""Wrong: legal jobs of `layouts`, each spoiled in one way that has a name.

A way takes the table of a legal job, as the file has it, and the name of a module that it fits; it changes the
table and says where the mistake must be found (one of these places). No way needs torch.
"""

import copy
import math
import tomllib
from collections.abc import Callable, Mapping
from typing import Any

import attrs
from hypothesis import strategies as st

from layouts import layouts
from mimogrid.core.job.models import Vit
from mimogrid.core.job.placement import graph_of
from mimogrid.core.job.spec import JobSpec
from mimogrid.shell.job import jobfile


Table = dict[str, Any]
Fits = Callable[[JobSpec, str], bool]
Spoil = Callable[[Table, str, st.DrawFn], str | tuple[str, ...]]


@attrs.frozen
class Way:
    """A way to go wrong: for which modules of a job, and how."""

    fits: Fits
    spoil: Spoil


@attrs.frozen
class Wrong:
    """A job file that must be refused, and the places of which one must be named."""

    text: str
    places: tuple[str, ...]


WAYS: dict[str, Way] = {}


@st.composite
def wrong_jobs(draw: st.DrawFn, name: str) -> Wrong:
    """Draw a job that is wrong in the way of a name."""
    way = WAYS[name]
    spec = draw(layouts().filter(lambda spec: any(way.fits(spec, module) for module in spec.modules)))
    module = draw(st.sampled_from([module for module in spec.modules if way.fits(spec, module)]))
    table = tomllib.loads(jobfile.dump(spec))
    for each in table["modules"].values():
        for inner in ("grid", "options", "feeds"):
            each.setdefault(inner, [] if inner == "feeds" else {})
    places = way.spoil(table, module, draw)
    return Wrong(written(table), (places,) if isinstance(places, str) else places)


def written(table: Mapping[str, Any]) -> str:
    """Write a table as a job file, whatever is in it."""
    import tomlkit  # noqa: PLC0415

    return tomlkit.dumps(table)


def way(name: str, fits: Fits = lambda _spec, _name: True) -> Callable[[Spoil], Spoil]:
    """Enter a way under its name."""

    def enter(spoil: Spoil) -> Spoil:
        WAYS[name] = Way(fits, spoil)
        return spoil

    return enter


# -- which modules -----------------------------------------------------------------------------------------


def is_gpt(spec: JobSpec, name: str) -> bool:
    """A language model."""
    return spec.modules[name].model == "gpt"


def is_fed_freely(spec: JobSpec, name: str) -> bool:
    """Anything may feed it."""
    return spec.modules[name].model != "vit"


def feeds_some(spec: JobSpec, name: str) -> bool:
    """It feeds another."""
    return bool(spec.modules[name].feeds)


def is_used_only(spec: JobSpec, name: str) -> bool:
    """It has no loss, and is there for those it feeds."""
    return spec.modules[name].model in {"vit", "block"}


def has_own_loss(spec: JobSpec, name: str) -> bool:
    """It has a loss."""
    return not is_used_only(spec, name)


def is_source(spec: JobSpec, name: str) -> bool:
    """The data has rows for it."""
    return name in graph_of(spec).sources


def is_beside_vit(spec: JobSpec, name: str) -> bool:
    """Some other module is a vit."""
    return any(isinstance(m.options, Vit) for other, m in spec.modules.items() if other != name)


# -- text --------------------------------------------------------------------------------------------------


@way("an unknown key of a grid")
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    key = draw(st.sampled_from(("ttp", "ofset", "ranks")))
    job["modules"][name]["grid"][key] = 2
    return f"modules.{name}.grid.{key}"


@way("an unknown key of a module")
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    key = draw(st.sampled_from(("feed", "colour", "tp")))
    job["modules"][name][key] = 2
    return f"modules.{name}.{key}"


@way("an unknown option")
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    key = draw(st.sampled_from(("hiden", "depth", "pp")))
    job["modules"][name]["options"][key] = 2
    return f"modules.{name}.options.{key}"


@way("an unknown table")
def _(job: Table, _name: str, draw: st.DrawFn) -> str:
    key = draw(st.sampled_from(("trian", "models", "logging")))
    job[key] = {"steps": 1}
    return key


@way("a missing table")
def _(job: Table, _name: str, draw: st.DrawFn) -> str:
    key = draw(st.sampled_from(("modules", "data", "batch")))
    del job[key]
    return key


@way("a module without a model")
def _(job: Table, name: str, _draw: st.DrawFn) -> str:
    del job["modules"][name]["model"]
    return f"modules.{name}.model"


@way("a value of another type")
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    key = draw(st.sampled_from(("tp", "dp", "pp", "offset")))
    job["modules"][name]["grid"][key] = draw(st.sampled_from(("two", 1.5, True, [1])))
    return f"modules.{name}.grid.{key}"


# -- names -------------------------------------------------------------------------------------------------


UNKNOWN = {
    "precision": "fp23",
    "schedule.name": "1b1f",
    "optimizer.name": "adamv",
    "optimizer.decay": "cosin",
    "data.source": "synthetik",
}


@way("an unknown name of the job")
def _(job: Table, _name: str, draw: st.DrawFn) -> str:
    return put(job, *draw(st.sampled_from(sorted(UNKNOWN.items()))))


@way("an unknown model")
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    job["modules"][name]["model"] = draw(st.sampled_from(("vitt", "llama", "own.encoder")))
    return f"modules.{name}.model"


@way("an unknown recomputation")
def _(job: Table, name: str, _draw: st.DrawFn) -> str:
    job["modules"][name]["recompute"] = "selectiv"
    return f"modules.{name}.recompute"


@way("a module called like a tensor")
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    taken = draw(st.sampled_from(("rows", "tokens", "loss", "lengths")))
    job["modules"][taken] = copy.deepcopy(job["modules"][name])
    return f"modules.{taken}"


@way("a builder that is not there")
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    builder = draw(st.sampled_from(("nowhere.at:all", "json:encoderr", "json.nothing:build")))
    job["modules"][name] |= {"model": builder, "options": {}, "width": 8}
    return f"modules.{name}.model"


@way("an own module that is cut")
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    axis = draw(st.sampled_from(("tp", "cp", "pp")))
    module = job["modules"][name]
    job["modules"][name] = {"model": "json:dumps", "options": {}, "width": 8, "feeds": module["feeds"]}
    job["modules"][name]["grid"] = {axis: 2}
    return f"modules.{name}.grid.{axis}"


# -- the graph ---------------------------------------------------------------------------------------------


@way("a misspelt module in feeds", feeds_some)
def _(job: Table, name: str, _draw: st.DrawFn) -> str:
    feeds = job["modules"][name]["feeds"]
    feeds[0] = f"{feeds[0]}x"
    return f"modules.{name}.feeds"


@way("a target named twice", feeds_some)
def _(job: Table, name: str, _draw: st.DrawFn) -> str:
    feeds = job["modules"][name]["feeds"]
    feeds.append(feeds[0])
    return f"modules.{name}.feeds"


@way("a module that feeds itself", is_fed_freely)
def _(job: Table, name: str, _draw: st.DrawFn) -> str:
    job["modules"][name]["feeds"].append(name)
    return f"modules.{name}.feeds"


@way("a cycle", lambda spec, name: is_fed_freely(spec, name) and feeds_some(spec, name))
def _(job: Table, name: str, draw: st.DrawFn) -> tuple[str, ...]:
    target = draw(st.sampled_from(job["modules"][name]["feeds"]))
    job["modules"][target]["feeds"].append(name)
    return tuple(f"modules.{module}.feeds" for module in job["modules"])


@way("rows for a vit", is_beside_vit)
def _(job: Table, name: str, _draw: st.DrawFn) -> str:
    vits = [other for other, module in job["modules"].items() if module["model"] == "vit" and other != name]
    job["modules"][name]["feeds"].append(vits[0])
    return f"modules.{name}.feeds"


@way("a module that nobody uses", is_used_only)
def _(job: Table, name: str, _draw: st.DrawFn) -> str:
    job["modules"][name]["feeds"] = []
    return f"modules.{name}"


# -- sizes -------------------------------------------------------------------------------------------------


def put(job: Table, place: str, value: Any) -> str:
    """Put a value at a dotted place of a job; return the place."""
    *path, key = place.split(".")
    for step in path:
        job = job.setdefault(step, {})
    job[key] = value
    return place


SIZES = ("grid.tp", "grid.cp", "grid.dp", "grid.pp", "grid.ep", "options.layers", "options.hidden", "chunks")


@way("a size of nothing")
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    key = draw(st.sampled_from((*SIZES, "options.heads", "microbatches")))
    return put(job, f"modules.{name}.{key}", draw(st.sampled_from((0, -1))))


@way("a number of the job that is too small")
def _(job: Table, _name: str, draw: st.DrawFn) -> str:
    least = {"batch.global_size": 1, "batch.microbatches": 1, "seed": 0, "train.steps": 0, "train.threads": 1}
    place, value = draw(st.sampled_from(sorted(least.items())))
    return put(job, place, value - draw(st.integers(1, 3)))


@way("a number that is none")
def _(job: Table, _name: str, draw: st.DrawFn) -> str:
    keys = ("lr", "eps", "clip_norm", "weight_decay", "final_lr_fraction")
    value = draw(st.sampled_from((math.nan, math.inf, -1.0)))
    return put(job, f"optimizer.{draw(st.sampled_from(keys))}", value)


@way("a negative offset")
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    return put(job, f"modules.{name}.grid.offset", -draw(st.integers(1, 4)))


@way("an order of other axes")
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    orders: tuple[list[str], ...] = (["tp", "dp"], ["tp", "tp", "dp", "pp"], [], ["tp", "cp", "dp", "ep"])
    return put(job, f"modules.{name}.grid.order", draw(st.sampled_from(orders)))


@way("a world that is too small")
def _(job: Table, _name: str, draw: st.DrawFn) -> tuple[str, ...]:
    ends = [
        module["grid"]["offset"] + math.prod(module["grid"].get(axis, 1) for axis in ("tp", "cp", "dp", "pp"))
        for module in job["modules"].values()
    ]
    job["world_size"] = draw(st.integers(0, max(ends) - 1))
    if not job["world_size"]:
        return ("world_size",)
    places = zip(job["modules"], ends, strict=True)
    return tuple(f"modules.{name}.grid" for name, end in places if end > job["world_size"])


@way("heads that tp does not divide")
def _(job: Table, name: str, _draw: st.DrawFn) -> str:
    return put(job, f"modules.{name}.grid.tp", 3)


@way("key-value heads that heads do not share")
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    return put(job, f"modules.{name}.options.kv_heads", draw(st.sampled_from((3, 5, 8))))


@way("heads that do not divide the width")
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    # Three do not divide it; as many as there are numbers leave one to each, which no rotation pairs.
    hidden = job["modules"][name]["options"]["hidden"]
    return put(job, f"modules.{name}.options.heads", draw(st.sampled_from((3, hidden))))


@way("a vocabulary that tp does not divide", is_gpt)
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    job["modules"][name]["options"]["vocab"] = draw(st.sampled_from((13, 15)))
    return put(job, f"modules.{name}.grid.tp", 2)


@way("layers that pp does not divide")
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    module = job["modules"][name]
    module.pop("split", None)
    return put(job, f"modules.{name}.grid.pp", module["options"]["layers"] + draw(st.integers(1, 3)))


@way("a split of other layers")
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    module = job["modules"][name]
    layers, pp = module["options"]["layers"], module["grid"].get("pp", 1)
    rest = [1] * (pp - 1)
    splits = ([layers + 1, *rest], [layers - pp + 1, *rest, 0], [layers + 1, -1, *rest])
    return put(job, f"modules.{name}.split", draw(st.sampled_from(splits)))


@way("an own width of a built-in model")
def _(job: Table, name: str, _draw: st.DrawFn) -> str:
    return put(job, f"modules.{name}.width", 8)


@way("a dropout of everything")
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    return put(job, f"modules.{name}.options.dropout", draw(st.sampled_from((1.0, -0.1, math.nan))))


# -- the batch ---------------------------------------------------------------------------------------------


@way("more dp ranks than samples")
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    count = job["modules"][name].get("microbatches") or job["batch"].get("microbatches", 1)
    samples = job["batch"]["global_size"] // count
    return put(job, f"modules.{name}.grid.dp", samples + draw(st.integers(1, 3)))


@way("microbatches that do not divide the batch")
def _(job: Table, _name: str, draw: st.DrawFn) -> str:
    return put(job, "batch.microbatches", job["batch"]["global_size"] + draw(st.integers(1, 3)))


@way("own microbatches that do not divide the batch")
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    more = job["batch"]["global_size"] + draw(st.integers(1, 3))
    return put(job, f"modules.{name}.microbatches", more)


@way("own microbatches in no whole ratio")
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    job["batch"] = {"global_size": 12 * job["batch"]["global_size"], "microbatches": 4}
    return put(job, f"modules.{name}.microbatches", draw(st.sampled_from((3, 6))))


# -- what trains -------------------------------------------------------------------------------------------


@way("both frozen and trainable")
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    job["modules"][name] |= {"frozen": draw(st.sampled_from((True, ["*"]))), "trainable": ["*"]}
    return f"modules.{name}"


@way("a pattern that matches nothing")
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    module, key = job["modules"][name], draw(st.sampled_from(("frozen", "trainable")))
    module.pop("frozen", None)
    module.pop("trainable", None)
    pattern = draw(st.sampled_from(("layers.99.*", "projector.nobody.*", "Layers.0.*", "")))
    return put(job, f"modules.{name}.{key}", ["*", pattern])


@way("a weight without a loss", is_used_only)
def _(job: Table, name: str, _draw: st.DrawFn) -> str:
    return put(job, f"modules.{name}.loss_weight", 2.0)


@way("a weight that is no number", has_own_loss)
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    return put(job, f"modules.{name}.loss_weight", draw(st.sampled_from((math.nan, math.inf))))


# -- experts -----------------------------------------------------------------------------------------------


def expert(job: Table, name: str, *, dp: int, **options: int) -> Table:
    """Give a module experts over dp ranks alone; return its grid."""
    module = job["modules"][name]
    offset = module["grid"]["offset"]
    module["grid"] = {"offset": offset, "dp": dp, "pp": module["grid"].get("pp", 1)}
    module["options"] |= {"aux_loss": 0.0, "top_k": 1, **options}
    return dict(module["grid"])


@way("experts that ep does not divide")
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    ep = draw(st.sampled_from((2, 4)))
    expert(job, name, dp=ep, experts=ep + 1)
    return put(job, f"modules.{name}.grid.ep", ep)


@way("ranks that ep does not divide")
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    expert(job, name, dp=draw(st.sampled_from((1, 3))), experts=4)
    return put(job, f"modules.{name}.grid.ep", 2)


@way("experts over ranks, and none there")
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    expert(job, name, dp=2, experts=0)
    put(job, f"modules.{name}.grid.{draw(st.sampled_from(('ep', 'expert_tp')))}", 2)
    return f"modules.{name}.options.experts"


@way("features that expert_tp does not divide")
def _(job: Table, name: str, _draw: st.DrawFn) -> str:
    expert(job, name, dp=7, experts=2)
    return put(job, f"modules.{name}.grid.expert_tp", 7)


@way("more experts chosen than there are")
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    experts = draw(st.integers(1, 4))
    expert(job, name, dp=1, experts=experts)
    return put(job, f"modules.{name}.options.top_k", experts + draw(st.integers(1, 2)))


# -- data --------------------------------------------------------------------------------------------------


@way("a sequence that is too short", is_gpt)
def _(job: Table, _name: str, draw: st.DrawFn) -> str:
    text = draw(st.integers(60, 70))
    job["data"]["options"] |= {"text": [1, text]}
    return put(job, "data.options.sequence", text - draw(st.sampled_from((4, 12))))


@way("rows of another width", is_source)
def _(job: Table, name: str, _draw: st.DrawFn) -> str:
    job["data"]["options"]["features"] = {name: 99}
    key = "features" if job["modules"][name]["model"] == "vit" else "hidden"
    return f"modules.{name}.options.{key}"


@way("no range and no chance", is_source)
def _(job: Table, name: str, draw: st.DrawFn) -> str:
    key, value = draw(st.sampled_from((("rows", [3, 2]), ("rows", [-1, 2]), ("absent", 1.5))))
    return put(job, f"data.options.{key}.{name}", value)


@way("rows of a module that is not there")
def _(job: Table, _name: str, draw: st.DrawFn) -> str:
    key, value = draw(st.sampled_from((("rows", [1, 2]), ("absent", 0.5))))
    return put(job, f"data.options.{key}.nobody", value)
