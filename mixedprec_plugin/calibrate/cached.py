"""The keys and values that attention caches, and the scales that they take in FP8.

    scale = largest magnitude on the text / 448

e4m3 holds numbers up to 448. Keys count as they are cached, behind their norm and their rotation.
Source: llm-compressor, which observes the same states (modifiers/quantization/calibration.py,
`calibrate_kv_cache_input_hook`), and `calculate_qparams` of compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_LARGEST_E4M3 = 448.0


class Cached(TorchFunctionMode):
    """Keeps the largest magnitudes of keys and values while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._maxima: dict[str, torch.Tensor] = {}

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function; of attention, look at its keys and values first."""
        named = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            for number, part in ((1, "key"), (2, "value")):
                states = args[number] if number < len(args) else named[part]
                largest = states.detach().abs().max().float().cpu()
                before = self._maxima.get(part, largest)
                self._maxima[part] = torch.maximum(before, largest)
        return func(*args, **named)

    def maxima(self) -> dict[str, torch.Tensor]:
        """`key` and `value` -> the largest magnitude; empty where no attention ran."""
        return dict(self._maxima)


def kv_scale_of(largest: float) -> torch.Tensor:
    """The scale of what is at most so large, float32 []; never zero."""
    scale = torch.tensor(largest, dtype=torch.float32) / _LARGEST_E4M3
    return torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
