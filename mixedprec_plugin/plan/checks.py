"""What does not fit: rules without layers, layers without a way, shapes without a kernel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mixedprec_plugin.checkpoint.fused_experts import is_fused, why_not_split
from mixedprec_plugin.errors import Problem, Severity
from mixedprec_plugin.families.config import text_config
from mixedprec_plugin.families.names import (
    NEVER_QUANTIZED,
    ExpertShard,
    Kind,
    last_component,
    parallel_kind,
    shard_order,
)
from mixedprec_plugin.families.table import family_of
from mixedprec_plugin.methods.interface import LayerShape, Target
from mixedprec_plugin.methods.registry import AUTO, UNQUANTIZED
from mixedprec_plugin.names import nearest
from mixedprec_plugin.plan.auto import faults_of, find_auto_notes
from mixedprec_plugin.plan.families import (
    mla_faults,
    stored_shards,
    why_not_family,
    why_not_stored_fused,
)
from mixedprec_plugin.plan.folding import fold_names
from mixedprec_plugin.plan.losses import find_losses, find_shard_losses
from mixedprec_plugin.plan.matching import Matches
from mixedprec_plugin.plan.memory import why_not_in_memory
from mixedprec_plugin.plan.model import PlannedLayer
from mixedprec_plugin.preset.model import Preset, Rule

# rule, text, remedy, severity
_Fault = tuple[str, str, str, Severity]


def check_rules(preset: Preset, matches: Matches, kinds: Mapping[str, Kind]) -> list[Problem]:
    """Find rules that match nothing, that later rules shadow wholly, or that ask the impossible.

    Args:
        kinds: name of every layer, tied ones too -> its kind.
    """
    problems = []
    decided = {rule.index for rule in matches.deciding.values()}
    for rule in preset.rules:
        matched = matches.matched[rule.index]
        if not matched:
            if not rule.optional:
                problems.append(_unmatched(rule, kinds))
        elif rule.index not in decided:
            problems.append(_shadowed(rule, matches, matched))
        elif rule.scheme.method not in (UNQUANTIZED, AUTO) and all(
            kinds[n] in NEVER_QUANTIZED for n in matched
        ):
            problems.append(_never_quantized(rule, kinds, matched))
    return problems


def _unmatched(rule: Rule, kinds: Mapping[str, Kind]) -> Problem:
    near = nearest(rule.patterns[0], list(kinds))
    hint = f"did you mean {', '.join(near)}? " if near else ""
    patterns = ", ".join(repr(p) for p in rule.shown)
    return Problem(
        str(rule.location),
        f"{patterns} matches no layer of the model",
        f"{hint}write optional: true if that is meant",
        "unmatched-rule",
    )


def _shadowed(rule: Rule, matches: Matches, matched: Iterable[str]) -> Problem:
    later = sorted({matches.deciding[name].index for name in matched})
    return Problem(
        str(rule.location),
        f"decides no layer: rules {', '.join(map(str, later))} match all of its layers after it",
        "move it after them or remove it",
        "shadowed-rule",
        "warning",
    )


def _never_quantized(rule: Rule, kinds: Mapping[str, Kind], matched: Iterable[str]) -> Problem:
    names = sorted(matched)
    return Problem(
        str(rule.location),
        f"{', '.join(fold_names(names)[:3])} cannot run in {rule.scheme.label}: "
        f"{NEVER_QUANTIZED[kinds[names[0]]]}",
        "remove the rule; such layers are served as stored",
        "never-quantized",
    )


def check_layers(
    layers: Sequence[PlannedLayer], target: Target, config: Mapping[str, Any]
) -> list[Problem]:
    """Check that each layer can be made what the plan says and that its method serves its shape."""
    siblings: dict[object, list[PlannedLayer]] = {}
    parameters = [_parameter(layer) for layer in layers]
    for layer, parameter in zip(layers, parameters, strict=True):
        siblings.setdefault(parameter, []).append(layer)
    shapes: dict[object, object] = {}
    for parameter, shards in siblings.items():
        if len(shards) > 1:
            shards.sort(key=lambda layer: shard_order(layer.shard))
        shapes[parameter] = tuple([(s.shard in ("k", "v"), id(s.stored)) for s in shards])
    found = _fused_experts(layers, config)
    # layers that are alike have the same faults; a large model has 70,000 layers of few kinds
    known: dict[object, tuple[_Fault, ...]] = {}
    for layer, parameter in zip(layers, parameters, strict=True):
        if layer.stored is None:
            continue
        key = (
            id(layer.stored), id(layer.scheme), layer.action, layer.rule is None, layer.kind,
            last_component(layer.name), shapes[parameter],
        )  # fmt: skip
        if key not in known:
            known[key] = tuple(_faults(layer, siblings[parameter], target, config))
        for fault in known[key]:
            found.setdefault(fault, []).append(layer.name)
    problems = [
        Problem(", ".join(fold_names(names)), text, remedy, rule, severity)
        for (rule, text, remedy, severity), names in found.items()
    ]
    problems += why_not_family(config, target, layers)
    return problems + why_not_in_memory(layers, target, config)


def _fused_experts(
    layers: Sequence[PlannedLayer], config: Mapping[str, Any]
) -> dict[_Fault, list[str]]:
    """Experts that are stored in one tensor and could not be taken apart."""
    found: dict[_Fault, list[str]] = {}
    for layer in layers:
        if layer.kind == "other" and is_fused(layer.name, layer.inputs):
            text = why_not_split(layer.inputs, config)
            remedy = "take a checkpoint that stores them one by one"
            found.setdefault(("fused-experts", text, remedy, "error"), []).append(layer.name)
    return found


def _faults(
    layer: PlannedLayer,
    shards: Sequence[PlannedLayer],
    target: Target,
    config: Mapping[str, Any],
) -> Iterator[_Fault]:
    assert layer.stored is not None
    if layer.kind == "draft":
        return
    for text in layer.stored.disagreements:
        remedy = "its tensors decide; check that the checkpoint is whole"
        yield "stored-disagreement", text, remedy, "warning"
    for reason in layer.reasons:
        yield *reason, "error"
    if layer.reasons or layer.scheme is None:
        return
    if text := why_not_stored_fused(layer, config):
        yield "config-shape", text, "config.json and weights are of different models", "error"
        return
    shape = _layer_shape(layer, shards, target, config)
    losses = find_losses(layer, target) + find_shard_losses(shards, target)
    for text, remedy in (*losses, *find_auto_notes(layer)):
        yield "loss", text, remedy, "warning"
    faults = faults_of(layer, shape, target)
    for fault in faults:
        yield *fault, "error"
    for text, remedy in mla_faults(layer, shards, target.device, config):
        yield "mla", text, remedy, "error"
    if target.device == "cpu" and not faults:
        for fault in faults_of(layer, shape, Target(tp_size=target.tp_size, dtype=target.dtype)):
            text = f"does not run on CUDA: {fault.text}"
            yield "cuda-shape", text, fault.remedy, "warning"


def _parameter(layer: PlannedLayer) -> object:
    """What holds a layer's weights: its module, or `w13` or `w2` of one expert."""
    if isinstance(layer.shard, ExpertShard):
        return layer.module, layer.shard.expert, layer.shard.projection == "w2"
    return layer.module


def _layer_shape(
    layer: PlannedLayer,
    siblings: Sequence[PlannedLayer],
    target: Target,
    config: Mapping[str, Any],
) -> LayerShape:
    assert layer.stored is not None
    # SGLang repeats key and value heads where there are fewer of them than ranks
    num_heads = int(text_config(config).get("num_key_value_heads") or target.tp_size)
    shards = stored_shards(layer, config) or tuple(
        (str(s.shard), s.stored.N) for s in siblings if s.stored is not None
    )
    return LayerShape(
        N=layer.stored.N,
        K=layer.stored.K,
        shard_sizes=tuple(N for _, N in shards),
        parallel=parallel_kind(layer.name, family_of(config)),
        tp_size=target.tp_size,
        dtype=target.dtype,
        shard_ranks=tuple(
            min(target.tp_size, num_heads) if shard in ("k", "v") else target.tp_size
            for shard, _ in shards
        ),
        is_expert=isinstance(layer.shard, ExpertShard),
    )
