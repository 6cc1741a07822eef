"""User modules: stages whose network the user or the host program wrote, checked against the plan in every forward.

Other ranks wait for exactly the rows that the plan says. A network that returns anything else raises an error here,
before the other ranks hang.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from mimogrid.core.base.errors import PlanError, Problem, WorldError, nearest
from mimogrid.core.base.hashing import draw_bits
from mimogrid.core.job.models import Own, Parameter
from mimogrid.core.job.optimizers import matches
from mimogrid.core.job.placement import matches_any
from mimogrid.core.job.spec import GroupSpec, ModuleSpec, OptimizerSpec
from mimogrid.core.step.step import Share
from mimogrid.core.topology.topology import Module, StageInfo
from mimogrid.shell.device.device import sent
from mimogrid.shell.job import builders
from mimogrid.shell.modules.interface import StageModule


class OwnStage(StageModule):
    """The only stage of a module of the user's."""

    draws = True  # Only its author knows whether it draws random numbers.
    reads_entire = True

    def __init__(self, module: Module, info: StageInfo, network: nn.Module, *, dtype: torch.dtype) -> None:
        super().__init__(module, info, dtype=dtype)
        self.network = network
        self.names: Mapping[str, str] = getattr(network, "weight_names", {})
        self.dtype = dtype
        self.feeders = tuple(edge.source for edge in module.inputs)
        self.has_loss = module.model.has_loss
        self.width = module.model.hidden or next((edge.width for edge in self.edges), 0)

    def weight_name(self, built: str) -> str:
        """Return the layout-independent name of a parameter from its name in this module."""
        name = built.removeprefix("network.")
        return self.names.get(name, name)

    def forward(self, inputs: Mapping[str, Tensor], share: Share) -> dict[str, Tensor]:
        """Compute the stage for a share; see `OwnNetwork`."""
        device = next(iter(inputs.values())).device
        lengths = {
            "lengths": tuple(map(sum, zip(*share.rows.values(), strict=True))),
            **{f"lengths.{feeder}": share.rows[feeder] for feeder in self.feeders},
        }
        grids = [grid for of_sample in share.grids for grid in of_sample]
        alike = {"grids": grids} if len({len(grid) for grid in grids}) == 1 else {}
        described, counts = (
            {name: sent(torch.tensor(c), device) for name, c in of.items()} for of in (alike, lengths)
        )
        outputs = self.network({**described, **inputs, **counts})
        self._check(outputs, share)
        rows = self.emit(outputs["rows"]) if self.edges else {}
        return rows | {name: tensor for name, tensor in outputs.items() if name != "rows"}

    def _check(self, outputs: Mapping[str, Tensor], share: Share) -> None:
        """Raise WorldError unless the outputs are the rows and the loss of the plan, or a prediction."""
        count, samples = sum(share.lengths), len(share.samples)
        wanted = ["rows"] * bool(self.edges) + ["loss"] * (self.has_loss and not self.generates)
        for name in wanted:
            if name not in outputs:
                raise WorldError(
                    f"module '{self.name}' returned {', '.join(outputs) or 'nothing'}, no '{name}'."
                )
        if self.edges and tuple(outputs["rows"].shape) != (count, self.width):
            raise WorldError(
                f"module '{self.name}' returned rows of shape {tuple(outputs['rows'].shape)}; "
                f"the plan is {(count, self.width)}: one row for each that comes in, or as many as rows_out says."
            )
        if self.edges and outputs["rows"].dtype != self.dtype:
            raise WorldError(
                f"module '{self.name}' returned rows of {outputs['rows'].dtype}; the other end of its edges "
                f"expects {self.dtype}, the precision of the job."
            )
        if self.generates and "prediction" in outputs and outputs["prediction"].shape[:1] != (samples,):
            raise WorldError(
                f"module '{self.name}' returned a prediction of shape {tuple(outputs['prediction'].shape)} for "
                f"{samples} samples: the first dim counts samples."
            )
        if "loss" in outputs and not self.has_loss:
            raise WorldError(
                f"module '{self.name}' feeds others, so the plan gives it no loss; it returned one. "
                "Put the loss into a module of its own that this one feeds."
            )


