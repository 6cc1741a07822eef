"""Footprint: the bytes that a rank keeps all the time, and those of each microbatch that a stage has in flight.

Weights, gradients and what the optimizer keeps follow from the table of parameters, exactly. What a microbatch
in flight saves for its backward is an estimate: per layer and position the values that a pre-norm transformer
layer saves (inputs of norms and linears, queries, keys and values, what attention gives, the middle of the MLP twice),
per head one number of the softmax, and what the stem, the last norm and the projectors of a tower save. The kernels of
attention compute scores again in the backward; with dropout they are not used, and scores are saved for every pair. At
the ends of a stage it keeps what enters and leaves: the output that is sent, the input and output of the last norm,
logits.

Temporaries are an estimate, too. While a layer runs backward there are the gradients of its widest values, the layer's
values once more if they are recomputed, and one product: the gradient of the largest matrix before it is added. What
the head has saved is free by then; while it runs backward there is the gradient of the logits. A forward without
backward has the widest values of one layer. The allocator's losses are not included, nor is a module of the user's own.
"""

import functools
import math
from collections.abc import Iterable, Mapping

import attrs

from mimogrid.core.base.samples import Sample
from mimogrid.core.job.lora import adapters, held_in
from mimogrid.core.job.models import LAST, BuiltIn, Gpt, Own, Parameter, Vit
from mimogrid.core.job.placement import largest_sample
from mimogrid.core.job.precision import HALF, MAIN_BYTES, VALUE_BYTES
from mimogrid.core.step.cells import samples_per_cell
from mimogrid.core.step.step import SampleSizes, Step
from mimogrid.core.topology.topology import Edge, Link, Module, Stage, StageInfo, Topology
from mimogrid.core.update.buckets import local_size, optimizer_bytes


DROPPED = 3
"""Values that attention with dropout saves of a pair: its score, what is dropped, and what is left."""


