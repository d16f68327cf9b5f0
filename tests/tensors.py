"""Tensors to the bit: torch cannot compare all FP8 values."""

from __future__ import annotations

import torch


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, uint8 [num_bytes]."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are of one dtype and shape, and alike to the bit."""
    same_kind = (first.dtype, first.shape) == (second.dtype, second.shape)
    return same_kind and torch.equal(raw(first), raw(second))


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose elements can be compared: codes of FP8 as integers."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
