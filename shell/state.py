"""State: what a run must keep to go on as if it had never stopped, as the pieces that a checkpoint holds."""

import attrs
import torch

from mimogrid.core.gradients import counts_in_norm
from mimogrid.core.models import Parameter
from mimogrid.shell.checkpoint import Piece
from mimogrid.shell.groups import ModuleGroups
from mimogrid.shell.optimizer import MOMENTS, set_steps_taken
from mimogrid.shell.step import Crew
from mimogrid.shell.weights import cut_over


def pieces_of(crew: Crew) -> dict[str, Piece]:
    """Return this rank's weights as ``module.parameter``, and their moments as ``optimizer.MOMENT.module...``.

    Of several ranks that hold the same values one writes them; a rank that holds a copy still reads it.
    """
    pieces: dict[str, Piece] = {}
    for stage, weights in crew.weights().items():
        runner = crew.stages[stage]
        position = runner.module.position(crew.rank)
        table = {parameter.name: parameter for parameter in runner.info.parameters}
        for name, weight in weights.items():
            parameter, full = table.get(name), f"{stage.module}.{name}"
            # A tied copy on the same rank as the original would come under the same name: one is enough.
            writes = counts_in_norm(position, runner.info, parameter)
            piece = _piece(weight, parameter, runner.groups, writes=writes)
            pieces[full] = piece
            if crew.optimizer is not None and weight.requires_grad:
                for moment in MOMENTS:
                    state = crew.optimizer.state[weight][moment]
                    pieces[f"optimizer.{moment}.{full}"] = attrs.evolve(piece, tensor=state)
    return pieces


def restore(crew: Crew, *, steps_taken: int) -> None:
    """Tell the optimizer how many steps it has taken, once its moments are loaded."""
    if crew.optimizer is not None:
        set_steps_taken(crew.optimizer, steps_taken)


def _piece(tensor: torch.Tensor, parameter: Parameter | None, groups: ModuleGroups, *, writes: bool) -> Piece:
    shape, offsets = list(tensor.shape), [0] * tensor.dim()
    if parameter is not None and parameter.tp_dim is not None:
        group, dim = cut_over(parameter, groups), parameter.tp_dim
        offsets[dim] = group.rank() * shape[dim]
        shape[dim] *= group.size()
    return Piece(tensor, tuple(shape), tuple(offsets), writes)
