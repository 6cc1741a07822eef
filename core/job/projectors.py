"""Projectors: what an edge does to the rows of a module on their way to another.

    linear     one linear layer
    mlp        two, with an activation between them
    merger     a norm, and then an mlp as wide inside as the merged rows; the norm comes before rows are merged

The last stage of the source module holds a projector, and every tp rank computes it whole. A tower with
`deepstack_layers` has a merger for each of these besides, whose norm comes after rows are merged. What they give lies
beside the rows, value by value, so that one tensor crosses the edge.

>>> tower = Vit(layers=1, hidden=4, heads=2)
>>> [(p.name, p.shape) for p in Projector(kind="mlp", bias=False).parameters("language", tower, 8)]
[('projector.language.up.weight', (8, 4)), ('projector.language.down.weight', (8, 8))]
"""

from collections.abc import Iterator

import attrs

from mimogrid.core.job.models import (
    LAST,
    PROJECTOR,
    BuiltIn,
    Own,
    Parameter,
    Vit,
    linear_parameters,
    norm_parameters,
)


KINDS = ("linear", "mlp", "merger")


@attrs.frozen(kw_only=True)
class Projector:
    """`[modules.NAME.projector.TARGET]`.

    Attributes:
        kind: one of `KINDS`.
        ffn: the width between two linear layers; 0: that of the target, and for a merger that of merged rows.
        activation: between two linear layers.
        bias: linear layers have a bias.
        norm: of a merger: "layernorm" or "rmsnorm".
        norm_eps: what the norm adds to a variance or a mean square.
    """

    kind: str = "linear"
    ffn: int = 0
    activation: str = "gelu"
    bias: bool = True
    norm: str = "layernorm"
    norm_eps: float = 1e-6

    def parameters(self, target: str, source: BuiltIn | Own, width: int) -> Iterator[Parameter]:
        """Yield the parameters on the edge from a module to a target that reads rows of a width."""
        assert source.hidden is not None
        name = f"{PROJECTOR}{target}"
        yield from self._of_rows(name, source, width, norm_width=source.hidden)
        for i in range(len(deepstack_layers(source))):
            yield from self._of_rows(f"{name}.deepstack.{i}", source, width, norm_width=source.row_width or 0)

    def inner(self, source: BuiltIn | Own, width: int) -> int:
        """Return the width between the two linear layers."""
        return self.ffn or (width if self.kind == "mlp" else source.row_width or 0)

    def _of_rows(
        self, name: str, source: BuiltIn | Own, width: int, *, norm_width: int
    ) -> Iterator[Parameter]:
        """Yield the parameters that make rows of a width of a module's rows."""
        wide, inner = source.row_width or 0, self.inner(source, width)
        if self.kind == "merger":
            yield from norm_parameters(f"{name}.norm", norm_width, LAST, self.norm)
        layers = (
            ((name, (width, wide)),)
            if self.kind == "linear"
            else ((f"{name}.up", (inner, wide)), (f"{name}.down", (width, inner)))
        )
        for layer, shape in layers:
            yield from linear_parameters(layer, shape, LAST, source.init_std, bias=self.bias)


def deepstack_layers(source: BuiltIn | Own) -> tuple[int, ...]:
    """Return the layers of a module whose output its edges emit besides."""
    return source.deepstack_layers if isinstance(source, Vit) else ()
