"""What SGLang's GPTQ kernels take for granted of a stored layer, and headers cannot tell.

They read no zero points (all are the middle of the range) and, without act order, no g_idx (groups
are in order): a layer that breaks either would load cleanly and emit garbage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mixedprec_plugin.quantize.checks import resolve_group_size


def why_not_plain(tensors: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> str:
    """Say why a GPTQ v1 layer cannot be served as it is stored.

    Args:
        tensors: "qweight", "qzeros", "scales" and optionally "g_idx", as `gptq.quantize` says.
        arguments: "bits", "group_size", "desc_act".
    Returns:
        the reason; an empty string if there is none.
    """
    bits = int(arguments["bits"])
    stored_zero = (1 << (bits - 1)) - 1
    word = sum(stored_zero << shift for shift in range(0, 32, bits))
    if bool((tensors["qzeros"] != word).any()):
        return f"its zero points are not all {stored_zero + 1}, as a symmetric layer's are"
    if "g_idx" not in tensors:
        return ""
    if arguments["desc_act"]:
        return _why_not_groups(tensors["g_idx"], tensors["scales"].shape[0])
    if torch.equal(tensors["g_idx"], _plain_order(tensors, arguments)):
        return ""
    return "its g_idx is not in order, which it is where desc_act is false"


def _why_not_groups(g_idx: torch.Tensor, num_groups: int) -> str:
    """Kernels read the scales of whatever group they are told, behind the last one too."""
    least, most = int(g_idx.min()), int(g_idx.max())
    if least >= 0 and most < num_groups:
        return ""
    return (
        f"its g_idx holds groups from {least} to {most} (expected 0 to {num_groups - 1}, as it has "
        f"scales for {num_groups})"
    )


def with_group_index(
    tensors: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Return the tensors with a "g_idx" int32 [K], the group of every input feature.

    Args:
        tensors: as above; not modified. A stored g_idx is kept.
        arguments: "bits", "group_size".
    Raises:
        ShapeError: the group size does not divide K.
    """
    if "g_idx" in tensors:
        return dict(tensors)
    return {**tensors, "g_idx": _plain_order(tensors, arguments)}


def _plain_order(tensors: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> torch.Tensor:
    pack_factor = 32 // int(arguments["bits"])
    K = tensors["qweight"].shape[0] * pack_factor
    group_size = resolve_group_size(K, arguments["group_size"], pack_factor)
    return torch.arange(K, dtype=torch.int32) // group_size
