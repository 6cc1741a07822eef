"""Names: what the shell takes from megatron-core as it is.

Importing this file imports megatron-core without the warnings that it is known to give on a machine without
transformer-engine and Apex. Any other warning still comes through.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator


_KNOWN_AT_IMPORT = (
    # torch 2.13, set off by megatron's jit fuser and by torch's own scripted modules.
    (DeprecationWarning, r"`torch\.jit\.script(_method)?` is deprecated"),
    # megatron-core 0.16.1 without its CUDA companions.
    (UserWarning, r"Transformer Engine and Apex are not installed\. Falling back to "),
    (UserWarning, r"Apex is not installed\. Falling back to Torch Norm"),
    # megatron-core 0.16.1 importing its own deprecated names.
    (DeprecationWarning, r"The following imports from `dynamic_context\.py` will be removed"),
)


with warnings.catch_warnings():
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
