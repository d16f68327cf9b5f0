"""Preset x source -> plan: every decision is made here, from headers alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType

from mixedprec_plugin.checkpoint.formats import StoredFormat, detect_format
from mixedprec_plugin.checkpoint.headers import DTYPE_BITS, StoredTensor
from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.methods import registry
from mixedprec_plugin.methods.spec import TensorSpec
from mixedprec_plugin.plan import checks
from mixedprec_plugin.plan.architecture import (
    NEVER_QUANTIZED,
    Kind,
    fused_module,
    layer_kind,
    shard_order,
)
from mixedprec_plugin.plan.folding import natural_key
from mixedprec_plugin.plan.fusion import settle_fused_modules
from mixedprec_plugin.plan.matching import match_rules
from mixedprec_plugin.plan.model import Action, Plan, PlannedLayer, Target
from mixedprec_plugin.preset.model import Preset, Rule, Scheme

_FLOATS = frozenset({"BF16", "F16", "F32", "F64"})
# buffers that some old checkpoints carry and every model computes by itself
_COMPUTED = ("rotary_emb",)


def resolve_plan(preset: Preset, source: Source, target: Target) -> Plan:
    """Decide for every layer of a checkpoint what it runs as.

    Args:
        preset: the rules.
        source: the checkpoint of --model-path.
        target: device, tensor-parallel size and dtype to plan for.
    Returns:
        the plan; what is wrong is in its `problems`, nothing is raised for it.
    """
    layers = {
        name: tensors
        for name, tensors in sorted(source.layers.items(), key=lambda item: natural_key(item[0]))
        if not name.endswith(_COMPUTED)
    }
    stored = {n: detect_format(t, source.quantization_config, n) for n, t in layers.items()}
    kinds = {name: layer_kind(name, stored[name] is not None) for name in layers}
    tied = _tied_layers(source, kinds)
    matches = match_rules(preset.rules, (*layers, *tied))
    rules = matches.deciding
    asked = {name: _scheme(rules.get(name), stored[name], kinds[name]) for name in layers}
    fused = {name: fused_module(name, layers.keys()) for name in layers}
    modules: dict[str, list[str]] = {}
    for name, (module, _) in sorted(fused.items(), key=lambda item: shard_order(item[1][1])):
        modules.setdefault(module, []).append(name)
    schemes, problems = settle_fused_modules(preset, modules, asked, rules)
    problems += checks.check_rules(preset, matches, {**kinds, **dict.fromkeys(tied, "lm_head")})
    planned = []
    for name, tensors in layers.items():
        module, shard = fused[name]
        planned.append(
            _planned_layer(
                name, module, shard, kinds[name], schemes[name], rules.get(name), stored[name],
                tensors, source, target,
            )
        )  # fmt: skip
    problems += checks.check_layers(planned, target, source.config)
    problems += checks.check_config_shapes(planned, source)
    return Plan(
        preset, source, target, tuple(planned), tuple(problems), MappingProxyType(dict(tied))
    )


def _tied_layers(source: Source, kinds: Mapping[str, Kind]) -> dict[str, str]:
    if not source.config.get("tie_word_embeddings") or "lm_head" in kinds.values():
        return {}
    embedding = next((name for name, kind in kinds.items() if kind == "embedding"), "")
    return {"lm_head": embedding} if embedding else {}


def _scheme(rule: Rule | None, stored: StoredFormat | None, kind: Kind) -> Scheme | None:
    if kind in NEVER_QUANTIZED or stored is None:
        return None
    if rule is not None:
        return _completed(rule.scheme, stored)
    if stored.method in ("", "bf16"):
        return Scheme("as stored", *registry.bind("unquantized", {}))
    return Scheme("as stored", *registry.bind(stored.method, stored.arguments))


def _completed(scheme: Scheme, stored: StoredFormat) -> Scheme:
    """Act order that the preset leaves open is as the source stores it, and none if we quantize."""
    if scheme.arguments.get("desc_act", True) is not None:
        return scheme
    desc_act = scheme.method == stored.method and stored.arguments["desc_act"]
    return dataclasses.replace(scheme, arguments={**scheme.arguments, "desc_act": desc_act})


def _planned_layer(
    name: str,
    module: str,
    shard: str | int | None,
    kind: Kind,
    scheme: Scheme | None,
    rule: Rule | None,
    stored: StoredFormat | None,
    tensors: Mapping[str, StoredTensor],
    source: Source,
    target: Target,
) -> PlannedLayer:
    action = _action(scheme, stored, target)
    outputs = _outputs(action, scheme, stored, tensors, target)
    return PlannedLayer(
        name=name,
        module=module,
        shard=shard,
        kind=kind,
        scheme=scheme,
        rule=rule,
        source=source.name,
        stored=stored,
        action=action,
        inputs=tensors,
        outputs=MappingProxyType(outputs),
        bytes_before=sum(tensor.num_bytes for tensor in tensors.values()),
        bytes_after=sum(_spec_bytes(spec) for spec in outputs.values()),
    )


def _action(scheme: Scheme | None, stored: StoredFormat | None, target: Target) -> Action:
    if scheme is None or stored is None:
        return "as stored"
    if scheme.method == "bf16":
        if stored.method != "bf16":
            return "dequantize"
        served = {"BF16": "bfloat16", "F16": "float16"}.get(target.dtype)
        return "as stored" if stored.arguments["dtype"] == served else "cast"
    return "quantize" if stored.method == "bf16" else "as stored"


def _outputs(
    action: Action,
    scheme: Scheme | None,
    stored: StoredFormat | None,
    tensors: Mapping[str, StoredTensor],
    target: Target,
) -> dict[str, TensorSpec]:
    """What the layer is served as: the method's tensors, then those beside the matrix (biases)."""
    outputs: dict[str, TensorSpec] = {}
    replaced: set[str] = set()
    if scheme is not None and stored is not None and stored.N:
        spec = registry.METHODS[scheme.method]
        outputs |= spec.stored(scheme.arguments, stored.N, stored.K, target.dtype)
        if action in ("quantize", "cast"):
            replaced = {"weight"}
        elif action == "dequantize":
            replaced = set(stored.suffixes)
    for suffix, tensor in tensors.items():
        if suffix not in replaced and suffix not in outputs:
            dtype = target.dtype if tensor.dtype in _FLOATS else tensor.dtype
            outputs[suffix] = TensorSpec(dtype, tensor.shape)
    return outputs


def _spec_bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * DTYPE_BITS[spec.dtype] // 8
