"""Plain: the built-in models once more, from their full named weights, sample by sample, in mere torch.

What the modules are compared with. It knows the graph and the samples, and no layout: no padding, no masks,
no shards, no microbatches.

A batch is, per sample, what the source gives each module: ``{module: {"rows" | "tokens" | "labels" |
"loss_weights" | "targets": tensor}}``. Beside it, `segments` has per sample the lengths of the segments of a
module's rows, for modules whose rows are more than one segment.
"""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mimogrid.core.job.models import Gpt, Regressor, Transformer, Vit
from mimogrid.core.topology.topology import Module, Topology


Weights = Mapping[str, Tensor]
Data = Mapping[str, Mapping[str, Tensor]]


def losses(
    topology: Topology,
    weights: Mapping[str, Weights],
    batch: Sequence[Data],
    segments: Sequence[Mapping[str, Sequence[int]]] = (),
) -> dict[str, Tensor]:
    """Return every loss, summed over the batch: a module's by its name, an auxiliary one as ``NAME.aux``."""
    found: dict[str, Tensor] = {}
    for data, lengths in itertools.zip_longest(batch, segments, fillvalue={}):
        emitted: dict[str, dict[str, Tensor]] = {}
        for name in topology.graph.order:
            module, own = topology.modules[name], weights[name]
            # `topology.graph` names feeders in file order, as the rows of a sample come.
            fed = [emitted[feeder][name] for feeder in topology.graph.nodes[name].feeders]
            aux: list[Tensor] = []
            rows = _enter(module, own, fed, data.get(name, {}))
            rows = _stack(module.model, own, rows, aux, lengths.get(name))
            emitted[name] = {
                edge.target: _linear(own, f"projector.{edge.target}", rows) if edge.projected else rows
                for edge in module.outputs
            }
            if module.model.has_loss:
                found[name] = found.get(name, 0) + _loss(module.model, own, rows, data[name])
            if module.aux_loss:
                found[f"{name}.aux"] = found.get(f"{name}.aux", 0) + sum(aux)
    return found


def _enter(module: Module, weights: Weights, fed: list[Tensor], data: Mapping[str, Tensor]) -> Tensor:
    """What the first layer reads, [rows, hidden]."""
    match module.model:
        case Gpt():
            rows, table = [row for part in fed for row in part], weights["embedding.weight"]
            tokens = data["tokens"].tolist()
            assert len(rows) == sum(token < 0 for token in tokens)
            waiting = iter(rows)
            read = [next(waiting) if token < 0 else table[token] for token in tokens]
            return torch.stack(read) if read else table[:0]
        case Vit():
            return _linear(weights, "input", data["rows"])
        case _:
            return torch.cat(fed) if fed else data["rows"]


def _stack(
    model: Transformer,
    weights: Weights,
    x: Tensor,
    aux: list[Tensor] | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    for layer in range(model.layers):
        prefix = f"layers.{layer}"
        normed = _norm(weights, f"{prefix}.attention_norm", x)
        segments = normed.split(list(lengths or [len(x)]))
        x = x + torch.cat([_attention(model, weights, f"{prefix}.attention", of) for of in segments])
        normed = _norm(weights, f"{prefix}.mlp_norm", x)
        if model.experts:
            mixed, term = _experts(model, weights, f"{prefix}.mlp", normed)
            x = x + mixed
            if aux is not None:
                aux.append(term)
        else:
            x = x + _mlp(weights, f"{prefix}.mlp", normed)
    return _norm(weights, "final_norm", x)


def _mlp(weights: Weights, name: str, x: Tensor) -> Tensor:
    return _linear(weights, f"{name}.down", _gelu(_linear(weights, f"{name}.up", x)))


def _experts(model: Transformer, weights: Weights, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the chosen experts make of one sample's tokens, and how unevenly they were chosen."""
    logits = x @ weights[f"{name}.router.weight"].T
    shares, rows, choices = logits.softmax(dim=1), [], torch.zeros(model.experts, dtype=x.dtype)
    for token, logit, share in zip(x, logits, shares, strict=True):
        chosen = logit.argsort(descending=True)[: model.top_k].tolist()
        mixture = logit[chosen].softmax(dim=0) if model.top_k > 1 else share[chosen]
        choices[chosen] += 1 / (model.top_k * len(x))
        made = [_mlp(weights, f"{name}.experts.{expert}", token) for expert in chosen]
        rows.append(mixture @ torch.stack(made))
    if not rows:
        return x, x.sum()
    return torch.stack(rows), model.experts * (choices @ shares.mean(dim=0))


def _attention(model: Transformer, weights: Weights, name: str, x: Tensor) -> Tensor:
    """Softmax attention over one segment, head by head."""
    count, width, shared = len(x), model.head_width, model.heads // model.kv_heads
    groups = _linear(weights, f"{name}.qkv", x).view(count, model.kv_heads, shared + 2, width)
    heads = []
    for group in range(model.kv_heads):
        key = _rotated(groups[:, group, shared])
        value = groups[:, group, shared + 1]
        for head in range(shared):
            scores = _rotated(groups[:, group, head]) @ key.T / width**0.5
            if model.causal:
                later = torch.ones(count, count, dtype=torch.bool).triu(1)
                scores = scores.masked_fill(later, float("-inf"))
            heads.append(scores.softmax(dim=1) @ value)
    return _linear(weights, f"{name}.out", torch.cat(heads, dim=1))


def _rotated(x: Tensor) -> Tensor:
    """Each pair (i, i + half) of a position p is turned by the angle p / 10000^(2i / width)."""
    count, width = x.shape
    half = torch.arange(width // 2, dtype=x.dtype)
    angles = torch.arange(count, dtype=x.dtype)[:, None] / 10_000 ** (2 * half / width)
    left, right = x.split(width // 2, dim=1)
    sin, cos = angles.sin(), angles.cos()
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=1)


def _loss(model: Transformer, weights: Weights, rows: Tensor, data: Mapping[str, Tensor]) -> Tensor:
    if isinstance(model, Gpt):
        table = weights["embedding.weight" if model.tied_embeddings else "output.weight"]
        chosen = (rows @ table.T).log_softmax(dim=1)[range(len(rows)), data["labels"]]
        return -(chosen * data["loss_weights"]).sum()
    assert isinstance(model, Regressor)
    return (_linear(weights, "output", rows) - data["targets"]).square().sum()


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    centered = x - x.mean(dim=1, keepdim=True)
    scale = (centered.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    return centered / scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))
