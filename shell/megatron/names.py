"""Names: what the shell takes from megatron-core as it is.

Importing this file imports megatron-core without the warnings that it is known to give on a machine without
transformer-engine and Apex. Any other warning still comes through. What megatron-core compiles at import is compiled
when it is first called: `torch.compile` alone imports for seconds, and on a CPU nothing of it is called.
"""

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch


_KNOWN_AT_IMPORT = (
    # torch 2.13, set off by megatron's jit fuser and by torch's own scripted modules.
    (DeprecationWarning, r"`torch\.jit\.script(_method)?` is deprecated"),
    # megatron-core 0.16.1 without its CUDA companions.
    (UserWarning, r"Transformer Engine and Apex are not installed\. Falling back to "),
    (UserWarning, r"Apex is not installed\. Falling back to Torch Norm"),
    # megatron-core 0.16.1 importing its own deprecated names.
    (DeprecationWarning, r"The following imports from `dynamic_context\.py` will be removed"),
)


def _compiled_when_called(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Return a function that `torch.compile` compiles at the first call."""
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        if not compiled:
            compiled.append(torch.compile(function, **options))
        return compiled[0](*arguments, **named)

    return call


@contextlib.contextmanager
def _compiling_later() -> Iterator[None]:
    """Let functions that are to be compiled meanwhile wait for their first call."""
    at_once = torch.compile
    torch.compile = _compiled_when_called  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = at_once


with warnings.catch_warnings(), _compiling_later():
    for _category, _message in _KNOWN_AT_IMPORT:
        warnings.filterwarnings("ignore", message=_message, category=_category)
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.mappings import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        gather_from_tensor_model_parallel_region,
        reduce_from_tensor_model_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
        scatter_to_sequence_parallel_region,
    )
    from megatron.core.transformer.transformer_block import TransformerBlock


__all__ = [
    "GPTModel",
    "ProcessGroupCollection",
    "TransformerBlock",
    "copy_to_tensor_model_parallel_region",
    "gather_from_sequence_parallel_region",
    "gather_from_tensor_model_parallel_region",
    "reduce_from_tensor_model_parallel_region",
    "reduce_scatter_to_sequence_parallel_region",
    "scatter_to_sequence_parallel_region",
    "without_known_words",
]


@contextlib.contextmanager
def without_known_words() -> Iterator[None]:
    """Silence a message of megatron-core 0.19 for each GPTModel that is made: that it gets no new features."""
    logger = logging.getLogger(GPTModel.__module__)

    def is_news(record: logging.LogRecord) -> bool:
        return "GPTModel IS DEPRECATED" not in record.getMessage()

    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)
