"""Hand torch tensors to the numpy reference without torch's own casts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from tests.reference.safetensors_file import decode_bf16, decode_e4m3


def as_arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Every tensor as the reference takes it: floats as float32, integers as they are."""
    return {suffix: as_array(tensor) for suffix, tensor in tensors.items()}


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """One tensor, e4m3 and bf16 decoded by the tests' own code."""
    if tensor.dtype == torch.float8_e4m3fn:
        return decode_e4m3(tensor.view(torch.uint8).numpy())
    if tensor.dtype == torch.bfloat16:
        return decode_bf16(tensor.contiguous().view(torch.uint16).numpy())
    array: np.ndarray = tensor.numpy()
    return array.astype(np.float32) if tensor.dtype.is_floating_point else array
