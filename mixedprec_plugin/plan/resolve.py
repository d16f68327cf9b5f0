"""Preset x source -> plan: every decision is made here, from headers alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from mixedprec_plugin.checkpoint.formats import FormatCache, StoredFormat
from mixedprec_plugin.checkpoint.garbage import uncollected
from mixedprec_plugin.checkpoint.headers import DTYPE_BITS, StoredTensor
from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.errors import Problem
from mixedprec_plugin.methods import registry
from mixedprec_plugin.methods.spec import TensorSpec
from mixedprec_plugin.names import nearest, without_numbers
from mixedprec_plugin.plan import checks
from mixedprec_plugin.plan.architecture import (
    NEVER_QUANTIZED,
    Kind,
    Shard,
    fused_module,
    layer_kind,
    scheme_unit,
    shard_order,
)
from mixedprec_plugin.plan.auto import AUTO, auto_scheme, find_mixed_modules
from mixedprec_plugin.plan.config_shapes import check_config_shapes
from mixedprec_plugin.plan.conversion import is_stored_as
from mixedprec_plugin.plan.draft import NOTE, draft_layers
from mixedprec_plugin.plan.expert_ids import check_expert_ids
from mixedprec_plugin.plan.folding import fold_names, natural_key
from mixedprec_plugin.plan.fusion import settle_fused_modules
from mixedprec_plugin.plan.matching import match_rules
from mixedprec_plugin.plan.mixing import settle_sources
from mixedprec_plugin.plan.model import Action, Plan, PlannedLayer, Target
from mixedprec_plugin.plan.repacking import is_repackable
from mixedprec_plugin.preset.model import Preset, Rule, Scheme

_FLOATS = frozenset({"BF16", "F16", "F32", "F64"})
# SGLang keeps some routers in float32 (models/glm4_moe.py:391, models/deepseek_v2.py:520), and a
# draft model is loaded from what is stored
_UNCAST = frozenset({"router", "draft"})
_ROUTER_BIAS = "e_score_correction_bias"
# buffers that some old checkpoints carry and every model computes by itself
_COMPUTED = ("rotary_emb",)


@dataclasses.dataclass(frozen=True)
class _Taken:
    """Where one layer comes from."""

    source: Source
    tensors: Mapping[str, StoredTensor]
    stored: StoredFormat | None


@uncollected()
def resolve_plan(
    preset: Preset,
    model: Source,
    target: Target,
    others: Mapping[str, Source] = MappingProxyType({}),
) -> Plan:
    """Decide for every layer of a model what it runs as and which checkpoint it comes from.

    Args:
        preset: the rules.
        model: the checkpoint of --model-path; its layers are the model's.
        target: device, tensor-parallel size and dtype to plan for.
        others: name -> checkpoint, of the preset's `sources`.
    Returns:
        the plan; what is wrong is in its `problems`, nothing is raised for it.
    """
    sources = {model.name: model, **others}
    names = [name for name in sorted(model.layers, key=natural_key) if not name.endswith(_COMPUTED)]
    formats = FormatCache()
    kinds = _kinds(model, names, formats)
    tied = _tied_layers(model, kinds)
    drafts = {name for name, kind in kinds.items() if kind == "draft"}
    matches = match_rules(preset.rules, (*names, *tied), uncounted=drafts)
    rules = matches.deciding
    taken, problems = _take(names, rules, kinds, sources, formats)
    asking = _Schemes(target)
    asked = {name: asking.of(rules.get(name), taken[name].stored, kinds[name]) for name in names}
    fused = {name: fused_module(name, model.layers.keys()) for name in names}
    units: dict[str, list[str]] = {}
    for name, (module, shard) in sorted(fused.items(), key=lambda item: shard_order(item[1][1])):
        units.setdefault(scheme_unit(module, shard), []).append(name)
    held = {name: (taken[name].source.name, taken[name].stored) for name in names}
    mixed, mixtures = find_mixed_modules(units, rules, held)
    settled = {unit: shards for unit, shards in units.items() if unit not in mixed}
    schemes, conflicts = settle_fused_modules(preset, settled, asked, rules)
    problems += mixtures + conflicts
    problems += checks.check_rules(preset, matches, {**kinds, **dict.fromkeys(tied, "lm_head")})
    problems += check_expert_ids(preset.rules, [shard for _, shard in fused.values()])
    maker = _Maker(target)
    planned = [
        _planned_layer(
            name,
            *fused[name],
            kinds[name],
            schemes[name],
            rules.get(name),
            taken[name],
            maker.of(schemes[name], taken[name], kinds[name]),
        )
        for name in names
    ]
    planned, mismatches = settle_sources(preset, planned, sources, target, matches, tied, formats)
    problems += mismatches
    problems += checks.check_layers(planned, target, model.config)
    problems += check_config_shapes(planned, model)
    return Plan(
        preset,
        MappingProxyType(sources),
        target,
        tuple(planned),
        tuple(problems),
        MappingProxyType(dict(tied)),
    )


def _kinds(model: Source, names: Sequence[str], formats: FormatCache) -> dict[str, Kind]:
    known: dict[object, Kind] = {}
    kinds: dict[str, Kind] = {}
    for name in names:
        stored = formats.of(model, name)
        # names that share a format differ in numbers only
        key = without_numbers(name) if stored is None else id(stored)
        if key not in known:
            known[key] = layer_kind(name, stored is not None)
        kinds[name] = known[key]
    return kinds | dict.fromkeys(draft_layers(model.config, names), "draft")


def _take(
    names: Sequence[str],
    rules: Mapping[str, Rule],
    kinds: Mapping[str, Kind],
    sources: Mapping[str, Source],
    formats: FormatCache,
) -> tuple[dict[str, _Taken], list[Problem]]:
    """Find every layer in the source that its rule names.

    Layers that no method quantizes follow a rule to its source where that holds them, too.
    """
    taken: dict[str, _Taken] = {}
    missing: dict[tuple[str, str], list[str]] = {}
    for name in names:
        rule = rules.get(name)
        source = sources["model"] if rule is None else sources[rule.scheme.source]
        if name not in source.layers:
            if rule is not None and kinds[name] not in NEVER_QUANTIZED:
                missing.setdefault((source.name, str(rule.location)), []).append(name)
            source = sources["model"]
        taken[name] = _Taken(source, source.layers[name], formats.of(source, name))
    problems = [
        Problem(
            where,
            f"source {source!r} ({sources[source].path}) holds no {', '.join(fold_names(lacking))}",
            _nearest_layers(lacking[0], sources[source]),
            "missing-layer",
        )
        for (source, where), lacking in missing.items()
    ]
    return taken, problems


def _nearest_layers(name: str, source: Source) -> str:
    near = nearest(name, list(source.layers))
    hint = f"it holds {', '.join(near)}; " if near else ""
    return f"{hint}take these layers from another source"


def _tied_layers(source: Source, kinds: Mapping[str, Kind]) -> dict[str, str]:
    if not source.config.get("tie_word_embeddings") or "lm_head" in kinds.values():
        return {}
    embedding = next((name for name, kind in kinds.items() if kind == "embedding"), "")
    return {"lm_head": embedding} if embedding else {}


class _Schemes:
    """The scheme of each layer; layers of one rule or of no rule that are alike share one."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._known: dict[object, Scheme] = {}

    def of(self, rule: Rule | None, stored: StoredFormat | None, kind: Kind) -> Scheme | None:
        if kind in NEVER_QUANTIZED or stored is None:
            return None
        key = (id(rule), id(stored))
        if key not in self._known:
            self._known[key] = self._made(rule, stored)
        return self._known[key]

    def _made(self, rule: Rule | None, stored: StoredFormat) -> Scheme:
        if rule is None:
            return _as_stored(stored)
        if rule.scheme.method == AUTO:
            return auto_scheme(rule.scheme, stored, self._target.device)
        return _completed(rule, stored)