@attrs.frozen
class Kept:
    """Bytes that a rank holds all the time."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer


@functools.lru_cache(maxsize=4096)
def kept(topology: Topology, rank: int) -> Kept:
    """Return the bytes that a rank holds all the time: weights, and for those that train gradients and optimizer."""
    weights = trained = 0
    for info in topology.role(rank).stages:
        of_stage = _held(topology, info.stage, topology.modules[info.stage.module].ep_rank_of(rank))
        weights, trained = weights + of_stage[0], trained + of_stage[1]
    return Kept(weights, MAIN_BYTES[topology.spec.precision] * trained, optimizer_bytes(topology, rank))


@functools.lru_cache(maxsize=4096)
def _held(topology: Topology, stage: Stage, ep: int) -> tuple[int, int]:
    """Return the bytes of the weights that a position along ep of a stage holds, and how many values train."""
    module, info = topology.modules[stage.module], topology.stages[stage]
    held = module.held(info, ep)
    weights = (local_size(module, each) * _value_bytes(topology, info, each) for each in held)
    return sum(weights), sum(local_size(module, each) for each in held if each.name in info.trainable)


def _value_bytes(topology: Topology, info: StageInfo, parameter: Parameter) -> int:
    """Return the bytes of a value of a weight in a network."""
    lora, trains = topology.modules[info.stage.module].lora, parameter.name in info.trainable
    return VALUE_BYTES[held_in(parameter, lora, topology.spec.precision, trains=trains)]


@attrs.frozen
class Computed:
    """What a rank computes of a microbatch in the layers of a stage: positions of its row, and pairs that attend."""

    positions: int
    pairs: float

    @classmethod
    def of(cls, step: Step, module: Module, dp_rank: int, microbatch: int) -> "Computed":
        """Return what each tp and cp rank of a dp rank computes."""
        positions, _ = step.shape(module.name, dp_rank, microbatch)
        chosen = step.samples_of(module.name, dp_rank, microbatch)
        # Only dropout keeps pairs.
        segments = (step.sizes[i].segments[module.name] for i in chosen if drops(module))
        return cls(positions // module.cp, sum(sum(n * n for n in of) for of in segments) / module.cp)


def drops(module: Module) -> bool:
    """Whether a module has dropout, as far as the plan knows."""
    return not isinstance(module.model, Own) and module.model.dropout > 0


def saved_values(module: Module, info: StageInfo, computed: Computed, recompute: str) -> float:
    """Return how many values a stage saves of a microbatch for its backward; 0 without a backward."""
    if isinstance(module.model, Own) or not info.backward:
        return 0.0
    kinds = _layer_kinds(module.model, info.layers)
    of_kind = {kind: _of_layer(module, module.model, kind, computed, recompute) for kind in set(kinds)}
    layers = sum(of_kind[kind] for kind in kinds)
    ends = _of_ends(module, module.model, info, computed) if isinstance(module.model, Vit) else 0.0
    beside = 0.0 if recompute == "full" else _beside(module, module.model, info, computed)
    return layers + ends + beside


def _beside(module: Module, model: BuiltIn, info: StageInfo, computed: Computed) -> float:
    """Return how many values LoRA saves: what each B reads, and with dropout the factors and inputs of each A."""
    if module.lora is None:
        return 0.0
    tp, lora = module.grid.extent("tp"), module.lora
    shared = tp if module.sequence_parallel else 1
    values = 0.0
    for adapter in adapters(model, lora):
        if adapter.layer in info.layers:
            values += lora.rank / (1 if adapter.column else shared)
            if lora.dropout:
                values += 2 * adapter.width_in / (shared if adapter.column else tp)
    return computed.positions * values


def _of_ends(module: Module, model: Vit, info: StageInfo, computed: Computed) -> float:
    """Return what a tower saves before its layers and behind them; every tp rank computes both whole."""
    tokens, hidden, saved = computed.positions, model.hidden, 0.0
    if info.first:
        # Every cp rank computes all positions. The first convolution gives two of them for one of the second.
        convolved = model.stem == "whisper"
        rows = model.emission.stride * (model.features or 0)
        saved += module.cp * tokens * (rows + hidden * (5 * convolved + model.pre_norm))
    if info.last:
        saved += tokens * hidden * model.final_norm / model.pool
        merged = tokens / (model.merge**2 * model.pool)
        saved += sum(edge.parts * merged * _of_projector(edge, model) for edge in module.outputs)
    return saved


def _of_projector(edge: Edge, model: Vit) -> float:
    """Return how many values of a row a projector saves: what comes in, before and behind a norm, and the middle."""
    projector = edge.projector
    if projector is None:
        return 0
    middle = 0 if projector.kind == "linear" else 2 * projector.inner(model, edge.width // edge.parts)
    return (1 + (projector.kind == "merger")) * model.row_width + middle


def _of_layer(module: Module, model: BuiltIn, layer: int, computed: Computed, recompute: str) -> float:
    tokens, tp = computed.positions, module.grid.extent("tp")
    shared = tp if module.sequence_parallel else 1
    inputs = tokens * model.hidden
    if recompute == "full":
        return inputs / shared
    # A gated MLP saves both halves of what comes in, the activated gate, their product; Megatron's a half once more.
    up, down = model.mlp_widths(layer)
    middle = 2 * up + (down if model.gated and not model.has_experts(layer) else 0)
    inner = model.heads * model.head_width
    saved: float = tokens * (model.qkv_width + inner + middle)
    if recompute != "selective":
        # Queries and keys once more as they are turned, and the output of each run besides that of the row.
        saved += tokens * (inner + model.kv_heads * model.head_width + inner + model.heads)
        saved += DROPPED * computed.pairs * drops(module) * model.heads
    return 4 * inputs / shared + saved / tp


def end_bytes(topology: Topology, info: StageInfo, computed: Computed) -> float:
    """Return the bytes that a stage saves of a microbatch besides its layers; 0 without a backward."""
    module = topology.modules[info.stage.module]
    model, tokens, width = module.model, computed.positions, VALUE_BYTES[topology.spec.precision]
    if isinstance(model, Own) or not info.backward:
        return 0.0
    tp = module.grid.extent("tp")
    hidden = tokens * model.hidden / (tp if module.sequence_parallel else 1)
    if not info.last:
        return width * hidden
    if isinstance(model, Vit):  # `saved_values` has the other values at the ends of a tower
        return width * tokens / (model.merge**2 * model.pool) * sum(edge.width for edge in module.outputs)
    return width * tokens * sum(edge.width for edge in module.outputs) + head_bytes(topology, info, computed)


def head_bytes(topology: Topology, info: StageInfo, computed: Computed) -> float:
    """Return the bytes that the last norm and the head save of a microbatch: free before layers run backward."""
    module = topology.modules[info.stage.module]
    model, width, tp = module.model, VALUE_BYTES[topology.spec.precision], module.grid.extent("tp")
    if isinstance(model, Own | Vit) or not info.last:
        return 0.0
    hidden = computed.positions * model.hidden / (tp if module.sequence_parallel else 1)
    # Logits, and what the loss keeps of them, which is fp32 at least.
    return 2 * width * hidden + _logits(module, computed) * (width + max(width, 4))


def logits_gradient_bytes(topology: Topology, info: StageInfo, computed: Computed) -> float:
    """Return the bytes of the gradient of the logits, while it is fp32 at least; 0 without a head."""
    width = max(VALUE_BYTES[topology.spec.precision], 4)
    return width * _logits(topology.modules[info.stage.module], computed) if info.last else 0.0


def _logits(module: Module, computed: Computed) -> float:
    model = module.model
    entries = model.vocab_rows if isinstance(model, Gpt) else 0
    return computed.positions * entries / module.grid.extent("tp")


@functools.lru_cache(maxsize=4096)
def _layer_kinds(model: BuiltIn, layers: range) -> tuple[int, ...]:
    """Return, for each of some layers, the first of them that is like it: most layers are alike."""
    first: dict[object, int] = {}
    return tuple(
        first.setdefault((model.mlp_widths(layer), model.has_experts(layer)), layer) for layer in layers
    )


def forward_temporaries(module: Module, info: StageInfo, computed: Computed) -> float:
    """Return the most values that a forward without backward has at once."""
    model = module.model
    if isinstance(model, Own):
        return 0.0
    kinds = set(_layer_kinds(model, info.layers))
    return max((_widest(module, model, layer, computed) for layer in kinds), default=0.0)


def backward_temporaries(module: Module, info: StageInfo, computed: Computed, recompute: str) -> float:
    """Return the most values of activations that a backward has at once, besides what was saved."""
    model = module.model
    if isinstance(model, Own):
        return 0.0

    def of_layer(layer: int) -> float:
        saved, whole = (_of_layer(module, model, layer, computed, way) for way in (recompute, "none"))
        return whole - saved + _widest(module, model, layer, computed)

    return max(map(of_layer, set(_layer_kinds(model, info.layers))), default=0.0)


def _widest(module: Module, model: BuiltIn, layer: int, computed: Computed) -> float:
    """Return the values of a residual, and of the wider of a layer's two halves."""
    tp = module.grid.extent("tp")
    up, down = model.mlp_widths(layer)
    attention = model.qkv_width + model.heads * model.head_width
    shared = tp if module.sequence_parallel else 1
    return computed.positions * (2 * model.hidden / shared + max(attention, up + down) / tp)


