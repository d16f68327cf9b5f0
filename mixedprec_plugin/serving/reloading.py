"""Whether the layers of a served model can take new weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from sglang.srt.layers.quantization.base_config import QuantizeMethodBase
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsFusedMoEMethod,
)

from mixedprec_plugin.errors import LoadError, Problem
from mixedprec_plugin.plan.folding import fold_names


def check_reloadable(built: Mapping[str, torch.nn.Module]) -> None:
    """Refuse new weights for layers that have no way to take them, before anything is written.

    Some of SGLang's methods put their weight in another parameter after it was loaded, and leave
    its loader behind: per-tensor and per-channel FP8 turn it around (fp8.py:1256, w8a8_fp8.py:135).
    A tensor that is copied into a square one would be served transposed, without a word.

    Args:
        built: module name -> the module, as served.
    Raises:
        LoadError: names the layers by method.
    """
    found: dict[str, list[str]] = {}
    for name, module in built.items():
        for part in module.modules():
            method = getattr(part, "quant_method", None)
            if method is None:
                continue
            is_lost = _is_turned
            if isinstance(method, CompressedTensorsFusedMoEMethod):
                is_lost = _is_replaced
            elif _restores(method):
                continue
            if any(map(is_lost, part.parameters(recurse=False))):
                found.setdefault(type(method).__name__, []).append(name)
    problems = [
        Problem(
            ", ".join(fold_names(dict.fromkeys(names))),
            f"takes no new weights: {method} gave its weight another form after it was loaded",
            "start the server anew with them",
            "reload",
        )
        for method, names in found.items()
    ]
    if problems:
        raise LoadError(problems)


def _is_turned(parameter: torch.Tensor) -> bool:
    """Whether a parameter is no more what its loader fills; scales of DeepGEMM's keep theirs.

    Source: `requant_weight_ue8m0_inplace` (fp8_utils.py), on compute capability 10.0 and 12.0.
    """
    return not hasattr(parameter, "weight_loader") or bool(
        getattr(parameter, "format_ue8m0", False)
    )


def _is_replaced(parameter: torch.Tensor) -> bool:
    """Whether another stands in the place of a parameter of compressed-tensors' experts.

    These restore what they repacked, but not all: the order of groups is gone, as is what Triton's
    kernels read anew, and the scales of FP8 per tensor (compressed_tensors_wNa16_moe.py:328, 517,
    compressed_tensors_w8a8_fp8_moe.py:310).
    """
    return parameter.numel() > 0 and not hasattr(parameter, "weight_loader")


def _restores(method: object) -> bool:
    """Whether a method gives its weights the checkpoint's form again when it is asked to."""
    own = getattr(type(method), "restore_weights_before_loading", None)
    base = getattr(QuantizeMethodBase, "restore_weights_before_loading", None)
    return own is not None and own is not base