def _as_stored(stored: StoredFormat) -> Scheme:
    if stored.method in ("", "bf16"):
        return Scheme("as stored", *registry.bind("unquantized", {}))
    return Scheme("as stored", *registry.bind(stored.method, stored.arguments))


def _completed(rule: Rule, stored: StoredFormat) -> Scheme:
    """Act order that the preset leaves open is as the source stores it, and none if we quantize."""
    scheme = rule.scheme
    if scheme.arguments.get("desc_act", True) is not None:
        return scheme
    desc_act = scheme.method == stored.family and bool(stored.said.get("desc_act"))
    return dataclasses.replace(scheme, arguments={**scheme.arguments, "desc_act": desc_act})


@dataclasses.dataclass(frozen=True)
class _Made:
    """What layers that are alike become."""

    action: Action
    outputs: Mapping[str, TensorSpec]
    bytes_before: int
    bytes_after: int


class _Maker:
    """What each layer becomes; layers that are alike share it."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._known: dict[object, _Made] = {}

    def of(self, scheme: Scheme | None, taken: _Taken, kind: Kind) -> _Made:
        # layers share a format only where their tensors have the same dtypes and shapes
        alike: object = id(taken.stored)
        if taken.stored is None:
            alike = tuple([(suffix, t.dtype, t.shape) for suffix, t in taken.tensors.items()])
        key = (id(scheme), alike, kind)
        if key not in self._known:
            action = _action(scheme, taken.stored, taken.tensors, self._target)
            outputs = _outputs(action, scheme, taken.stored, taken.tensors, kind, self._target)
            self._known[key] = _Made(
                action,
                MappingProxyType(outputs),
                sum(tensor.num_bytes for tensor in taken.tensors.values()),
                sum(map(_spec_bytes, outputs.values())) if kind != "draft" else 0,
            )
        return self._known[key]


def _planned_layer(
    name: str,
    module: str,
    shard: Shard,
    kind: Kind,
    scheme: Scheme | None,
    rule: Rule | None,
    taken: _Taken,
    made: _Made,
) -> PlannedLayer:
    return PlannedLayer(
        name=name,
        module=module,
        shard=shard,
        kind=kind,
        scheme=scheme,
        rule=rule,
        source=taken.source.name,
        stored=taken.stored,
        action=made.action,
        inputs=taken.tensors,
        outputs=made.outputs,
        bytes_before=made.bytes_before,
        bytes_after=made.bytes_after,
        note=NOTE if kind == "draft" else "",
    )


def _action(
    scheme: Scheme | None,
    stored: StoredFormat | None,
    tensors: Mapping[str, StoredTensor],
    target: Target,
) -> Action:
    if scheme is None or stored is None:
        return "as stored"
    if scheme.method == "bf16":
        if stored.method != "bf16":
            return "dequantize"
        served = {"BF16": "bfloat16", "F16": "float16"}.get(target.dtype)
        return "as stored" if stored.arguments["dtype"] == served else "cast"
    if scheme.method == AUTO:
        return "as stored"
    if stored.method == "bf16":
        return "quantize"
    if is_stored_as(stored, scheme):
        return "as stored"
    if is_repackable(stored, scheme, tensors):
        return "repack"
    return "requantize" if scheme.requantize and stored.is_readable else "as stored"


def _outputs(
    action: Action,
    scheme: Scheme | None,
    stored: StoredFormat | None,
    tensors: Mapping[str, StoredTensor],
    kind: Kind,
    target: Target,
) -> dict[str, TensorSpec]:
    """What the layer is served as: the method's tensors, then those beside the matrix (biases)."""
    outputs: dict[str, TensorSpec] = {}
    replaced: set[str] = set()
    if scheme is not None and stored is not None and stored.N:
        spec = registry.METHODS[scheme.method]
        outputs |= spec.stored(scheme.arguments, stored.N, stored.K, target.dtype)
        if action != "as stored":
            replaced = set(stored.suffixes)
    if scheme is not None and stored is not None and scheme.method == AUTO:
        outputs |= {
            s: TensorSpec(t.dtype, t.shape) for s, t in tensors.items() if s in stored.suffixes
        }
        if stored.family == "gptq" and "g_idx" not in tensors:
            outputs["g_idx"] = TensorSpec("I32", (stored.K,))
    for suffix, tensor in tensors.items():
        if suffix not in replaced and suffix not in outputs:
            is_cast = tensor.dtype in _FLOATS and kind not in _UNCAST and suffix != _ROUTER_BIAS
            dtype = target.dtype if is_cast else tensor.dtype
            outputs[suffix] = TensorSpec(dtype, tensor.shape)
    return outputs


def _spec_bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * DTYPE_BITS[spec.dtype] // 8
