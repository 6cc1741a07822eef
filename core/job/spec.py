"""The spec: what the user wrote, as values. Nothing in it is derived, and nothing is checked.

Field names are the keys of the job file. `topology.parse` checks a spec and turns it into a `Topology`.
"""

from collections.abc import Mapping
from typing import Any

import attrs

from mimogrid.core.base.samples import SegmentGrid
from mimogrid.core.job.costs import Costs
from mimogrid.core.job.lora import Lora
from mimogrid.core.job.models import BuiltIn
from mimogrid.core.job.projectors import Projector
from mimogrid.core.job.schedules import ONE_F_ONE_B
from mimogrid.core.models.segments import ONE_EACH, Emission


@attrs.frozen(kw_only=True)
class GridSpec:
    """`[modules.NAME] grid`: ranks = tp*cp*dp*pp; `ep` and `expert_tp` add none."""

    tp: int = 1
    cp: int = 1
    ep: int = 1
    dp: int = 1
    pp: int = 1
    expert_tp: int = 1
    offset: int | None = None
    order: tuple[str, ...] = ("tp", "cp", "dp", "pp")
    sequence_parallel: bool = False


@attrs.frozen(kw_only=True)
class ModuleSpec:
    """`[modules.NAME]`.

    `options` are those of the built-in model that `model` names. For the builder of a custom module they are the table
    as written. `split` has the number of layers of each stage, if these differ. `width` is the output width of a
    custom module, and `rows_out` says how many rows it emits for those that it reads. `projector` has the projectors of
    edges, by the module that they lead to. `weights` is the folder of a published checkpoint from which the module
    starts. With `lora` all is frozen but small products beside linear layers, and what `trainable` names.
    """

    model: str
    options: BuiltIn | Mapping[str, Any]
    feeds: tuple[str, ...] = ()
    grid: GridSpec = GridSpec()
    frozen: bool | tuple[str, ...] = False
    trainable: tuple[str, ...] | None = None
    microbatches: int | None = None
    chunks: int = 1
    split: tuple[int, ...] | None = None
    loss_weight: float = 1.0
    recompute: str = "none"
    engine: str = "auto"
    fp8: str = "none"
    width: int | None = None
    rows_out: Emission = ONE_EACH
    projector: Mapping[str, Projector] = attrs.field(factory=dict[str, Projector])
    weights: str | None = None
    lora: Lora | None = None


BALANCES = ("none", "cost")
OVERFLOWS = ("error", "truncate", "drop")
WORKER_KINDS = ("process", "thread")


@attrs.frozen(kw_only=True)
class MixSpec:
    """`[[data.mix]]`: a source, its options, and its weight among those of the mixture."""

    source: str
    options: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    weight: float = 1.0


@attrs.frozen(kw_only=True)
class DataSpec:
    """`[data]`: a built-in source or ``package.module:function``, and its options; or a mixture of several.

    `overflow` says what becomes of a sample that has more positions than `sequence` (`step.overflow`). So many
    `workers` of each rank, of one `worker_kind`, load what it reads in the next `ahead` microbatches; 0: it loads
    itself.
    """

    source: str = ""
    options: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    mix: tuple[MixSpec, ...] = ()
    overflow: str = "error"
    workers: int = 0
    ahead: int = 2
    worker_kind: str = "process"


@attrs.frozen(kw_only=True)
class BatchSpec:
    """`[batch]`: the samples of a step, and the number of microbatches that they are split into.

    With `tokens_per_microbatch` (0: none) they are split by tokens instead, and the number varies from step to step
    (`tokens`). `balance` says whether they are assigned to microbatches and dp ranks in their order, or by what they
    cost (`step.cells`).
    """

    global_size: int
    microbatches: int = 1
    tokens_per_microbatch: int = 0
    balance: str = "none"


@attrs.frozen(kw_only=True)
class ScheduleSpec:
    """`[schedule]`.

    `memory_gb` is the most memory that a rank may need (GB of 1e9 bytes). `auto` searches for an order by `costs`.
    """

    name: str = ONE_F_ONE_B
    memory_gb: float | None = None
    costs: Costs | None = None


