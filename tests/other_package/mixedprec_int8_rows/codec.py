"""8-bit integers with a scale a row: W = codes * scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mixedprec_plugin.quantize.codec import Numbers, Tensors
from mixedprec_plugin.quantize.scaled import Scaled


def quantize(
    weight: torch.Tensor, arguments: Mapping[str, Any], _dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Round every row of a weight [N, K] to its largest magnitude over `top`."""
    scale = weight.float().abs().amax(1, keepdim=True) / arguments["top"]
    codes = (weight.float() / scale).round_().to(torch.int8)
    return {"row_codes": codes, "row_scale": scale}


def read(tensors: Tensors, _arguments: Mapping[str, Any]) -> Scaled:
    """Tell the codes and scales of a layer."""
    codes = tensors["row_codes"]
    return Scaled(codes, tensors["row_scale"].float(), (1, codes.shape[1]))


def write(
    numbers: Numbers, _arguments: Mapping[str, Any], _dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Store codes and scales of rows."""
    assert isinstance(numbers, Scaled)
    return {"row_codes": numbers.codes, "row_scale": numbers.scales}