@functools.lru_cache(maxsize=4096)
def product_bytes(topology: Topology, stage: Stage) -> int:
    """Return the bytes of the gradient of the largest matrix that trains in a stage, before it is added."""
    module, info = topology.modules[stage.module], topology.stages[stage]
    precision = topology.spec.precision
    sizes = (local_size(module, p) for p in info.parameters if p.name in info.trainable and len(p.shape) > 1)
    added = MAIN_BYTES[precision] if precision in HALF else 0
    return max(sizes, default=0) * (VALUE_BYTES[precision] + added)


@functools.lru_cache(maxsize=4096)
def widened_bytes(topology: Topology, stage: Stage) -> int:
    """Return the bytes of the largest matrix that a product of a stage widens to the precision of the job, or 0."""
    info, width = topology.stages[stage], VALUE_BYTES[topology.spec.precision]
    module = topology.modules[stage.module]
    narrow = (local_size(module, p) for p in info.parameters if _value_bytes(topology, info, p) < width)
    return width * max(narrow, default=0)


def deferred_values(module: Module, info: StageInfo, computed: Computed) -> float:
    """Return how many values a stage keeps of a microbatch between the halves of a split backward.

    These are what the weight gradients need (`shell/megatron/weight_grad_store.py`): the input of every matrix that
    trains, and the gradient of its output. Recomputation does not make them fewer.
    """
    model = module.model
    if isinstance(model, Own):
        return 0.0
    tokens, hidden, tp = computed.positions, model.hidden, module.grid.extent("tp")
    shared = tp if module.sequence_parallel else 1
    inner = model.qkv_width + model.heads * model.head_width
    trained = {p.layer for p in info.parameters if p.name in info.trainable and len(p.shape) > 1}
    layers = [layer for layer in info.layers if layer in trained]
    middle = sum(sum(model.mlp_widths(layer)) for layer in layers)
    # Outputs that are all-reduced over tp have a whole gradient on each rank.
    each = 2 * tokens * hidden / shared + 2 * tokens * hidden + tokens * inner / tp
    head = (
        tokens * (hidden + model.vocab_rows / tp)
        if isinstance(model, Gpt) and info.last and LAST in trained
        else 0.0
    )
    return len(layers) * each + tokens * middle / tp + head


