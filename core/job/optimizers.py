"""Optimizers: which of torch's optimizers can run, their options and states, and the rate of each parameter.

An optimizer can run if it updates each value by the gradients and the state of that value alone. Then it gives the same
result for a whole parameter and for any parts of it, so tensor parallelism and sharding change nothing, and its state
is saved like the parameter. Options and states are listed here because the core cannot ask torch; a test compares the
lists with torch.
"""

import fnmatch
from collections.abc import Mapping
from typing import Any, cast

import attrs

from mimogrid.core.job.spec import GroupSpec, OptimizerSpec


@attrs.frozen
class OptimizerKind:
    """An optimizer class of torch.

    Attributes:
        name: the name of the class in torch.
        options: its options besides the learning rate, with their defaults.
        states: the states that it keeps for each value, each with the option that must be on; "": always.
        betas, eps: the defaults; None: it has no such argument.
        decays: whether it has a weight decay.
        counters: the states that are one value for a whole parameter.
        starts_with_states: whether it makes its states before its first update.
    """

    name: str
    options: Mapping[str, Any]
    states: Mapping[str, str]
    betas: tuple[float, float] | None = None
    eps: float | None = None
    decays: bool = True
    counters: tuple[str, ...] = ("step",)
    starts_with_states: bool = False


_BETAS = (0.9, 0.95)
_ADAM = {"exp_avg": "", "exp_avg_sq": ""}
_AMSGRAD = {**_ADAM, "max_exp_avg_sq": "amsgrad"}
_SGD = {"momentum": 0.0, "dampening": 0.0, "nesterov": False}
_RMSPROP = {"alpha": 0.99, "momentum": 0.0, "centered": False}
_RMSPROP_STATES = {"square_avg": "", "momentum_buffer": "momentum", "grad_avg": "centered"}
_RPROP = {"etas": (0.5, 1.2), "step_sizes": (1e-6, 50.0)}
_ADAGRAD = {"lr_decay": 0.0, "initial_accumulator_value": 0.0}
_NADAM = {"momentum_decay": 0.004, "decoupled_weight_decay": False}

KINDS: Mapping[str, OptimizerKind] = {
    kind.name.lower(): kind
    for kind in (
        OptimizerKind("AdamW", {"amsgrad": False}, _AMSGRAD, _BETAS, 1e-8),
        OptimizerKind("Adam", {"amsgrad": False}, _AMSGRAD, _BETAS, 1e-8),
        OptimizerKind("SGD", _SGD, {"momentum_buffer": "momentum"}, counters=()),
        OptimizerKind("NAdam", _NADAM, _ADAM, _BETAS, 1e-8, counters=("step", "mu_product")),
        OptimizerKind("RAdam", {"decoupled_weight_decay": False}, _ADAM, _BETAS, 1e-8),
        OptimizerKind("Adamax", {}, {"exp_avg": "", "exp_inf": ""}, _BETAS, 1e-8),
        OptimizerKind("RMSprop", _RMSPROP, _RMSPROP_STATES, eps=1e-8),
        OptimizerKind("Adagrad", _ADAGRAD, {"sum": ""}, eps=1e-10, starts_with_states=True),
        OptimizerKind("Adadelta", {"rho": 0.9}, {"square_avg": "", "acc_delta": ""}, eps=1e-6),
        OptimizerKind(
            "ASGD", {"lambd": 1e-4, "alpha": 0.75, "t0": 1e6}, {"ax": ""}, counters=("step", "eta", "mu")
        ),
        OptimizerKind("Rprop", _RPROP, {"prev": "", "step_size": ""}, decays=False),
    )
}
"""The optimizers that can run, by their names in a job file."""

EMA = "ema"
"""The state that is the running mean of a weight, which no optimizer keeps itself."""

REFUSED: Mapping[str, str] = {
    "adafactor": "keeps sums of rows and columns, which ranks that hold parts of a matrix do not have",
    "muon": "orthogonalizes whole matrices, of which a rank holds a part",
    "lbfgs": "computes the loss several times a step, and products over all parameters",
    "sparseadam": "is for sparse gradients, and there are none here",
}
"""The optimizers of torch that cannot run, and why."""


def kind_of(optimizer: OptimizerSpec) -> OptimizerKind:
    """Return the class of the job's optimizer, whose name is legal."""
    return KINDS[optimizer.name.lower()]


def arguments_of(optimizer: OptimizerSpec) -> Mapping[str, Any]:
    """Return the arguments of torch's class, without the parameters, the rate and the decay of each group."""
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
    """Return a value of the job file as an argument for torch: a list becomes a tuple."""
    return tuple(cast("list[object]", value)) if isinstance(value, list) else value


def states_of(optimizer: OptimizerSpec) -> tuple[str, ...]:
    """Return the names of the states that are kept for each value of a parameter: the optimizer's, and its mean.

    >>> states_of(OptimizerSpec(name="sgd")), states_of(OptimizerSpec(name="sgd", options={"momentum": 0.9}))
    ((), ('momentum_buffer',))
    """
    arguments = arguments_of(optimizer)
    kept = (name for name, option in kind_of(optimizer).states.items() if not option or arguments[option])
    return (*kept, *((EMA,) if optimizer.ema else ()))


# -- rates and decays --------------------------------------------------------------------------------------


def group_of(optimizer: OptimizerSpec, module: str, name: str) -> GroupSpec:
    """Return the rate and the decay of a parameter: those of the first group that matches it, or of the job.

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
    """Whether a parameter is in a group: by the name of its module, and by a pattern of ``module.name``."""
    if group.modules and module not in group.modules:
        return False
    full = f"{module}.{name}"
    return not group.match or any(fnmatch.fnmatchcase(full, pattern) for pattern in group.match)