@attrs.frozen(kw_only=True)
class GpuSpec:
    """`[gpu]`: the GPUs that `plan`, `check` and `simulate` assume. Training does not read it.

    `memory_gb` is the memory of each GPU (GB of 1e9 bytes), `efficiency` the part of its peak that it reaches,
    `link_efficiency` that of its links; None: the default. `times` has, by module, how many times as long as estimated
    it takes, as measured.
    """

    name: str | None = None
    memory_gb: float | None = None
    efficiency: float | None = None
    link_efficiency: float | None = None
    times: Mapping[str, float] = attrs.field(factory=dict[str, float])


@attrs.frozen(kw_only=True)
class GroupSpec:
    """`[[optimizer.groups]]`: a learning rate and a weight decay for some parameters; None: those of the job.

    A parameter is in the first group that matches its module, and its ``module.name`` by a pattern.
    """

    modules: tuple[str, ...] = ()
    match: tuple[str, ...] = ()
    lr: float | None = None
    weight_decay: float | None = None


@attrs.frozen(kw_only=True)
class LossScaleSpec:
    """`[optimizer] loss_scale`, in fp16: grows by `growth` after `interval` finite steps, shrinks by `backoff`."""

    initial: float = 65536.0
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    minimum: float = 1.0


@attrs.frozen(kw_only=True)
class SkipSpec:
    """`[optimizer] skip_above`: multiples of the median over the last `window` steps; 0: no limit."""

    norm: float = 0.0
    loss: float = 0.0
    window: int = 128


@attrs.frozen(kw_only=True)
class OptimizerSpec:
    """`[optimizer]`. `decay` lowers the learning rate to `final_lr_fraction` of `lr` by the last step.

    `decay_fraction` is the share of the steps, at the end, over which a "wsd" rate falls. `betas` and `eps` are None
    for the defaults of the optimizer. `bucket_mb` is the size of a bucket of gradients in megabytes (1e6 bytes); a
    bucket may be a little larger. The last backward of a stage is cut where `cut_mb` of gradients are complete, so that
    their sums run beside the rest of it; 0: nowhere. `ema` is how much of a running mean of the weights is kept at each
    update; 0: there is none.
    """

    name: str = "adamw"
    lr: float = 1e-3
    clip_norm: float = 1.0
    betas: tuple[float, float] | None = None
    eps: float | None = None
    weight_decay: float = 0.0
    options: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    groups: tuple[GroupSpec, ...] = ()
    warmup_steps: int = 0
    decay: str = "constant"
    decay_fraction: float = 0.2
    final_lr_fraction: float = 0.0
    sharded: bool = False
    bucket_mb: float = 25.0
    cut_mb: float = 4.0
    ema: float = 0.0
    loss_scale: LossScaleSpec = LossScaleSpec()
    skip_above: SkipSpec = SkipSpec()


@attrs.frozen(kw_only=True)
class ProfileSpec:
    """`[train] profile`: the steps that are profiled, and the ranks that write profiles."""

    steps: tuple[int, ...] = ()
    ranks: tuple[int, ...] = (0,)


@attrs.frozen(kw_only=True)
class TrainSpec:
    """`[train]`. `timeout_s` is in seconds; `threads` is the number of compute threads of a CPU rank.

    A checkpoint is written every `checkpoint_every` steps (0: only at the end). The newest `keep_checkpoints` are kept,
    and those of steps that `keep_every` divides (0: none). The samples of `skip_steps` are skipped; a range includes
    both ends.
    """

    steps: int = 1
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    keep_every: int = 0
    checkpoint_async: bool = True
    run_dir: str | None = None
    timeout_s: float = 600.0
    threads: int = 1
    evaluate: bool = True
    skip_steps: tuple[int | tuple[int, int], ...] = ()
    profile: ProfileSpec = ProfileSpec()


@attrs.frozen(kw_only=True)
class TaskSpec:
    """`[validation.tasks.NAME]`: a source of samples that training does not see, and its options."""

    source: str
    options: Mapping[str, Any] = attrs.field(factory=dict[str, Any])


