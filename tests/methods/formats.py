"""Layers by the dtypes and shapes of their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.methods.recognition import recognize

LINEAR = "model.layers.0.mlp.down_proj"


def found(
    specs: Mapping[str, Any], said: Mapping[str, Any] | None = None, name: str = LINEAR
) -> Any:
    """How a layer is stored whose tensors have these dtypes and shapes."""
    tensors = {
        suffix: StoredTensor(suffix, dtype, shape, Path("model.safetensors"), 0, 0)
        for suffix, (dtype, shape) in specs.items()
    }
    return recognize(tensors, said or {}, name)
