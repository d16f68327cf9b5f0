"""A plan as compressed-tensors, which stock SGLang and vLLM load without this plugin.

Every layer's numbers stay what they are; only names and packing change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.convert.form import Tensors
from mixedprec_plugin.errors import Problem
from mixedprec_plugin.families.names import ExpertShard
from mixedprec_plugin.methods.foreign import compressed_tensors
from mixedprec_plugin.methods.recognition import recognize
from mixedprec_plugin.methods.registry import METHODS
from mixedprec_plugin.methods.stored import StoredFormat, TensorSpec
from mixedprec_plugin.plan.folding import fold_names
from mixedprec_plugin.plan.model import Plan, PlannedLayer
from mixedprec_plugin.quantize.codec import load_codec

# layers that SGLang builds as linear ones and asks its config for
_ASKED = frozenset({"linear", "expert", "router", "lm_head"})


class CompressedForm:
    """compressed-tensors: a group of layers for each scheme, the unquantized ones ignored."""

    name = compressed_tensors.NAME

    def problems(self, plan: Plan) -> list[Problem]:
        """Say which layers compressed-tensors, or SGLang's reader of it, cannot hold."""
        found: dict[str, list[str]] = {}
        blocks: dict[tuple[int, ...], str] = {}
        for layer in plan.layers:
            if reason := _why_not(layer):
                found.setdefault(reason, []).append(layer.name)
            elif (served := served_format(layer)) and "block" in served.facts:
                blocks[tuple(served.facts["block"])] = layer.name
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
        served = served_format(layer)
        if served is None:
            return layer.outputs
        rest = {s: spec for s, spec in layer.outputs.items() if s not in served.suffixes}
        return compressed_tensors.written(served, layer.outputs) | rest

    def tensors(self, layer: PlannedLayer, composed: Tensors) -> Tensors:
        served = served_format(layer)
        if served is None:
            return composed
        rest = {suffix: t for suffix, t in composed.items() if suffix not in served.suffixes}
        numbers = load_codec(served.codec).read(composed, served.how)
        how = {
            "bits": served.facts.get("bits"),
            "symmetric": compressed_tensors.is_written_symmetric(served),
        }
        dtype = next(iter(composed.values())).dtype
        codec = load_codec(compressed_tensors.codec_of(served))
        made = codec.write(numbers, how, dtype)
        outputs = compressed_tensors.written(served, layer.outputs)
        return {suffix: t.reshape(outputs[suffix].shape) for suffix, t in made.items()} | rest

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
            served = served_format(layer)
            if served is None:
                ignore.update(dict.fromkeys(_targets(layer)))
                continue
            group = compressed_tensors.group_for(served, layer.outputs)
            targets = groups.setdefault(repr(group), {**group, "targets": {}})["targets"]
            targets.update(dict.fromkeys(_targets(layer)))
            ignore.pop(layer.name, None)
        for group in groups.values():
            if group["weights"]["strategy"] == "block":
                group["targets"]["Linear"] = None
        # readers that take the first target that fits find names before "Linear"
        ordered = sorted(groups.values(), key=lambda group: "Linear" in group["targets"])
        formats = {group["format"] for group in ordered}
        return {
            "quant_method": compressed_tensors.NAME,
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


def served_format(layer: PlannedLayer) -> StoredFormat | None:
    """What a layer's served tensors are as a stored format; None where no method made them."""
    if layer.scheme is None or layer.is_unquantized or not METHODS[layer.method].codec:
        return None
    declared = METHODS[layer.method].declare(layer.scheme.arguments)
    nowhere = Path()
    tensors = {
        suffix: StoredTensor(suffix, spec.dtype, spec.shape, nowhere, 0, 0)
        for suffix, spec in layer.outputs.items()
    }
    return recognize(tensors, declared)


def _why_not(layer: PlannedLayer) -> str:
    if layer.scheme is None or layer.is_unquantized:
        return ""
    served = served_format(layer)
    if served is None or not served.numbers:
        return f"{layer.scheme.label} ({layer.method}) has no counterpart there"
    is_expert = isinstance(layer.shard, ExpertShard)
    reason = compressed_tensors.why_not_written(served, is_expert=is_expert)
    return f"{layer.scheme.label} cannot be written: {reason}" if reason else ""


def _targets(layer: PlannedLayer) -> list[str]:
    if isinstance(layer.shard, ExpertShard):
        return [rf"re:{re.escape(layer.module)}\.\d+\.\w+$"]
    return list(dict.fromkeys([layer.name, layer.module]))
