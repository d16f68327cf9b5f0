"""A plan as compressed-tensors, which stock SGLang and vLLM load without this plugin.

Every layer's numbers stay what they are; only names and packing change. Source: compressed-tensors
`QuantizationConfig` and `PackedQuantizationCompressor`, and what SGLang 0.5.23 makes of them
(layers/quantization/compressed_tensors/compressed_tensors.py, below sglang/srt).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from mixedprec_plugin.convert.form import Tensors
from mixedprec_plugin.errors import Problem
from mixedprec_plugin.families.names import ExpertShard
from mixedprec_plugin.methods.groups import num_groups
from mixedprec_plugin.methods.spec import TensorSpec
from mixedprec_plugin.plan.folding import fold_names
from mixedprec_plugin.plan.model import Plan, PlannedLayer
from mixedprec_plugin.preset.model import Scheme
from mixedprec_plugin.quantize.packing import pack, unpack_awq

# layers that SGLang builds as linear ones and asks its config for
_ASKED = frozenset({"linear", "expert", "router", "lm_head"})
_PACKED = "pack-quantized"
_FLOAT = "float-quantized"
_FP8 = ("fp8", "fp8_channel")


class CompressedForm:
    """compressed-tensors: a group of layers for each scheme, the unquantized ones ignored."""

    name = "compressed-tensors"

    def problems(self, plan: Plan) -> list[Problem]:
        """Say which layers compressed-tensors, or SGLang's reader of it, cannot hold."""
        found: dict[str, list[str]] = {}
        for layer in plan.layers:
            if reason := _why_not(layer):
                found.setdefault(reason, []).append(layer.name)
        blocks = {
            tuple(layer.scheme.arguments["weight_block_size"]): layer.name
            for layer in plan.layers
            if layer.scheme is not None and layer.scheme.arguments.get("weight_block_size")
        }
        for name in list(blocks.values())[1:]:
            reason = "has blocks of another size than others, and SGLang reads one size there"
            found.setdefault(reason, []).append(name)
        for module, groups in plan.expert_groups.items():
            if len(groups) > 1:
                reason = "has experts in several schemes, and SGLang looks at the first one's alone"
                found.setdefault(reason, []).append(module)
        remedy = "give it another method, or leave out --format compressed-tensors"
        return [
            Problem(", ".join(fold_names(names)), reason, remedy, "compressed-tensors")
            for reason, names in found.items()
        ]

    def outputs(self, layer: PlannedLayer) -> Mapping[str, TensorSpec]:
        """The names and shapes of compressed-tensors."""
        if layer.scheme is None or layer.scheme.method == "bf16":
            return layer.outputs
        assert layer.stored is not None
        N, K = layer.stored.N, layer.stored.K
        own = _stored_suffixes(layer.scheme)
        rest = {suffix: spec for suffix, spec in layer.outputs.items() if suffix not in own}
        if layer.scheme.method in _FP8:
            return _fp8_outputs(layer) | rest
        bits, group_size = layer.scheme.arguments["bits"], layer.scheme.arguments["group_size"]
        groups = num_groups(K, group_size)
        outputs = {
            "weight_packed": TensorSpec("I32", (N, K * bits // 32)),
            "weight_scale": TensorSpec(layer.outputs["scales"].dtype, (N, groups)),
            "weight_shape": TensorSpec("I64", (2,)),
        }
        if layer.scheme.method == "awq":
            outputs["weight_zero_point"] = TensorSpec("I32", (N * bits // 32, groups))
        return outputs | rest

    def tensors(self, layer: PlannedLayer, composed: Tensors) -> Tensors:
        """The same numbers in the names and the packing of compressed-tensors."""
        if layer.scheme is None or layer.scheme.method == "bf16":
            return composed
        own = _stored_suffixes(layer.scheme)
        rest = {suffix: tensor for suffix, tensor in composed.items() if suffix not in own}
        if layer.scheme.method in _FP8:
            return _fp8_tensors(composed) | rest
        if layer.scheme.method == "gptq":
            return repack_gptq(composed, layer.scheme.arguments["bits"]) | rest
        return repack_awq(composed) | rest

    def quantization_config(self, plan: Plan) -> dict[str, Any]:
        """A group for each scheme.

        Targets name fused modules beside their shards: SGLang's own models do not tell it what
        they fuse (models/llama.py has no packed_modules_mapping). Blocks are the group of "Linear",
        too: SGLang looks there for their size where it loads a fused module's shards
        (`weight_block_size`, asked for in layers/linear.py:1311). A layer's name goes before it.
        """
        groups: dict[str, dict[str, Any]] = {}
        ignore: dict[str, None] = {"lm_head": None}
        for layer in plan.layers:
            if layer.kind not in _ASKED or not layer.num_weights:
                continue
            if layer.scheme is None or layer.scheme.method == "bf16":
                ignore.update(dict.fromkeys(_targets(layer)))
                continue
            group = _group(layer.scheme)
            targets = groups.setdefault(repr(group), {**group, "targets": {}})["targets"]
            targets.update(dict.fromkeys(_targets(layer)))
        for group in groups.values():
            if group["weights"]["strategy"] == "block":
                group["targets"]["Linear"] = None
        # readers that take the first target that fits find names before "Linear"
        ordered = sorted(groups.values(), key=lambda group: "Linear" in group["targets"])
        formats = {group["format"] for group in ordered}
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{number}": {**group, "targets": list(group["targets"])}
                for number, group in enumerate(ordered)
            },
            "ignore": list(ignore),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


def _why_not(layer: PlannedLayer) -> str:
    scheme = layer.scheme
    if scheme is None or scheme.method == "bf16":
        return ""
    if scheme.method == "blockwise_int8":
        return f"{scheme.label} cannot be written: SGLang reads no INT8 in blocks there"
    if scheme.method not in (*_FP8, "gptq", "awq"):
        return f"{scheme.label} ({scheme.method}) has no counterpart there"
    if scheme.method == "gptq" and scheme.arguments["desc_act"]:
        return f"{scheme.label} cannot be written: its groups are in act order"
    if scheme.method == "awq" and isinstance(layer.shard, ExpertShard):
        return f"{scheme.label} cannot be written: SGLang reads no experts with zero points there"
    return ""


def _targets(layer: PlannedLayer) -> list[str]:
    if isinstance(layer.shard, ExpertShard):
        return [rf"re:{re.escape(layer.module)}\.\d+\.\w+$"]
    return list(dict.fromkeys([layer.name, layer.module]))


def _stored_suffixes(scheme: Scheme) -> frozenset[str]:
    if scheme.method in _FP8:
        return frozenset({"weight", "weight_scale", "weight_scale_inv", "input_scale"})
    return frozenset({"qweight", "qzeros", "scales", "g_idx"})


def _group(scheme: Scheme) -> dict[str, Any]:
    """One `config_groups` entry, without its targets."""
    arguments = scheme.arguments
    if scheme.method == "fp8_channel":
        weights = _arguments(num_bits=8, type="float", strategy="channel")
        inputs = _arguments(num_bits=8, type="float", strategy="token", dynamic=True)
        return {"format": _FLOAT, "weights": weights, "input_activations": inputs}
    if scheme.method != "fp8":
        group_size = arguments["group_size"]
        weights = _arguments(
            num_bits=arguments["bits"],
            type="int",
            symmetric=scheme.method == "gptq",
            strategy="channel" if group_size == -1 else "group",
            group_size=None if group_size == -1 else group_size,
        )
        return {"format": _PACKED, "weights": weights, "input_activations": None}
    block = arguments["weight_block_size"]
    if block is not None:
        weights = _arguments(num_bits=8, type="float", strategy="block", block_structure=block)
        inputs = _arguments(
            num_bits=8, type="float", strategy="group", group_size=block[1], dynamic=True
        )
    else:
        is_dynamic = arguments["activation_scheme"] == "dynamic"
        weights = _arguments(num_bits=8, type="float", strategy="tensor")
        inputs = _arguments(
            num_bits=8,
            type="float",
            strategy="token" if is_dynamic else "tensor",
            dynamic=is_dynamic,
        )
    return {"format": _FLOAT, "weights": weights, "input_activations": inputs}


def _arguments(**given: Any) -> dict[str, Any]:
    """compressed-tensors' `QuantizationArgs`, as far as readers look at them."""
    defaults = {
        "symmetric": True, "group_size": None, "block_structure": None, "dynamic": False,
        "actorder": None,
    }  # fmt: skip
    return {**defaults, **given}


def _fp8_outputs(layer: PlannedLayer) -> dict[str, TensorSpec]:
    outputs = layer.outputs
    if "weight_scale_inv" in outputs:
        return {"weight": outputs["weight"], "weight_scale": outputs["weight_scale_inv"]}
    if outputs["weight_scale"].shape:
        return {suffix: outputs[suffix] for suffix in ("weight", "weight_scale")}
    scales = [suffix for suffix in ("weight_scale", "input_scale") if suffix in outputs]
    return {"weight": outputs["weight"], **{s: TensorSpec("F32", (1,)) for s in scales}}


def _fp8_tensors(composed: Tensors) -> dict[str, torch.Tensor]:
    if "weight_scale_inv" in composed:
        return {"weight": composed["weight"], "weight_scale": composed["weight_scale_inv"]}
    if composed["weight_scale"].dim():
        return {suffix: composed[suffix] for suffix in ("weight", "weight_scale")}
    scales = [suffix for suffix in ("weight_scale", "input_scale") if suffix in composed]
    return {"weight": composed["weight"], **{s: composed[s].reshape(1) for s in scales}}


def repack_gptq(tensors: Tensors, bits: int) -> dict[str, torch.Tensor]:
    """Repack a symmetric GPTQ layer without act order: words already run along K.

    Args:
        tensors: "qweight" int32 [K/(32/bits), N], "scales" [K/G, N]; not modified.
    Returns:
        "weight_packed" int32 [N, K/(32/bits)], "weight_scale" [N, K/G], "weight_shape" int64 [2].
    """
    words = tensors["qweight"]
    return {
        "weight_packed": words.t().contiguous(),
        "weight_scale": tensors["scales"].t().contiguous(),
        "weight_shape": torch.tensor([words.shape[1], words.shape[0] * 32 // bits]),
    }


def repack_awq(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Repack an AWQ layer: words along N, interleaved, become words along K.

    Args:
        tensors: "qweight" int32 [K, N/8], "qzeros" int32 [K/G, N/8], "scales" [K/G, N]; not
            modified.
    Returns:
        "weight_packed" int32 [N, K/8], "weight_scale" [N, K/G], "weight_shape" int64 [2],
        "weight_zero_point" int32 [N/8, K/G], packed along N.
    """
    codes, zeros = unpack_awq(tensors["qweight"]), unpack_awq(tensors["qzeros"])
    return {
        "weight_packed": pack(codes, bits=4),
        "weight_scale": tensors["scales"].t().contiguous(),
        "weight_shape": torch.tensor(codes.shape),
        "weight_zero_point": pack(zeros.t(), bits=4).t().contiguous(),
    }
