"""Optimizers: which of torch's can run here, what each takes and keeps, and what they do to which parameter.

An optimizer is legal if what it does to a value depends on that value's own gradients and state alone. Then it
may see a parameter whole or in any parts, so tensor parallelism and sharding change nothing, and what it
keeps goes into a checkpoint as the parameter itself does. What each class takes is written down here because
the core has no torch to ask; a test compares the two.
"""

import fnmatch
from collections.abc import Mapping
from typing import Any, cast

import attrs

from mimogrid.core.job.spec import GroupSpec, OptimizerSpec


@attrs.frozen
class OptimizerKind:
    """A class of torch's.

    Attributes:
        name: what torch calls it.
        options: what it takes besides a rate, with defaults.
        states: what it keeps for each value, and the option that must be on for that; "": always.
        betas, eps: their defaults; None: it takes none.
        decays: whether it takes a weight decay.
    """

    name: str
    options: Mapping[str, Any]
    states: Mapping[str, str]
    betas: tuple[float, float] | None = None
    eps: float | None = None
    decays: bool = True


_BETAS = (0.9, 0.95)
_ADAM = {"exp_avg": "", "exp_avg_sq": ""}
_AMSGRAD = {**_ADAM, "max_exp_avg_sq": "amsgrad"}
_SGD = {"momentum": 0.0, "dampening": 0.0, "nesterov": False}
_RMSPROP = {"alpha": 0.99, "momentum": 0.0, "centered": False}
_RMSPROP_STATES = {"square_avg": "", "momentum_buffer": "momentum", "grad_avg": "centered"}
_RPROP = {"etas": (0.5, 1.2), "step_sizes": (1e-6, 50.0)}
_NADAM = {"momentum_decay": 0.004, "decoupled_weight_decay": False}

KINDS: Mapping[str, OptimizerKind] = {
    kind.name.lower(): kind
    for kind in (
        OptimizerKind("AdamW", {"amsgrad": False}, _AMSGRAD, _BETAS, 1e-8),
        OptimizerKind("Adam", {"amsgrad": False}, _AMSGRAD, _BETAS, 1e-8),
        OptimizerKind("SGD", _SGD, {"momentum_buffer": "momentum"}),
        OptimizerKind("NAdam", _NADAM, _ADAM, _BETAS, 1e-8),
        OptimizerKind("RAdam", {"decoupled_weight_decay": False}, _ADAM, _BETAS, 1e-8),
        OptimizerKind("Adamax", {}, {"exp_avg": "", "exp_inf": ""}, _BETAS, 1e-8),
        OptimizerKind("RMSprop", _RMSPROP, _RMSPROP_STATES, eps=1e-8),
        OptimizerKind("Adagrad", {"lr_decay": 0.0, "initial_accumulator_value": 0.0}, {"sum": ""}, eps=1e-10),
        OptimizerKind("Adadelta", {"rho": 0.9}, {"square_avg": "", "acc_delta": ""}, eps=1e-6),
        OptimizerKind("ASGD", {"lambd": 1e-4, "alpha": 0.75, "t0": 1e6}, {"ax": ""}),
        OptimizerKind("Rprop", _RPROP, {"prev": "", "step_size": ""}, decays=False),
    )
}
"""Those that can run, by their names in a job file."""

REFUSED: Mapping[str, str] = {
    "adafactor": "keeps sums of rows and columns, which ranks that hold parts of a matrix do not have",
    "muon": "orthogonalizes whole matrices, of which a rank holds a part",
    "lbfgs": "computes the loss several times a step, and products over all parameters",
    "sparseadam": "is for sparse gradients, and there are none here",
}
"""Classes of torch's that cannot run here, and why."""


def kind_of(optimizer: OptimizerSpec) -> OptimizerKind:
    """Return what is known of the job's optimizer; its name is legal."""
    return KINDS[optimizer.name.lower()]


def arguments_of(optimizer: OptimizerSpec) -> Mapping[str, Any]:
    """Return what torch's class is called with, besides the parameters, rate and decay of each group."""
    kind = kind_of(optimizer)
    found: dict[str, Any] = dict(kind.options)
    for name, value in optimizer.options.items():
        found[name] = _as_argument(value)
    if kind.betas is not None:
        found["betas"] = optimizer.betas or kind.betas
    if kind.eps is not None:
        found["eps"] = kind.eps if optimizer.eps is None else optimizer.eps
    return found


def _as_argument(value: object) -> object:
    """Return a value of the job file as torch takes it: a list as a tuple."""
    return tuple(cast("list[object]", value)) if isinstance(value, list) else value


def states_of(optimizer: OptimizerSpec) -> tuple[str, ...]:
    """Return the names of what the optimizer keeps for each value of a parameter.

    >>> states_of(OptimizerSpec(name="sgd")), states_of(OptimizerSpec(name="sgd", options={"momentum": 0.9}))
    ((), ('momentum_buffer',))
    """
    arguments = arguments_of(optimizer)
    return tuple(
        name for name, option in kind_of(optimizer).states.items() if not option or arguments[option]
    )


# -- which parameter is updated how ------------------------------------------------------------------------


def group_of(optimizer: OptimizerSpec, module: str, name: str) -> GroupSpec:
    """Return the rate and the decay of a parameter: those of the first group that it matches, or of the job.

    >>> bias = GroupSpec(match=("*.bias",), weight_decay=0.0)
    >>> adamw = OptimizerSpec(lr=0.1, weight_decay=0.5, groups=(bias, GroupSpec(modules=("vision",), lr=0.2)))
    >>> [(g.lr, g.weight_decay) for g in (group_of(adamw, "vision", n) for n in ("input.bias", "input.weight"))]
    [(0.1, 0.0), (0.2, 0.5)]
    """
    found = next((g for g in optimizer.groups if matches(g, module, name)), GroupSpec())
    return GroupSpec(
        lr=optimizer.lr if found.lr is None else found.lr,
        weight_decay=optimizer.weight_decay if found.weight_decay is None else found.weight_decay,
    )


def matches(group: GroupSpec, module: str, name: str) -> bool:
    """Whether a parameter is meant by a group: its module by name, itself by a pattern of ``module.name``."""
    if group.modules and module not in group.modules:
        return False
    full = f"{module}.{name}"
    return not group.match or any(fnmatch.fnmatchcase(full, pattern) for pattern in group.match)
