"""Formats that are known by name only, told by a tensor that no other format has."""

from __future__ import annotations

from mixedprec_plugin.checkpoint.formats.stored import StoredFormat, Tensors, unusable

# a suffix -> the format that writes it
_SIGNATURES = {
    "SCB": "bitsandbytes 8-bit",
    "quant_map": "bitsandbytes 4-bit",
    "absmax": "bitsandbytes 4-bit",
    "weight_scale_2": "modelopt nvfp4",
    "weight_global_scale": "nvfp4",
    "W_q": "hqq",
    "codebooks": "aqlm",
    "centroids": "vptq",
    "Qidxs": "quip",
    "q_weight": "exl2",
    "trellis": "exl3",
    "B": "marlin",
    "qweight_type": "gguf",
    "weight_blocks": "mxfp4",
    "gate_up_proj_blocks": "mxfp4",
}


def detect_foreign(tensors: Tensors) -> StoredFormat | None:
    """Name a format by its signature; None where no tensor is one."""
    for suffix, name in _SIGNATURES.items():
        if suffix in tensors:
            return unusable(tensors, name)
    return None
