"""Values: tensors in host memory as the bytes of a file of safetensors."""

from typing import Any

import torch


DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The names of dtypes in safetensors."""
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
"""The dtypes by these names."""


def values_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor in host memory; those of a contiguous one can be written to."""
    array: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(array)
