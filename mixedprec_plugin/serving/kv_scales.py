"""Scales of the KV cache: SGLang's parameters for them, and what fills these.

SGLang takes one scale a layer for keys and one for values, and uses them where the cache is in FP8.
Its models know some of the names that checkpoints give them, and drop the others with a warning.
"""

from __future__ import annotations

import torch
from sglang.srt.layers.quantization.kv_cache import BaseKVCacheMethod
from sglang.srt.layers.radix_attention import RadixAttention

from mixedprec_plugin.errors import LoadError, Problem
from mixedprec_plugin.families.names import kv_scale
from mixedprec_plugin.serving.config import MixedPrecisionConfig


def add_kv_scales(model: torch.nn.Module, config: MixedPrecisionConfig) -> None:
    """Give each attention layer that has scales in the checkpoint parameters for them."""
    for path, layer in model.named_modules():
        if not isinstance(layer, RadixAttention):
            continue
        attention = config.attention_of(path.rpartition(".")[0])
        if attention is not None:
            layer.quant_method = BaseKVCacheMethod(config)
            layer.quant_method.create_weights(layer)
            config.attentions.setdefault(attention, []).append(layer)


def place_kv_scale(config: MixedPrecisionConfig, name: str, tensor: torch.Tensor) -> bool:
    """Fill what a tensor is the scale of; return whether it is one of an attention layer.

    Raises:
        LoadError: it is not one scale, or not positive.
    """
    scale = kv_scale(name)
    if scale is None:
        return False
    attention = next((each for each in scale.attentions if each in config.attentions), None)
    if attention is None:
        return False
    has_value = tensor.device.type != "meta" and tensor.numel() == 1
    if tensor.numel() != 1 or (has_value and not float(tensor) > 0):
        stored = float(tensor) if has_value else list(tensor.shape)
        what = f"is {stored} (expected one positive scale a layer, which is what SGLang takes)"
        remedy = "take the layer from a checkpoint that has such a scale, or none"
        raise LoadError(Problem(name, what, remedy, "kv-scale"))
    for layer in config.attentions[attention]:
        for part in scale.parts:
            getattr(layer, f"{part}_scale").data.copy_(tensor.reshape(()))
    return True
