"""FLOPs: the floating point operations of every stage, for the rows and tokens that samples really have.

A module is a chain of *products*, in the order in which data passes them: the embedding of rows, per layer
queries-keys-values, attention, its output, the two of the MLP (of `top_k` experts), at the end the head and the
projectors of its edges, each a branch that nothing follows. A product of T rows with an [m, n] matrix is 2*T*m*n
operations, and so is each of its two gradients:

    the gradient of its inputs     if anything before it trains, in the chain or upstream of the module
    the gradient of its weights    if its matrix trains

Attention has no weights: 4 * hidden operations forward per pair of a query and a key, and twice that backward, if
anything before it trains. A causal segment of L positions has L (L + 1) / 2 pairs, any other L^2, and a
layer of a tower with windows those within them. A window of a causal layer does not make them fewer here, as local
layers compute all pairs and mask those outside. So frozen layers with something trainable upstream have only gradients
of their inputs; with nothing trainable upstream they have none.

Embedding look-ups, norms, activations and rotations are not counted: they are no products, and small. Recomputation is
counted apart: it takes time, and is no work of the model. A module of the user's own counts as nothing, since the plan
does not know its parts.

>>> from mimogrid.core.job.models import Vit
>>> load = Load.of([3], causal=False)
>>> load
Load(positions=3, pairs=9, rows=3, emitted=3, windowed=0.0)
>>> entry, layer, exit = units(Vit(layers=1, hidden=4, heads=2, features=5), load, {"input.weight"})
>>> entry.forward == 2 * 3 * 5 * 4, layer.forward == 2 * 3 * 4 * (12 + 4 + 16 + 16) + 4 * 9 * 4
(True, True)
>>> layer.input_gradient == 2 * layer.forward - 2 * 3 * 4 * (12 + 4 + 16 + 16), layer.weight_gradient
(True, 0.0)

Sources: Narayanan et al. 2021 (arXiv 2104.04473, appendix) for the layer; torch's `FlopCounterMode` counts the same,
except that it does not halve causal attention.
"""

import collections
import functools
import math
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import attrs

from mimogrid.core.base.row import pairs
from mimogrid.core.base.samples import prefix_sums
from mimogrid.core.job.lora import Lora, adapters
from mimogrid.core.job.models import CONVOLUTION, PROJECTOR, BuiltIn, Gpt, Own, Regressor, Vit
from mimogrid.core.step.step import Step
from mimogrid.core.topology.topology import Edge, Module, Stage, StageInfo, Topology


_Part = TypeVar("_Part")


@attrs.frozen(kw_only=True)
class Flops:
    """Floating point operations; `recomputed` are forward operations that the backward repeats."""

    forward: float = 0.0
    input_gradient: float = 0.0
    weight_gradient: float = 0.0
    recomputed: float = 0.0

    @property
    def model(self) -> float:
        """The operations of the model in any layout: without recomputation."""
        return self.forward + self.input_gradient + self.weight_gradient

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            forward=self.forward + other.forward,
            input_gradient=self.input_gradient + other.input_gradient,
            weight_gradient=self.weight_gradient + other.weight_gradient,
            recomputed=self.recomputed + other.recomputed,
        )

    def __mul__(self, factor: float) -> "Flops":
        return Flops(
            forward=self.forward * factor,
            input_gradient=self.input_gradient * factor,
            weight_gradient=self.weight_gradient * factor,
            recomputed=self.recomputed * factor,
        )


@attrs.frozen
class Load:
    """The size of a module's input.

    Attributes:
        positions: positions in the layers; of a rank's row, with those that round it up.
        pairs: pairs of a query and a key that it may see.
        rows: rows that the module reads.
        emitted: rows that it emits, which the head and the projectors read.
        windowed: pairs in those layers of a tower that attend within windows.
    """

    positions: float = 0.0
    pairs: float = 0.0
    rows: float = 0.0
    emitted: float = 0.0
    windowed: float = 0.0

    @classmethod
    def of(cls, lengths: Sequence[int], *, causal: bool) -> "Load":
        """Return the load of segments of these lengths, with a row read and emitted for each position."""
        total = sum(lengths)
        return cls(total, pairs(lengths, causal=causal), total, total)

    @classmethod
    def units(cls) -> "tuple[Load, ...]":
        """Return a load of one for each count."""
        names = [field.name for field in attrs.fields(cls)]
        return tuple(cls(**{name: 1.0}) for name in names)

    def __mul__(self, factor: float) -> "Load":
        positions, pairs_, rows = factor * self.positions, factor * self.pairs, factor * self.rows
        return Load(positions, pairs_, rows, factor * self.emitted, factor * self.windowed)


