"""Built-in models as stages: a model that reads tokens, and models that read rows only.

Shapes are named as in `interface`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mimogrid.core.job.layer_engines import LOCAL
from mimogrid.core.job.models import Block, Gpt, Regressor
from mimogrid.core.step.step import Share
from mimogrid.shell.megatron.draws import EMBEDDING, child, draw_of, dropped
from mimogrid.shell.megatron.layers import Affine
from mimogrid.shell.megatron.names import GPTModel, TransformerBlock, gather_from_tensor_model_parallel_region
from mimogrid.shell.modules.loss import Predictions, squared_error_sum
from mimogrid.shell.modules.packing import Packing
from mimogrid.shell.modules.transformer import Context, TransformerStage
from mimogrid.shell.modules.weights import layout_name


class TextStage(TransformerStage):
    """A stage of a `gpt`."""

    def __init__(self, context: Context, model: Gpt, *, sequence: int) -> None:
        super().__init__(context, model)
        info = context.info
        self.tied = model.tied_embeddings
        self.can_cache = context.layers.engine == LOCAL
        self.vocab = model.vocab
        self.deep_layers = model.deepstack
        self.network = GPTModel(
            self.config,
            self.spec,
            vocab_size=model.vocab_rows,
            max_sequence_length=sequence,
            pre_process=info.first,
            post_process=info.last,
            share_embeddings_and_output_weights=self.tied,
            position_embedding_type="none",  # The core attention rotates its inputs.
            scatter_embedding_sequence_parallel=False,  # Rows join the token embeddings first.
            pg_collection=self.collection,
        )
        assert len(self.decoder.layers) == len(info.layers)
        # Hidden states are an argument here, and not state that `set_input_tensor` sets.
        self.decoder.pre_process = True
        if info.last and self.sequence_parallel:
            # The output projection reads complete rows (see `decode`), not a part of the positions.
            self.network.output_layer.sequence_parallel = False
            self.network.output_layer.allreduce_dgrad = True

    @property
    def decoder(self) -> TransformerBlock:
        """The stack of layers."""
        return self.network.decoder

    def weight_name(self, built: str) -> str:
        """Return the layout-independent name of a parameter from its name in this module."""
        name = layout_name(built.removeprefix("network."), self.info.layers)
        return "embedding.weight" if self.tied and name == "output.weight" else name

    def enter(self, inputs: Mapping[str, Tensor], share: Share, packing: Packing) -> Tensor:
        """Return the token embeddings, with the feeders' rows at their placeholders."""
        tokens_T = inputs["tokens"]
        text_T = tokens_T.index_select(0, packing.text_tokens)
        text_TH = self.network.embedding.word_embeddings(text_T).to(self.config.params_dtype)
        if packing.row.keys is not None:
            entries = packing.incoming[len(packing.incoming) - len(text_T) :]
            keys_T = child(packing.row.keys, draw_of(EMBEDDING)).index_select(0, entries)
            text_TH = dropped(text_TH, keys_T, self.dropout)
        rows = []
        if self.feeders:
            rows = [self.take(_joined(inputs, self.feeders)[:, : self.hidden], packing)]
        return self.row_of(torch.cat([*rows, text_TH]), packing)

    def deepstack(self, inputs: Mapping[str, Tensor], packing: Packing) -> Sequence[Tensor]:
        """Return the rows beside the feeders' rows, at the same placeholders."""
        if not self.deep_layers:
            return ()
        # Each on a path of its own from the inputs: a recomputed layer runs the backward of what it adds by itself.
        found = []
        for start in range(self.hidden, (1 + self.deep_layers) * self.hidden, self.hidden):
            rows = _joined(inputs, self.feeders)[:, start : start + self.hidden]
            found.append(self.row_of(self.take(rows, packing), packing))
        return found

    def finish(
        self, rows_RH: Tensor, inputs: Mapping[str, Tensor], packing: Packing, share: Share
    ) -> dict[str, Tensor]:
        """Return the loss, or the logits."""
        output = self.network.output_layer
        weight = self.network.shared_embedding_or_output_weight() if self.tied else output.weight
        logits_TV = self.weight_grads.multiply(
            lambda weight: output(rows_RH, weight=weight)[0], weight, rows_RH
        )
        if "labels" not in inputs:
            logits_TV = gather_from_tensor_model_parallel_region(logits_TV, group=self.tp)
            return {"logits": self.join(logits_TV[:, : self.vocab], packing)}
        logits_TV = self._without_padding(logits_TV)
        labels_T = self.take_target(inputs["labels"], packing)
        weights_T = self.take_target(inputs["loss_weights"], packing)
        return {"loss": self.loss(Predictions(logits_TV, labels_T, weights_T, share, self.tp))}

    def _without_padding(self, logits_TV: Tensor) -> Tensor:
        """Return logits that never predict an entry that pads the vocabulary."""
        entries = logits_TV.shape[1]
        padding = entries * (self.tp.rank() + 1) - self.vocab
        if padding <= 0:
            return logits_TV
        places = torch.arange(entries, device=logits_TV.device)
        return logits_TV.masked_fill(places >= entries - padding, -torch.inf)


class RowsStage(TransformerStage):
    """A stage of a `block` or a `regressor`."""

    def __init__(self, context: Context, model: Block | Regressor) -> None:
        super().__init__(context, model)
        info = context.info
        self.network = TransformerBlock(
            self.config, self.spec, post_process=info.last, pg_collection=self.collection
        )
        assert len(self.decoder.layers) == len(info.layers)
        self.output: nn.Linear | None = None
        if info.last and isinstance(model, Regressor):
            self.output = Affine(
                model.hidden, model.outputs, dtype=context.dtype, weight_grads=self.weight_grads
            )

    @property
    def decoder(self) -> TransformerBlock:
        """The stack of layers."""
        return self.network

    def weight_name(self, built: str) -> str:
        """Return the layout-independent name of a parameter from its name in this module."""
        return layout_name(built.replace("network.", "decoder.", 1), self.info.layers)

    def enter(self, inputs: Mapping[str, Tensor], share: Share, packing: Packing) -> Tensor:
        """Return the incoming rows, sample by sample."""
        rows = _joined(inputs, self.feeders or ("rows",))
        return self.row_of(self.take(rows, packing), packing)

    def finish(
        self, rows_RH: Tensor, inputs: Mapping[str, Tensor], packing: Packing, share: Share
    ) -> dict[str, Tensor]:
        """Return the sum of squared errors, or the prediction; nothing from an encoder."""
        if self.output is None:
            return {}
        prediction = self.output(rows_RH)
        if "targets" not in inputs:
            return {"prediction": self.join(prediction, packing)}
        return {"loss": squared_error_sum(prediction, self.take_target(inputs["targets"], packing))}


def _joined(inputs: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Return inputs concatenated; some may have more beside their rows than others."""
    if len(names) == 1:
        return inputs[names[0]]
    widest = max(inputs[name].shape[1] for name in names)
    return torch.cat([functional.pad(inputs[name], (0, widest - inputs[name].shape[1])) for name in names])
