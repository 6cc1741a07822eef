"""Stems and projectors of published towers compute what those of transformers do, in double precision."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn

from checkpoints import WHOLES, batch, make
from mimogrid.core.base.samples import SegmentGrid
from mimogrid.core.job.models import BUILT_IN, Vit
from mimogrid.core.job.projectors import Projector
from mimogrid.core.topology.topology import Edge
from mimogrid.shell.data.batches import examples_of
from mimogrid.shell.job.jobfile import CONVERTER
from mimogrid.shell.job.published import Published, published
from mimogrid.shell.megatron.weight_grad_store import WeightGradStore
from mimogrid.shell.modules.norms import norm_of
from mimogrid.shell.modules.projectors import projector_of
from mimogrid.shell.modules.published import load_published
from mimogrid.shell.modules.stems import stem_of
from mimogrid.shell.run.reference import double_precision, reference


NEAR: Mapping[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


@attrs.frozen
class OneRank:
    """The group of a rank that holds everything."""

    def rank(self) -> int:
        """Return its place."""
        return 0

    def size(self) -> int:
        """Return how many there are."""
        return 1


@attrs.frozen
class Alone:
    """The groups of a module on one rank."""

    tp: Any = OneRank()
    expert_tp: Any = OneRank()


@attrs.frozen(eq=False)
class Tower:
    """A tower of a checkpoint, with the rows that it reads of a batch."""

    found: Published
    module: str
    model: Vit
    rows: Tensor
    grids: tuple[SegmentGrid, ...]

    @classmethod
    def of(cls, folder: Path, given: Mapping[str, Tensor]) -> "Tower":
        """Read the checkpoint, and cut the batch into rows."""
        found = published(folder)
        (name,) = [name for name in found.model.modules if name != "language"]
        model = CONVERTER.structure(found.model.modules[name].table()["options"], BUILT_IN["vit"])
        examples = [e for e in examples_of(found.model, given) if name in e.sample.rows]
        rows = torch.cat([e.tensors[name]["rows"] for e in examples]).double()
        grids = tuple(grid for e in examples for grid in e.sample.grids(name))
        return cls(found, name, model, rows, grids)

    def loaded(self, network: nn.Module, prefix: str = "") -> nn.Module:
        """Return a network with its weights of the checkpoint."""
        network.double()
        weights = {f"{prefix}{name}": weight for name, weight in network.named_parameters()}
        parameters = [
            *self.model.parameters(),
            *self.projector.parameters("language", self.model, self.width),
        ]
        left = load_published(
            self.found.folder,
            weights,
            [p for p in parameters if p.name in weights],
            module=self.module,
            groups=Alone(),
        )
        assert not left
        assert weights.keys() <= {p.name for p in parameters}
        return network

    @property
    def width(self) -> int:
        """The width of the language model."""
        width: int = self.found.model.modules["language"].options["hidden"]
        return width

    @property
    def projector(self) -> Projector:
        """The projector of the edge to it."""
        table = self.found.model.modules[self.module].projector.get("language", {})
        return CONVERTER.structure(table, Projector)


# What is before the first layer, behind the last one whose rows are read, and the projector; by name in transformers.
PLACES = {
    "llava": ("vision_tower.encoder.layers", "multi_modal_projector", -2),
    "llava-siglip": ("vision_tower.encoder.layers", "multi_modal_projector", -1),
    "qwen2.5-vl": ("visual.blocks", "visual", -1),
    "qwen3-vl": ("visual.blocks", "visual", -1),
    "qwen2-audio": ("audio_tower.layers", "multi_modal_projector", -1),
}


def seen(folder: Path, name: str, given: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return what transformers computes: the first layer's input, the layers' outputs, and the projected rows."""
    found = reference(folder)
    layers, projector, last = PLACES[name]
    caught: dict[str, Tensor] = {}

    def catch(place: str, tensor: Tensor) -> None:
        caught[place] = tensor

    stack = found.model.get_submodule(f"model.{layers}")
    stack[0].register_forward_pre_hook(lambda _, args: catch("first", args[0]))
    for number, layer in enumerate(stack):
        layer.register_forward_hook(lambda _, args, out, n=number: catch(str(n), out))
    rows = found.model.get_submodule(f"model.{projector}")
    rows.register_forward_hook(lambda _, args, out: catch("rows", emitted(out)))
    with torch.no_grad(), double_precision(found.casts):
        found.model(**given)
    outputs = [caught[str(n)] for n in range(len(stack) + 1 + last)]
    return caught["first"], outputs, caught["rows"]


def emitted(output: Any) -> Tensor:
    """The rows for the language model, with those of inner layers beside them, of what a module of theirs gives."""
    if isinstance(output, Tensor):
        return output
    return torch.cat([output.pooler_output, *getattr(output, "deepstack_features", ())], dim=-1)


def packed(tensor: Tensor, lengths: Sequence[int]) -> Tensor:
    """Segments end to end, of a tensor that has them so or padded."""
    if tensor.dim() == len("PH"):
        return tensor
    return torch.cat([padded[:length] for padded, length in zip(tensor, lengths, strict=True)])


@pytest.mark.parametrize("name", WHOLES)
def test_before_and_behind_the_layers(name: str, tmp_path: Path) -> None:
    """The first layer sees the same, and of what the last one gives come the same rows."""
    given = batch(name)
    tower = Tower.of(make(name, tmp_path), given)
    first, layers, rows = seen(tmp_path, name, given)
    spans = [span for grid in tower.grids for span in tower.model.spans(grid)]
    store = WeightGradStore()
    stem = tower.loaded(stem_of(tower.model, dtype=torch.float64, weight_grads=store))
    torch.testing.assert_close(stem(tower.rows, tower.grids), packed(first, spans), **NEAR)
    places = torch.tensor(tower.model.rows_in_layers(tower.grids).emitted)
    positions, *inner = (
        packed(layers[n], spans).index_select(0, places) for n in (-1, *tower.model.deepstack_layers)
    )
    if tower.model.pool > 1:
        norm = norm_of(tower.model.norm, tower.model.hidden, eps=tower.model.norm_eps, dtype=torch.float64)
        pooled = positions.view(-1, tower.model.pool, tower.model.hidden).mean(dim=1)
        positions = tower.loaded(norm, "final_norm.")(pooled)
    edge = Edge(tower.module, "language", tower.width, tower.projector, 1 + len(inner))
    edge = attrs.evolve(edge, width=edge.width * edge.parts)
    project = projector_of(edge, tower.model, dtype=torch.float64, weight_grads=store)
    ours = tower.loaded(project, "projector.language.")(positions, inner)
    counts = [tower.model.emission.rows(grid) for grid in tower.grids]
    assert len(ours) == sum(counts)
    torch.testing.assert_close(ours, packed(rows, counts), **NEAR)