class HostStage(StageModule):
    """A stage of a built-in module whose network the host program supplies, projections to other modules included."""

    reads_entire = True

    def __init__(
        self,
        module: Module,
        info: StageInfo,
        network: nn.Module,
        *,
        table: Mapping[str, Parameter],
        dtype: torch.dtype,
    ) -> None:
        if len({edge.width for edge in module.outputs}) > 1:
            fact = (
                f"feeds {len(module.outputs)} modules of unlike widths; a host's network gives rows of one."
            )
            remedy = "Make them alike, or put the projections into modules between."
            raise PlanError([Problem(f"modules.{module.name}.feeds", fact, remedy)])
        known = tuple({parameter.name: parameter for parameter in table.values()}.values())
        _check_table(info, known)
        trainable = {
            table[built].name for built, weight in network.named_parameters() if weight.requires_grad
        }
        info = attrs.evolve(info, parameters=known, trainable=frozenset(trainable if info.trainable else ()))
        super().__init__(attrs.evolve(module, outputs=()), info, dtype=dtype)
        self._table = table
        assert not isinstance(module.model, Own)
        self.edges = module.outputs if info.last else ()
        self.network = network
        self.module = module
        self.dtype = dtype
        self.draws = module.model.dropout > 0
        self.aux_loss = module.aux_loss

    def weight_name(self, built: str) -> str:
        """Return the layout-independent name of a parameter from its name in this module."""
        return self._table[built.removeprefix("network.")].name

    def forward(self, inputs: Mapping[str, Tensor], share: Share) -> dict[str, Tensor]:
        """Compute the stage for a share; see `HostNetwork`."""
        network: Any = self.network
        if "labels" in inputs:
            network.loss = self.loss
        if self.aux_loss:
            network.aux_scale = self.loss_scale * self.aux_loss / share.total
        outputs = dict(network(inputs, share))
        for name, shape in self._planned(share).items():
            seen = (tuple(outputs[name].shape), outputs[name].dtype) if name in outputs else "nothing"
            if seen != (shape, self.dtype):
                raise WorldError(
                    f"the network that the host gave for '{self.info.stage}' returned {seen} for '{name}'; "
                    f"the plan is {(shape, self.dtype)}."
                )
        emitted = {edge.target: outputs["rows"] for edge in self.edges}
        return emitted | {name: tensor for name, tensor in outputs.items() if name != "rows"}

    def _planned(self, share: Share) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the outputs that other ranks wait for."""
        if self.info.last:
            return {"rows": (sum(share.lengths), self.edges[0].width)} if self.edges else {}
        positions, samples = share.shape
        assert self.module.model.hidden is not None
        return {self.name: (positions // self.module.cp, samples, self.module.model.hidden)}


def _check_table(info: StageInfo, known: Sequence[Parameter]) -> None:
    """Raise PlanError unless a host's network has the layers, experts and tied embeddings of the planned stage."""
    where = f"modules.{info.stage.module}"
    layers = sorted({parameter.layer for parameter in known if isinstance(parameter.layer, int)})
    if layers != list(info.layers):
        fact = f"the network that the host gave for '{info.stage}' has layers {layers}, the plan {[*info.layers]}."
        remedy = "Build it for this stage: as many layers, in as many stages, as the module has in the job."
        raise PlanError([Problem(where, fact, remedy)])
    has, planned = (any(p.expert is not None for p in of) for of in (known, info.parameters))
    if has and not planned:
        fact = f"the network that the host gave for '{info.stage}' has experts, the plan none."
        raise PlanError([Problem(where, fact, "Set options.experts to their number, and the grid's ep.")])
    ties = [any(parameter.copy for parameter in of) for of in (known, info.parameters)]
    if ties[0] != ties[1]:
        does, plans = ("ties" if each else "does not tie" for each in ties)
        fact = (
            f"the network that the host gave for '{info.stage}' {does} its embeddings, the plan {plans} them."
        )
        raise PlanError([Problem(where, fact, f"Set options.tied_embeddings = {str(ties[0]).lower()}.")])


def own_network(model: Own, options: Any, *, seed: int, module: str) -> nn.Module:
    """Build a module of the user's. Its initial weights follow from the job's seed and the module's name."""
    build = builders.find(model.path, where=f"modules.{module}.model").load()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(draw_bits(seed, module, "own") % 2**63)
        network = build(**options)
    assert isinstance(network, nn.Module), model.path
    return network


def check_patterns(written: ModuleSpec, module: str, names: tuple[str, ...]) -> None:
    """Raise PlanError for a pattern of `frozen` or `trainable` that matches no parameter of an own module.

    Validation checks the patterns of built-in modules; the parameters of an own one are known only once it is built.
    """
    frozen = written.frozen if isinstance(written.frozen, tuple) else ()
    for key, patterns in (("frozen", frozen), ("trainable", written.trainable or ())):
        for pattern in patterns:
            if not any(matches_any(name, (pattern,)) for name in names):
                fact = f"the pattern '{pattern}' matches no parameter of module '{module}'."
                raise PlanError([Problem(f"modules.{module}.{key}", fact, nearest(pattern, names))])


def check_groups(optimizer: OptimizerSpec, module: str, names: tuple[str, ...]) -> None:
    """Raise PlanError for a pattern of an optimizer group that names this own module and matches no parameter of it."""
    for i, group in enumerate(optimizer.groups):
        for pattern in group.match:
            is_meant = group.modules == (module,) or pattern.startswith(f"{module}.")
            single = GroupSpec(modules=group.modules, match=(pattern,))
            if is_meant and not any(matches(single, module, name) for name in names):
                fact = f"the pattern '{pattern}' matches no parameter of module '{module}'."
                remedy = nearest(pattern, tuple(f"{module}.{name}" for name in names))
                raise PlanError([Problem(f"optimizer.groups[{i}].match", fact, remedy)])