@attrs.frozen
class Loads:
    """The loads of the samples of a step in one module, each count summed up to every sample."""

    counts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, step: Step, name: str) -> "Loads":
        """Return those of a module."""
        return cls(tuple(prefix_sums(counts) for counts in columns_of(step, name)))

    def __len__(self) -> int:
        return len(self.counts[0]) - 1

    def over(self, samples: range) -> Load:
        """Return the load of contiguous samples."""
        return Load(*(sums[samples.stop] - sums[samples.start] for sums in self.counts))

    def sums(self, shares: Sequence[range]) -> Load:
        """Return the load of several ranges of samples together."""
        return Load(*(sum(sums[s.stop] - sums[s.start] for s in shares) for sums in self.counts))

    def positions(self, shares: Sequence[range]) -> list[int]:
        """Return the positions of each of several ranges of samples."""
        positions, *_ = self.counts
        return [positions[share.stop] - positions[share.start] for share in shares]

    @property
    def mean(self) -> Load:
        """The mean load of a sample."""
        return self.over(range(len(self))) * (1 / len(self))

    @property
    def largest(self) -> int:
        """The first sample with most positions."""
        return max(range(len(self)), key=lambda i: self.over(range(i, i + 1)).positions)


def columns_of(step: Step, name: str) -> tuple[list[int], ...]:
    """Return the counts of `Load` of all samples of a step in a module, count by count."""
    model, node = step.topology.modules[name].model, step.topology.graph.nodes[name]
    sizes, samples = step.sizes, step.samples
    positions, emitted = [of.positions[name] for of in sizes], [of.rows[name] for of in sizes]
    if node.is_source:
        read = [sample.rows.get(name, 0) for sample in samples]
    else:
        of_feeders = [[of.rows[feeder] for of in sizes] for feeder in node.feeders]
        read = list(map(sum, zip(*of_feeders, strict=True))) or [0] * len(samples)
    segments = [of.segments[name] for of in sizes]
    squares = {lengths: sum(map(operator.mul, lengths, lengths)) for lengths in set(segments)}
    pairs_ = list(map(squares.__getitem__, segments))
    if model.causal:
        pairs_ = [(square + length) // 2 for square, length in zip(pairs_, positions, strict=True)]
    windowed = [0] * len(samples)
    if isinstance(model, Vit) and model.window:
        windowed = [sum(map(model.window_pairs, sample.grids(name))) for sample in samples]
    return positions, pairs_, read, emitted, windowed


# -- of a step ---------------------------------------------------------------------------------------------


def stage_flops(step: Step) -> Mapping[Stage, Flops]:
    """Return the operations of each stage in a microbatch, all dp ranks together: the mean over the step."""
    return {
        info.stage: sum_of(of_units(info, own) if own else ())
        for module in step.topology.modules.values()
        for own in (module_units(step.topology, module, _mean(step, module)),)
        for info in module.stages
    }


def model_flops(step: Step) -> Mapping[str, float]:
    """Return the operations of each module in the whole step, without recomputation, as MFU counts them."""
    found = dict.fromkeys(step.topology.modules, 0.0)
    for stage, flops in stage_flops(step).items():
        found[stage.module] += flops.model * step.topology.modules[stage.module].microbatches
    return found


def sample_flops(step: Step) -> list[float]:
    """Return the operations of each sample of a step in all modules together, without recomputation."""
    found = [0.0] * len(step.samples)
    for name, module in step.topology.modules.items():
        per_unit = [sum_of(parts).model for parts in units_of_counts(step.topology, module)]
        for counts, each in zip(columns_of(step, name), per_unit, strict=True):
            found = [total + each * count for total, count in zip(found, counts, strict=True)]
    return found


def in_row(module: Module, load: Load) -> Load:
    """Return the load of a share as it is computed: its row is rounded up (`Module.row_shape`)."""
    return attrs.evolve(load, positions=module.row_shape(int(load.positions))[0]) if load.positions else load


def _mean(step: Step, module: Module) -> Load:
    """Return the load of a microbatch of a module, all dp ranks together: the mean over the step."""
    if isinstance(module.model, Own):
        return Load()
    loads = Loads.of(step, module.name)
    return loads.over(range(len(loads))) * (1 / module.microbatches)


# -- of a module -------------------------------------------------------------------------------------------


def units(
    model: BuiltIn,
    load: Load,
    trainable: Collection[str],
    *,
    edges: Sequence[Edge] = (),
    trains_upstream: bool = False,
    recompute: str = "none",
    lora: Lora | None = None,
) -> tuple[Flops, ...]:
    """Return the operations of a module in parts that no stage cuts: the entry, each layer, the exit.

    `trainable` has the names of parameters that train, `edges` those that leave the module, and `lora` what is beside
    its linear layers.
    """
    parts = _terms(
        model, trainable, edges=edges, trains_upstream=trains_upstream, recompute=recompute, lora=lora
    )
    return measured(parts, lambda product: product.operations(load))


@functools.lru_cache(maxsize=256)
def alike_layers(model: BuiltIn, trainable: frozenset[str]) -> tuple[int, ...]:
    """Return, for each layer of a model, the first one with equal widths of which the same parameters train."""
    trained: dict[str, set[str]] = collections.defaultdict(set)
    for name in trainable:
        words = name.split(".", 2)
        if words[0] == "layers":
            trained[words[1]].add(words[-1])
    first: dict[object, int] = {}
    kinds = (
        (model.mlp_widths(layer), model.has_experts(layer), windowed, frozenset(trained[str(layer)]))
        for layer in range(model.layers)
        for windowed in (isinstance(model, Vit) and model.window_of(layer),)
    )
    return tuple(first.setdefault(kind, layer) for layer, kind in enumerate(kinds))


def of_units(info: StageInfo, parts: Sequence[_Part]) -> Iterator[_Part]:
    """Yield the parts of a module (see `units`) that a stage has."""
    if info.first:
        yield parts[0]
    for layer in info.layers:
        yield parts[1 + layer]
    if info.last:
        yield parts[-1]


def sum_of(parts: Iterable[Flops]) -> Flops:
    """Add operations up."""
    return sum(parts, start=Flops())


def module_units(topology: Topology, module: Module, load: Load) -> tuple[Flops, ...]:
    """Return `units` of a module of a job; nothing for a module of the user's own."""
    return measured(module_terms(topology, module), lambda product: product.operations(load))


def module_terms(topology: Topology, module: Module) -> "tuple[Terms, ...]":
    """Return what a module does in each part that no stage cuts; nothing for a module of the user's own."""
    if isinstance(module.model, Own):
        return ()
    return _terms(
        module.model,
        trainable_of(topology, module.name),
        edges=module.outputs,
        trains_upstream=module.stages[0].trains_upstream,
        recompute=topology.spec.modules[module.name].recompute,
        lora=module.lora,
    )


def measured(parts: "Sequence[Terms]", measure: "Measure") -> tuple[Flops, ...]:
    """Return what the parts of a module come to if `measure` says what each product does.

    With `Product.operations` these are operations. Parts that are alike are measured once.
    """
    known: dict[int, Flops] = {}
    for terms in parts:
        if id(terms) not in known:
            known[id(terms)] = _sum_of_terms(terms, measure)
    return tuple(known[id(terms)] for terms in parts)


def _sum_of_terms(terms: "Terms", measure: "Measure") -> Flops:
    forward = inputs = weights = again = 0.0
    for term in terms:
        out, back, own = measure(term.product)
        forward += out
        inputs += back * term.inputs
        weights += own * term.weights
        again += out * term.again
    return Flops(forward=forward, input_gradient=inputs, weight_gradient=weights, recomputed=again)


def units_of_counts(topology: Topology, module: Module) -> tuple[tuple[Flops, ...], ...]:
    """Return `module_units` for each count of a load alone; operations are linear in these counts."""
    return tuple(module_units(topology, module, one) for one in Load.units())


@functools.lru_cache(maxsize=256)
def trainable_of(topology: Topology, name: str) -> frozenset[str]:
    """Return the names of the parameters of a module that train."""
    return frozenset[str]().union(*(info.trainable for info in topology.modules[name].stages))


# -- chains of products ------------------------------------------------------------------------------------


PAIRS, WINDOWED = "pairs", "windowed"
OUT, IN, WHOLE = "out", "in", ""
"""The width of a matrix that ranks along tp share: the one that it gives, or the one that it reads; or neither."""


@attrs.frozen
class Product:
    """A product along the chain: of rows with a matrix, or of pairs of attention.

    Attributes:
        name: the prefix of its parameters' names. Attention has none. A norm has no operations here, and can train.
        rows: which count of a `Load` it has rows of; empty for a norm.
        width_in, width_out: those of its matrix. For attention all widths of heads together stand for a matrix of
            two rows: one for queries with keys, one for values. Ranks along tp share these.
        copies, per_row: the number of experts, and to how many of them a row goes.
        split: the width that ranks along tp share.
    """

    name: str
    rows: str = ""
    width_in: int = 0
    width_out: int = 0
    copies: int = 1
    per_row: int = 1
    split: str = WHOLE

    @property
    def is_attention(self) -> bool:
        """Whether it is one of pairs."""
        return self.rows in {PAIRS, WINDOWED}

    def operations(self, load: Load) -> tuple[float, float, float]:
        """Return its operations for a load: forward, and of the gradients of its inputs and of its weights."""
        if not self.rows:
            return 0.0, 0.0, 0.0
        each = 2 * getattr(load, self.rows) * self.width_in * self.width_out * self.per_row
        return (each, 2 * each, 0.0) if self.is_attention else (each, each, each)


Measure = Callable[[Product], tuple[float, float, float]]
"""Says what a product comes to: forward, the gradient of its inputs, the gradient of its weights."""


@attrs.frozen
class Term:
    """A product, and how much of its gradients is wanted and of its forward is computed again."""

    product: Product
    inputs: float
    weights: float
    again: float


Terms = tuple[Term, ...]

_Chain = tuple["Product | _Chain", ...]
"""Products in order; a chain within is a branch, which nothing follows."""


def _terms(
    model: BuiltIn,
    trainable: Collection[str],
    *,
    edges: Sequence[Edge],
    trains_upstream: bool,
    recompute: str,
    lora: Lora | None,
) -> tuple[Terms, ...]:
    """Return the terms of each part of a module; layers that are alike have one value."""
    names, beside, before = frozenset(trainable), _beside(model, lora), trains_upstream
    alike = alike_layers(model, names) if lora is None else range(model.layers)
    found: list[Terms] = []
    known: dict[tuple[int, bool], tuple[Terms, bool]] = {}

    def chain_of(part: int) -> _Chain:
        if part < 0:
            return tuple(_entry(model))
        if part == model.layers:
            return (Product("final_norm"), *_exit(model, edges))
        return tuple(
            each for product in _layer(model, part) for each in (product, *beside.get(product.name, ()))
        )

    for part in (-1, *alike, model.layers):
        if (part, before) not in known:
            known[part, before] = _of_chain(chain_of(part), names, before, recompute)
        terms, before = known[part, before]
        found.append(terms)
    return tuple(found)


def _entry(model: BuiltIn) -> Iterator[Product]:
    if isinstance(model, Gpt):
        yield Product("embedding")
    if not isinstance(model, Vit):
        return
    hidden, features = model.hidden, model.features or 0
    if model.stem == "whisper":
        yield Product("input.conv1", "rows", CONVOLUTION * features, hidden)
        yield Product("input.conv2", "positions", CONVOLUTION * hidden, hidden)
    else:
        yield Product("input", "rows", features, hidden)
    yield from map(Product, ("positions", "class_token", "pre_norm"))


def _layer(model: BuiltIn, layer: int) -> Iterator[Product]:
    prefix = f"layers.{layer}."

    def linear(
        name: str, width_in: int, width_out: int, split: str = OUT, *, copies: int = 1, per_row: int = 1
    ) -> Product:
        return Product(
            prefix + name, "positions", width_in, width_out, copies=copies, per_row=per_row, split=split
        )

    hidden, inner = model.hidden, model.heads * model.head_width
    yield Product(f"{prefix}attention_norm")
    yield linear("attention.qkv", hidden, model.qkv_width)
    windowed = isinstance(model, Vit) and model.window_of(layer)
    yield Product("", WINDOWED if windowed else PAIRS, 2, inner, split=OUT)
    yield linear("attention.out", inner, hidden, IN)
    yield Product(f"{prefix}mlp_norm")
    up, down = model.mlp_widths(layer)
    if model.has_experts(layer):
        experts, top_k = model.experts, model.top_k
        yield linear("mlp.router", hidden, experts)
        yield linear("mlp.experts.{}.up", hidden, up // top_k, copies=experts, per_row=top_k)
        yield linear("mlp.experts.{}.down", down // top_k, hidden, IN, copies=experts, per_row=top_k)
    else:
        yield linear("mlp.up", hidden, up)
        yield linear("mlp.down", down, hidden, IN)


def _beside(model: BuiltIn, lora: Lora | None) -> Mapping[str, Sequence[Product]]:
    """Return the products of LoRA, by the name of the one that they are beside.

    They follow it in the chain, so B has a gradient of its inputs, and so has all that comes behind.
    """
    found: dict[str, list[Product]] = {}
    if lora is None:
        return found
    for adapter in adapters(model, lora):
        found.setdefault(adapter.weight, []).extend(
            (
                Product(f"{adapter.prefix}.a", "positions", adapter.width_in, lora.rank, split=IN),
                Product(f"{adapter.prefix}.b", "positions", lora.rank, adapter.width_out, split=OUT),
            )
        )
    return found


def _exit(model: BuiltIn, edges: Sequence[Edge]) -> Iterator[_Chain]:
    if isinstance(model, Gpt):
        name = "embedding" if model.tied_embeddings else "output"
        yield (Product(name, "emitted", model.hidden, model.vocab_rows, split=OUT),)
    if isinstance(model, Regressor):
        yield (Product("output", "emitted", model.hidden, model.outputs),)
    for edge in edges:
        if edge.projector:
            name = f"{PROJECTOR}{edge.target}"
            names = (name, *(f"{name}.deepstack.{i}" for i in range(edge.parts - 1)))
            yield from (tuple(_projector(each, edge, model)) for each in names)


def _projector(name: str, edge: Edge, model: BuiltIn) -> Iterator[Product]:
    """Yield the products of what makes a row for the target of each row of a module."""
    assert edge.projector
    wide, width = model.row_width, edge.width // edge.parts
    if edge.projector.kind == "linear":
        yield Product(name, "emitted", wide, width)
        return
    inner = edge.projector.inner(model, width)
    yield Product(f"{name}.norm")
    yield Product(f"{name}.up", "emitted", wide, inner)
    yield Product(f"{name}.down", "emitted", inner, width)


def _of_chain(chain: _Chain, trainable: Collection[str], before: bool, recompute: str) -> tuple[Terms, bool]:
    """Return the terms of a chain, and whether anything trains in it or before it, branches apart."""
    own: list[Term] = []
    branches: list[Term] = []
    for product in chain:
        if isinstance(product, tuple):
            branches += _of_chain(product, trainable, before, recompute)[0]
            continue
        weight, other = _trains(product, trainable)
        again = recompute == "selective" and product.is_attention and before
        if product.rows:
            own.append(Term(attrs.evolve(product, name=""), float(before), weight, float(again)))
        before = before or weight > 0 or other
    in_layers = any(term.product.is_attention for term in own)
    if recompute == "full" and in_layers and before:
        own = [attrs.evolve(term, again=1.0) for term in own]
    return (*own, *branches), before


def _trains(product: Product, trainable: Collection[str]) -> tuple[float, bool]:
    """Return the part of a product's matrices that trains, and whether one of its biases does."""
    if not product.name:
        return 0.0, False
    names = [product.name.format(i) for i in range(product.copies)]
    weights = [name in trainable or f"{name}.weight" in trainable for name in names]
    return math.fsum(weights) / len(weights), any(f"{name}.bias" in trainable for name in names)