# -- for the largest sample of the source ------------------------------------------------------------------


def most_samples(topology: Topology, module: Module) -> int:
    """Return how many samples of the largest size the share of a dp rank is as large as at most.

    Under a limit of tokens a full cell counts as one sample.
    """
    if topology.tokens_per_cell:
        return topology.cell_grid[1] // module.dp_size
    if not topology.balances:
        return -(-topology.samples_per_microbatch[module.name] // module.dp_size)
    cells = math.prod(topology.cell_grid)
    each = samples_per_cell(topology.spec.batch.global_size, cells)
    return each * (cells // (module.microbatches * module.dp_size))


def most_computed(topology: Topology, module: Module) -> Computed:
    """Return what a rank computes of a microbatch if all samples are as large as possible."""
    samples, segments = most_samples(topology, module), _most_segments(topology, module)
    positions, _ = module.row_shape(samples * sum(segments))
    return Computed(positions // module.cp, samples * sum(length**2 for length in segments) / module.cp)


def fullest_cell(step: Step) -> SampleSizes:
    """Return what a cell has at most under the limit of tokens, as the sizes of one sample.

    For each module the cell is full of those samples of the step that have most positions for a token.
    """
    limit = step.topology.tokens_per_cell
    tokens = [max(count, 1) for count in step.sample_tokens]

    def most(counts: Iterable[int]) -> int:
        return max(-(-count * limit // of) for count, of in zip(counts, tokens, strict=True))

    def segments(name: str) -> tuple[int, ...]:
        longest = max((length for of in step.sizes for length in of.segments[name]), default=1)
        full, rest = divmod(most(of.positions[name] for of in step.sizes), longest)
        return (longest,) * full + (rest,) * bool(rest)

    found = {name: segments(name) for name in step.topology.modules}
    rows = {name: most(of.rows[name] for of in step.sizes) for name in found}
    return SampleSizes(rows, found, {name: sum(lengths) for name, lengths in found.items()})


def _densest(topology: Topology) -> SampleSizes:
    """Return what a cell has at most, as far as the source says what its samples are."""
    largest = largest_sample(topology.graph, topology.source)
    alone = [
        Sample(id=0, length=0, rows={name: rows}, segments={name: largest.grids(name)})
        for name, rows in largest.rows.items()
    ]
    return fullest_cell(Step(topology, (Sample(id=0, length=topology.sequence, rows={}), *alone)))


def _most_segments(topology: Topology, module: Module) -> tuple[int, ...]:
    """Return the lengths of the attention segments of a sample that is as large as possible."""
    if topology.tokens_per_cell:
        return _densest(topology).segments[module.name]
    if topology.graph.nodes[module.name].is_source:
        grids = largest_sample(topology.graph, topology.source).grids(module.name)
        return tuple(length for grid in grids for length in module.model.spans(grid))
    rows = _most_rows(topology)[module.name]
    if not isinstance(module.model, Gpt):
        return (rows,)
    # No source says how long a text is that is not cut.
    return (topology.sequence if topology.source.length is None else min(rows, topology.sequence),)


def _most_rows(topology: Topology) -> Mapping[str, int]:
    if topology.tokens_per_cell:
        return _densest(topology).rows
    return topology.graph.rows_out(largest_sample(topology.graph, topology.source))


def most_bytes_in_flight(topology: Topology, stage: Stage, *, split: bool = False) -> float:
    """Return the most bytes that a rank of a stage keeps for a microbatch in flight, with or without `split`."""
    module, info = topology.modules[stage.module], topology.stages[stage]
    recompute = topology.spec.modules[stage.module].recompute
    computed = most_computed(topology, module)
    width = VALUE_BYTES[topology.spec.precision]
    saved = width * saved_values(module, info, computed, recompute) + end_bytes(topology, info, computed)
    return max(saved, width * deferred_values(module, info, computed)) if split else saved


def most_message_bytes(topology: Topology, link: Link) -> float:
    """Return the most bytes of a microbatch on a link, from one rank to the rank at the same position."""
    target = topology.modules[link.target.module]
    if link.edge:
        samples = most_samples(topology, target)
        rows = _most_rows(topology)[link.source.module] * samples
        values = rows * link.edge.width / (target.cp * target.grid.extent("tp"))
    else:
        values = most_computed(topology, target).positions * (target.model.hidden or 0)
    return VALUE_BYTES[topology.spec.precision] * values
