"""Method `auto`: the layer runs as its source stores it, whatever that is.

On CUDA by SGLang's own class for the source's `quantization_config`, which takes every tensor as it
is stored: whatever SGLang reads can be mixed in. It has no arguments: the source decides. What a
layer becomes is in `plan.auto`.
"""

from __future__ import annotations

from typing import Any

from mixedprec_plugin.methods.spec import Arguments, LayerShape, MethodSpec, TensorSpec


def build(_arguments: Arguments, _platform: str) -> dict[str, Any]:
    """Return no arguments: SGLang's class reads the source's own `quantization_config`."""
    return {}


def stored(_arguments: Arguments, _N: int, _K: int, _dtype: str) -> dict[str, TensorSpec]:
    """Return nothing: the tensors are the source's."""
    return {}


def check_shape(_arguments: Arguments, _shape: LayerShape, _device: str) -> list[tuple[str, str]]:
    """Return nothing: what SGLang's class refuses is found when it builds the layer."""
    return []


SPEC = MethodSpec(
    name="auto",
    title="as the source stores it, by SGLang's own class for its quantization_config",
    aliases={},
    defaults={},
    argument_schema="auto.schema.json",
    config_classes={},
    build=build,
    stored=stored,
    quantizer="",
    dequantizer="",
    # never compared: shards under `auto` are of one format, or an error
    precision=lambda _arguments: 0.0,
    layer_kinds=frozenset({"linear", "expert"}),
    min_capability=0,
    check_shape=check_shape,
)
