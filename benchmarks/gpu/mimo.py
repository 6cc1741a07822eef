"""megatron-core's `MimoModel` on the very networks of a job: the same layers, weights and memory of gradients.

The networks of the job stand in the model as its encoder and its language model; a rank that has one stage only has
that part of the model. What is Megatron's is all that happens between the networks and around them: text embedded
and put together with rows, the loss at every position, and who calls whom when.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import parallel_state
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from bench import Bench
from mimogrid.core.job.models import Gpt
from mimogrid.core.step.step import Share
from mimogrid.shell.device.device import DTYPES
from mimogrid.shell.modules.built_in import TextStage
from mimogrid.shell.modules.interface import StageModule
from mimogrid.shell.runtime.data import Loader
from mimogrid.shell.runtime.stage import StageRunner


ENCODER = "clip"


class Encoder(nn.Module):
    """The job's encoder, as a modality's encoder is called."""

    def __init__(self, network: StageModule) -> None:
        super().__init__()
        self.network = network

    def forward(self, rows: Tensor, share: Share) -> Tensor:
        """Return the rows for the language model [R, H], sample after sample."""
        return self.network({"rows": rows}, share)["language"]


class Language(nn.Module):
    """The Megatron model in a stage of the job's language model, as `MimoModel` calls one."""

    def __init__(self, config: Any, network: TextStage) -> None:
        super().__init__()
        self.config = config
        self.network = network.network
        self.incoming: Tensor | None = None

    @property
    def embedding(self) -> nn.Module:
        """What `MimoModel` embeds text with."""
        return self.network.embedding

    def set_input_tensor(self, hidden_SBH: Tensor) -> None:
        """Take what the stage before has sent."""
        self.incoming = hidden_SBH

    def forward(self, *, decoder_input: Tensor | None, **inputs: Any) -> Tensor:
        """Return hidden states, or of a last stage the loss of each position."""
        entering = self.incoming if decoder_input is None else decoder_input
        self.incoming = None
        return self.network(decoder_input=entering, **inputs)


def model_of(bench: Bench, config: Any, grids: Mapping[str, Any] | None = None) -> nn.Module:
    """Return a `MimoModel` of the stages of this rank; without `grids` it has both modules."""
    from megatron.core.models.mimo.config import MimoModelConfig  # noqa: PLC0415 -- warns
    from megatron.core.models.mimo.model.base import MimoModel  # noqa: PLC0415
    from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules  # noqa: PLC0415
    from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: PLC0415

    networks = {stage.module: runner.network for stage, runner in bench.runtime.stages.items()}
    encoder = ModuleSpec(module=Encoder, params={"network": networks.get("vision")})
    language = {"config": config, "network": networks.get("language")}
    more = {} if grids is None else {"module_to_grid_map": grids}
    return MimoModel(
        MimoModelConfig(
            language_model_spec=ModuleSpec(module=Language, params=language),
            modality_submodules_spec={
                "vision": ModuleSpec(
                    module=VisionModalitySubmodules, submodules={"encoders": {ENCODER: encoder}}
                )
            },
            special_token_ids={"vision": placeholder_of(bench)},
            **more,
        )
    )


def placeholder_of(bench: Bench) -> int:
    """Return the token of a row: no id of the text, and never embedded."""
    language = bench.step.topology.modules["language"].model
    assert isinstance(language, Gpt)
    return language.vocab


def batches(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yield each microbatch of the step as `MimoModel` takes it, with what the stages of this rank read of it."""
    loader = Loader(bench.source, device=bench.device.torch, dtype=DTYPES[bench.runtime.job.spec.precision])
    for microbatch in range(bench.step.topology.spec.batch.microbatches):
        given: dict[str, Any] = {"input_ids": None}
        for stage, runner in bench.runtime.stages.items():
            dp_rank = runner.module.position(bench.runtime.rank)["dp"]
            share = bench.step.share(stage.module, dp_rank, microbatch)
            if stage.module == "vision":
                rows = loader.inputs(runner.module, share)["rows"]
                given["modality_inputs"] = {"vision": {ENCODER: {"rows": rows, "share": share}}}
            else:
                given |= _text(loader, runner, share, placeholder_of(bench))
        yield given


def _text(loader: Loader, runner: StageRunner, share: Share, placeholder: int) -> dict[str, Tensor]:
    """Return what a stage of the language model reads, [B, S] each.

    Samples are padded with zeros to the longest of the microbatch, as Megatron's examples do. Attention is causal, so
    that what stands behind a sample changes nothing of it; and it weighs nothing in the loss.
    """
    found = {}
    if runner.info.first:
        tokens = loader.inputs(runner.module, share)["tokens"]
        found["input_ids"] = _padded(torch.where(tokens < 0, placeholder, tokens), share)
        places = torch.arange(found["input_ids"].shape[1], device=tokens.device)
        found["position_ids"] = places.expand_as(found["input_ids"])
    if runner.info.last:
        targets = loader.targets(runner.module, share)
        found["labels"] = _padded(targets["labels"], share)
        found["loss_mask"] = _padded(targets["loss_weights"], share)
    return found


def _padded(values_T: Tensor, share: Share) -> Tensor:
    return pad_sequence(values_T.split(list(share.lengths)), batch_first=True)


def loss_of(bench: Bench, losses_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Return a microbatch's part of the loss of the step: a sum over tokens, by the count of all microbatches."""
    return (losses_BS.float() * mask_BS).sum() / bench.step.units["language"]


def language_tp(bench: Bench) -> Any:
    """Return the tp ranks of this rank's part of the language model; this rank alone, where it has none."""
    networks = [r.network for stage, r in bench.runtime.stages.items() if stage.module == "language"]
    return networks[0].tp if networks else bench.session.groups.alone().tp


def clear(bench: Bench) -> None:
    """Set the gradients to zero."""
    for buffer in bench.runtime.buffers.values():
        buffer.clear()


def squared_norm(bench: Bench) -> float:
    """Return this rank's part of the squared gradient norm."""
    return sum(square for buffer in bench.runtime.buffers.values() for square in buffer.partials())


@contextlib.contextmanager
def as_megatron_is_run(bench: Bench) -> Iterator[None]:
    """Give Megatron's loss the global that it asks for, and leave unsaid that its model is experimental."""
    tp = language_tp(bench)
    with patch.object(parallel_state, "_TENSOR_MODEL_PARALLEL_GROUP", tp), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