@attrs.frozen(kw_only=True)
class GenerateSpec:
    """`[validation.generate]`: answers of so many tokens at most (0: none), the likeliest (`temperature` 0) or drawn.

    Draws are among the `top_k` likeliest tokens (0: all), and of these among the fewest that have `top_p` together.
    `stop` are the tokens that end an answer; without them it is the last token of the true one. `metrics` are functions
    of the user's that are called with each answer.
    """

    tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[int, ...] = ()
    metrics: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class ValidationSpec:
    """`[validation]`: losses of held-out samples, after every so many steps (0: never) and at the end.

    Each of the `tasks` has at least so many `samples`; without tasks they are those that the data source holds out.
    `metrics` are functions of the user's that are called with each sample's logits. With `generate` the model also
    answers. The weights that are `best` by a metric are kept, and training ends after `patience` validations that are
    not (0: it does not).
    """

    every: int = 0
    samples: int = 256
    tasks: Mapping[str, TaskSpec] = attrs.field(factory=dict[str, TaskSpec])
    metrics: tuple[str, ...] = ()
    generate: GenerateSpec = GenerateSpec()
    best: str = ""
    highest: bool = False
    patience: int = 0


TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")


@attrs.frozen(kw_only=True)
class TrackSpec:
    """`[track]`: the trackers that a run writes its curves to, a point of each every so many steps, and the project."""

    to: tuple[str, ...] = ("tensorboard",)
    every: int = 10
    project: str = "mimogrid"


@attrs.frozen(kw_only=True)
class ModuleLayoutSpec:
    """`[layouts.modules.NAME]`: what stands in place of the module's own; None for `recompute`: the module's own."""

    grid: GridSpec = GridSpec()
    chunks: int = 1
    split: tuple[int, ...] | None = None
    microbatches: int | None = None
    recompute: str | None = None


@attrs.frozen(kw_only=True)
class BatchLayoutSpec:
    """`[layouts.batch]`; None: that of the job."""

    microbatches: int | None = None


@attrs.frozen(kw_only=True)
class ScheduleLayoutSpec:
    """`[layouts.schedule]`; None: that of the job."""

    name: str | None = None


@attrs.frozen(kw_only=True)
class OptimizerLayoutSpec:
    """`[layouts.optimizer]`; None: that of the job."""

    sharded: bool | None = None


@attrs.frozen(kw_only=True)
class LayoutSpec:
    """`[[layouts]]`: what is different where the job has `ranks` ranks or more (`layouts`).

    It has the tables of a job, and in them keys that do not change the result. A module that it does not name is laid
    out as in its own table.
    """

    ranks: int
    modules: Mapping[str, ModuleLayoutSpec] = attrs.field(factory=dict[str, ModuleLayoutSpec])
    batch: BatchLayoutSpec = BatchLayoutSpec()
    schedule: ScheduleLayoutSpec = ScheduleLayoutSpec()
    optimizer: OptimizerLayoutSpec = OptimizerLayoutSpec()


@attrs.frozen(kw_only=True)
class SourceFacts:
    """What the plan must know about the data source; each fact may be unknown.

    Attributes:
        sequence: the number of positions of a language sequence, padding included.
        vocab: all tokens are below this.
        features: the width of the rows, by source module.
        rows: the largest number of rows of a sample, by source module.
        segments: the grids of these rows, where a sample's rows come in several segments, or in images.
        length: the largest number of text tokens of a sample; 0: there is no text.
        targets: whether it has regression targets.
    """

    sequence: int | None = None
    vocab: int | None = None
    features: Mapping[str, int] = attrs.field(factory=dict[str, int])
    rows: Mapping[str, int] = attrs.field(factory=dict[str, int])
    segments: Mapping[str, tuple[SegmentGrid, ...]] = attrs.field(factory=dict[str, tuple[SegmentGrid, ...]])
    length: int | None = None
    targets: bool = True


@attrs.frozen(kw_only=True)
class JobSpec:
    """A whole job file. The order of `modules` decides default offsets and the order of placeholders.

    `layouts` are further layouts, or "plan": they are searched for. A job that is opened has one, and none is here.
    """

    modules: Mapping[str, ModuleSpec]
    data: DataSpec
    batch: BatchSpec
    schedule: ScheduleSpec = ScheduleSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    train: TrainSpec = TrainSpec()
    validation: ValidationSpec = ValidationSpec()
    track: TrackSpec = TrackSpec()
    gpu: GpuSpec = GpuSpec()
    seed: int = 0
    precision: str = "fp32"
    world_size: int | None = None
    layouts: tuple[LayoutSpec, ...] | str = ()
