"""Builds SGLang's layers of experts and evaluates them densely in float64, by independent code."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mixedprec_plugin.methods.registry import bind
from tests.cpu.layers import QUANTIZERS, Case, dequantize, make_config

HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K = 256, 384, 5, 3
PROJECTIONS = {"w1": (INTERMEDIATE, HIDDEN), "w3": (INTERMEDIATE, HIDDEN),
               "w2": (HIDDEN, INTERMEDIATE)}  # fmt: skip
# projection -> tensor suffix -> tensor
Stored = Mapping[str, Mapping[str, torch.Tensor]]


def random_experts(num_experts: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Random gate, down and up weights of every expert, in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            shard: torch.randn(shape, generator=generator)
            .mul_(shape[1] ** -0.5 * (2 if shard == "w3" else 1))
            .bfloat16()
            for shard, shape in PROJECTIONS.items()
        }
        for _ in range(num_experts)
    ]


def store(case: Case | None, weights: Mapping[str, torch.Tensor]) -> Stored:
    """One expert as the package's quantizer stores it; None is unquantized."""
    if case is None:
        return {shard: {"weight": weight} for shard, weight in weights.items()}
    arguments = bind(case.method, dict(case.arguments))[1]
    quantize = QUANTIZERS[case.method].quantize
    return {shard: quantize(weight, arguments, weight.dtype) for shard, weight in weights.items()}


_stored: dict[tuple[str, int], list[Stored]] = {}


def stored_experts(case: Case | None, seed: int = 0) -> list[Stored]:
    """Random experts as stored, made once."""
    key = (str(case), seed)
    if key not in _stored:
        _stored[key] = [store(case, weights) for weights in random_experts(NUM_EXPERTS, seed)]
    return _stored[key]


def make_experts(layer_class: type, config: Any = None, **options: Any) -> Any:
    """SGLang's layer of experts in bfloat16."""
    sizes = {"num_experts": NUM_EXPERTS, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE}
    defaults = {"top_k": TOP_K, "layer_id": 0, "params_dtype": torch.bfloat16, "inplace": False}
    return layer_class(**{**sizes, **defaults, "prefix": "experts", **options}, quant_config=config)


def make_case(layer_class: type, case: Case | None, **options: Any) -> Any:
    """A layer of experts in one method; unquantized ones with the loop of our own."""
    if case is not None:
        return make_experts(layer_class, make_config(case), **options)
    from mixedprec_plugin.methods.bf16.sglang import UnquantizedFusedMoEMethod

    return make_experts(layer_class, quant_method=UnquantizedFusedMoEMethod(), **options)


def load_experts(layer: Any, stored: Sequence[Stored]) -> None:
    """Hand every tensor to its parameter's own loader, as SGLang's models do, no more."""
    parameters = dict(layer.named_parameters())
    for expert, projections in enumerate(stored):
        for shard, tensors in projections.items():
            part = "w2" if shard == "w2" else "w13"
            for suffix, tensor in tensors.items():
                name = f"{part}_{suffix}"
                parameter = parameters[name]
                parameter.weight_loader(parameter, tensor, f"experts.{name}", shard, expert)


def process(layer: Any) -> None:
    """Finish a layer and the layers inside of it, as SGLang's loader does."""
    for module in layer.modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(module)


def route(num_tokens: int, ids: Any = None, seed: int = 1, **sizes: int) -> Any:
    """Random routing in SGLang's form: weights float32, ids int32; masked ids may be given."""
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    num_experts, top_k = sizes.get("num_experts", NUM_EXPERTS), sizes.get("top_k", TOP_K)
    logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    weights, chosen = logits.softmax(1).topk(top_k)
    return StandardTopKOutput(weights, chosen.int() if ids is None else ids, logits)


def dense(case: Case | None, stored: Stored) -> dict[str, np.ndarray]:
    """The weights of one expert in float64.

    FP8 per tensor: SGLang rounds gate and up projection once more, to the greater of their scales.
    """
    if case is None:
        return {shard: tensors["weight"].double().numpy() for shard, tensors in stored.items()}
    weights = {
        shard: dequantize(case, [tensors]).astype(np.float64) for shard, tensors in stored.items()
    }
    if case.method == "fp8" and not case.arguments["weight_block_size"]:
        scale = max(float(stored[shard]["weight_scale"]) for shard in ("w1", "w3"))
        for shard in ("w1", "w3"):
            codes = torch.from_numpy(weights[shard] / scale).to(torch.float8_e4m3fn)
            weights[shard] = codes.double().numpy() * scale
    return weights


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


GATES = {"silu": _silu, "gelu": _gelu, "gelu_tanh": _gelu_tanh}


def evaluate(
    x: torch.Tensor,
    topk: Any,
    experts: Sequence[Mapping[str, np.ndarray]],
    activation: str = "silu",
    on_input: bool = False,
) -> np.ndarray:
    """What the experts are defined to compute, token by token, [T, H]; ids below 0 add nothing."""
    out = np.zeros(x.shape)
    for token, row in enumerate(x.double().numpy()):
        for weight, expert in zip(topk.topk_weights[token], topk.topk_ids[token], strict=True):
            if expert < 0:
                continue
            w1, w2, w3 = (experts[int(expert)][shard] for shard in ("w1", "w2", "w3"))
            factor = float(weight)
            gate, up = w1 @ row, w3 @ row
            if on_input:
                gate, up, factor = gate * factor, up * factor, 1.0
            out[token] += factor * (w2 @ (GATES[activation](gate) * up))
    return out


def relative_error(out: torch.Tensor, exact: np.ndarray) -> float:
    """RMS of the difference over RMS of the exact values, the worst over tokens that have any."""
    size = np.sqrt((exact**2).mean(1))
    error = np.sqrt(((out.double().numpy() - exact) ** 2).mean(1))
    assert (error[size == 0] == 0).all()
    return float((error[size > 0] / size[size > 0]).max())
