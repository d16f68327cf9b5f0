"""A transformers model that holds a preset's weights, dequantized by independent code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache

from benchmarks.reference_experts import ReferenceExperts, split_experts
from benchmarks.reference_layers import (
    QUANTIZED,
    ReferenceError,
    by_layer,
    reference_linear,
    replace_layer,
)
from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.families.names import ExpertShard
from mixedprec_plugin.methods.interface import Target
from tests.presets import open_virtual_checkpoint

_ATTENTION = "sdpa_over_windows"


def load_unquantized(model_path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a checkpoint as it is, computing in a dtype."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype)
    return model.eval()


def load_reference(
    model_path: Path, preset_path: Path, dtype: torch.dtype
) -> tuple[Any, VirtualCheckpoint]:
    """Load a checkpoint and put every tensor of the preset's virtual checkpoint in its place.

    Args:
        dtype: what everything but the quantized layers computes in.
    Returns:
        the model, its quantized layers replaced by ones with the dequantized weight or, where the
        method quantizes activations, by ones that do so; and the virtual checkpoint.
    Raises:
        ReferenceError: a layer that transformers does not have, or parameters left as they were.
    """
    model = load_unquantized(model_path, dtype)
    stream = open_virtual_checkpoint(model_path, preset_path, Target(device="cpu"))
    experts: dict[str, ReferenceExperts] = {}
    untouched = {name for name, _ in model.named_parameters()}
    for layer_name, tensors in by_layer(stream):
        layer = stream.plan.by_name[layer_name]
        spelled = layer_name.replace(".block_sparse_moe.", ".mlp.")
        if isinstance(layer.shard, ExpertShard):
            block = spelled.partition(".experts.")[0]
            if block not in experts:
                experts[block] = split_experts(model, block)
                untouched = {name for name in untouched if not name.startswith(f"{block}.experts.")}
            experts[block].put(layer, tensors)
        elif layer.method in QUANTIZED:
            replace_layer(model, layer_name, reference_linear(layer, tensors))
            untouched -= {f"{layer_name}.weight", f"{layer_name}.bias"}
        else:
            untouched -= _copy(model, spelled, tensors)
    if untouched:
        raise ReferenceError(f"no tensor came for {', '.join(sorted(untouched))}")
    return model, stream


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean KL(p || q) in nats a token, of log-probabilities [T, V]."""
    return float((p.exp() * (p - q)).sum(-1).double().mean())


def perplexity(rows: torch.Tensor, tokens: list[int]) -> float:
    """exp of the mean negative log-probability of what follows."""
    return float(rows.gather(1, torch.tensor(tokens[1:])[:, None]).double().mean().neg().exp())


def log_probabilities(model: Any, tokens: list[int]) -> torch.Tensor:
    """Return teacher-forced log-probabilities float32 [T - 1, V]; row i is of token i + 1."""
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0, :-1]
        return torch.log_softmax(logits.float(), -1)


def windowed_log_probabilities(model: Any, tokens: list[int], window: int) -> torch.Tensor:
    """Do the same in windows, as `evaluate.engine` asks a server, keys and values kept in between.

    The order of a sum decides bits, and how torch cuts a product into blocks depends on its
    shapes: attention over a window is called with the shapes of SGLang's torch_native. A window
    begins with the last token of the one before, which the server computes again; of its keys and
    values the first are kept for later windows, as in the server's prefix cache.
    """
    AttentionInterface.register(_ATTENTION, _attend_to_window)
    model.set_attn_implementation(_ATTENTION)
    cache: Any = DynamicCache(config=model.config)
    rows = []
    with torch.inference_mode():
        for start in range(0, len(tokens) - 1, window):
            overlap = []
            if start:
                overlap = [(x.keys[:, :, start:], x.values[:, :, start:]) for x in cache.layers]
                cache.crop(-1)
            inputs = torch.tensor([tokens[start : start + window + 1]])
            logits = model(inputs, past_key_values=cache, use_cache=True).logits[0, :-1]
            for layer, (keys, values) in zip(cache.layers, overlap, strict=False):
                layer.keys[:, :, start : start + 1] = keys
                layer.values[:, :, start : start + 1] = values
            rows.append(torch.log_softmax(logits.float(), -1))
    return torch.cat(rows)


def _attend_to_window(
    _module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: Any,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of the last queries [1, H, n, D] to all keys [1, h, T, D]: [1, n, H, D]."""
    missing = key.shape[2] - query.shape[2]
    out = functional.scaled_dot_product_attention(
        functional.pad(query, (0, 0, missing, 0)), key, value,
        is_causal=True, scale=scaling, enable_gqa=True,
    )[:, :, missing:]  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _copy(model: Any, layer_name: str, tensors: Mapping[str, torch.Tensor]) -> set[str]:
    names = set()
    for suffix, tensor in tensors.items():
        name = f"{layer_name}.{suffix}"
        parameter = model.get_parameter(name)
        if parameter.shape != tensor.shape:
            raise ReferenceError(f"{name}: {tuple(tensor.shape)} (expected {parameter.shape})")
        parameter.data.copy_(tensor)
        names.add(name)
    return names
