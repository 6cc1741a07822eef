"""The spec: what the user wrote, as values, with nothing derived and nothing checked.

Field names are the keys of the job file. `topology.parse` turns a spec into what the rest may trust.
"""

from collections.abc import Mapping
from typing import Any

import attrs

from mimogrid.core.job.costs import Costs
from mimogrid.core.job.models import BuiltIn
from mimogrid.core.job.schedules import ONE_F_ONE_B


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

    `options` are those of the built-in model that `model` names, or, for the builder of an own module, the
    table as written. `split` gives the layers of each pipeline stage where they are not equal. `width` is the
    output width of an own module.
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


@attrs.frozen(kw_only=True)
class DataSpec:
    """`[data]`: a built-in source or ``package.module:function``, and its options."""

    source: str
    options: Mapping[str, Any] = attrs.field(factory=dict[str, Any])


@attrs.frozen(kw_only=True)
class BatchSpec:
    """`[batch]`: samples per optimizer step, and how many microbatches they make."""

    global_size: int
    microbatches: int = 1


@attrs.frozen(kw_only=True)
class ScheduleSpec:
    """`[schedule]`.

    `memory_gb` is a cap per rank for orders that choose, and `costs` what they go by: how long things take.
    """

    name: str = ONE_F_ONE_B
    memory_gb: float | None = None
    costs: Costs | None = None


@attrs.frozen(kw_only=True)
class GroupSpec:
    """`[[optimizer.groups]]`: a rate and a decay for some parameters; None is that of the job.

    A parameter belongs to the first group that it matches: by its module, and by a pattern of ``module.name``.
    """

    modules: tuple[str, ...] = ()
    match: tuple[str, ...] = ()
    lr: float | None = None
    weight_decay: float | None = None


@attrs.frozen(kw_only=True)
class LossScaleSpec:
    """`[optimizer] loss_scale`, in fp16: rises by `growth` after `interval` finite steps, falls by `backoff`."""

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
    """`[optimizer]`. `decay` lowers the rate to `final_lr_fraction` of `lr` by the last step.

    `decay_fraction` is the part of the steps over which a "wsd" rate falls at the end. `betas` and `eps` are
    those of the optimizer where None. `bucket_mb` is how many megabytes (1e6 bytes) of gradients are
    summed in one call, or a little more.
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
    loss_scale: LossScaleSpec = LossScaleSpec()
    skip_above: SkipSpec = SkipSpec()


@attrs.frozen(kw_only=True)
class ProfileSpec:
    """`[train] profile`: the steps that are profiled, and the ranks that write down what they did."""

    steps: tuple[int, ...] = ()
    ranks: tuple[int, ...] = (0,)


@attrs.frozen(kw_only=True)
class TrainSpec:
    """`[train]`. Time limits are seconds; `threads` is compute threads per CPU rank.

    A checkpoint is written every `checkpoint_every` steps (0: only at the end), and the newest
    `keep_checkpoints` are kept, and those of steps that `keep_every` divides (0: none). The samples of
    `skip_steps` are passed over; of a range, both ends.
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
class SourceFacts:
    """What the plan must know of the data source; every fact may be unknown.

    Attributes:
        sequence: positions of a language sequence, padding included.
        vocab: tokens are below this.
        features: width of the rows of each source module.
        rows: most rows of a sample, per source module.
        length: most text tokens of a sample.
        targets: it gives regression targets.
    """

    sequence: int | None = None
    vocab: int | None = None
    features: Mapping[str, int] = attrs.field(factory=dict[str, int])
    rows: Mapping[str, int] = attrs.field(factory=dict[str, int])
    length: int | None = None
    targets: bool = True


@attrs.frozen(kw_only=True)
class JobSpec:
    """A whole job file. The order of `modules` matters: default offsets, order of placeholders."""

    modules: Mapping[str, ModuleSpec]
    data: DataSpec
    batch: BatchSpec
    schedule: ScheduleSpec = ScheduleSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    train: TrainSpec = TrainSpec()
    seed: int = 0
    precision: str = "fp32"
    world_size: int | None = None
