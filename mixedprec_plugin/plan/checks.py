"""What does not fit: rules without layers, layers without a way, shapes without a kernel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mixedprec_plugin.checkpoint.config import text_config
from mixedprec_plugin.checkpoint.fused_experts import is_fused, why_not_split
from mixedprec_plugin.errors import Problem, Severity
from mixedprec_plugin.methods import registry
from mixedprec_plugin.methods.cards import served_dtype, why_not_on_card
from mixedprec_plugin.methods.spec import LayerShape
from mixedprec_plugin.names import nearest
from mixedprec_plugin.plan.architecture import (
    NEVER_QUANTIZED,
    ExpertShard,
    Kind,
    last_component,
    parallel_kind,
    shard_order,
)
from mixedprec_plugin.plan.auto import AUTO, find_auto_faults, find_auto_notes, judged_as
from mixedprec_plugin.plan.conversion import different_arguments
from mixedprec_plugin.plan.families import why_not_family
from mixedprec_plugin.plan.folding import fold_names
from mixedprec_plugin.plan.losses import find_losses, find_shard_losses
from mixedprec_plugin.plan.matching import Matches
from mixedprec_plugin.plan.memory import why_not_in_memory
from mixedprec_plugin.plan.mla import mla_faults
from mixedprec_plugin.plan.model import PlannedLayer, Target
from mixedprec_plugin.plan.repacking import why_not_integers
from mixedprec_plugin.plan.spelling import why_not_spelled
from mixedprec_plugin.plan.stored_fused import stored_shards, why_not_stored_fused
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
        elif rule.scheme.method not in ("bf16", AUTO) and all(
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
    problems += why_not_family(config, target, layers) + why_not_spelled(config, layers)
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
    if layer.scheme is None:
        if layer.stored.method != "bf16":
            text = f"is stored as {layer.stored.description}: {NEVER_QUANTIZED[layer.kind]}"
            yield "stored-format", text, "take a checkpoint that does not quantize it", "error"
        return
    faults = find_auto_faults(layer, target.device)
    faults = faults or _conversion_problems(layer, target) or _stored_problems(layer)
    for rule, text, remedy in faults:
        yield rule, text, remedy, "error"
    if faults:
        return
    method, arguments = judged_as(layer)
    spec = registry.METHODS[method]
    if text := why_not_stored_fused(layer, config):
        yield "config-shape", text, "config.json and weights are of different models", "error"
        return
    shape = _layer_shape(layer, shards, target, config)
    losses = find_losses(layer, target) + find_shard_losses(shards, target)
    for text, remedy in (*losses, *find_auto_notes(layer)):
        yield "loss", text, remedy, "warning"
    misfits = spec.check_shape(arguments, shape, target.device)
    for text, remedy in misfits:
        yield "shape", text, remedy, "error"
    if target.gpu is not None:
        capability = target.gpu.capability
        for text, remedy in why_not_on_card(method, arguments, shape, capability):
            yield "gpu", text, remedy, "error"
    for text, remedy in mla_faults(layer, shards, target.device):
        yield "mla", text, remedy, "error"
    if target.device == "cpu" and not misfits:
        for text, remedy in spec.check_shape(arguments, shape, "cuda"):
            yield "cuda-shape", f"does not run on CUDA: {text}", remedy, "warning"


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
        parallel=parallel_kind(layer.name),
        tp_size=target.tp_size,
        dtype=target.dtype,
        shard_ranks=tuple(
            min(target.tp_size, num_heads) if shard in ("k", "v") else target.tp_size
            for shard, _ in shards
        ),
        is_expert=isinstance(layer.shard, ExpertShard),
    )


def _conversion_problems(layer: PlannedLayer, target: Target) -> list[tuple[str, str, str]]:
    """(rule, text, remedy) for what keeps a layer from becoming what its scheme asks."""
    scheme, stored = layer.scheme, layer.stored
    assert scheme is not None
    assert stored is not None
    if scheme.method == AUTO:
        return []
    served = {"BF16": "bfloat16", "F16": "float16"}[target.dtype]
    wanted = scheme.arguments.get("dtype")
    if scheme.method == "bf16" and wanted not in (None, served):
        text = f"the model runs in {served}, not in {scheme.label}"
        gpu = target.gpu
        has_it = gpu is None or wanted == "float16" or served_dtype("BF16", gpu.capability) != "F16"
        remedy = f"start with --dtype {wanted}, or " if has_it else ""
        return [("dtype", text, f"{remedy}write method: unquantized")]
    if not stored.is_readable:
        text = f"is stored as {stored.description}, which this release does not read"
        return [("stored-format", text, "take a checkpoint in another format")]
    is_taken = layer.action == "as stored" or layer.rule is None
    if not stored.method and is_taken:
        text = f"is stored as {stored.description}, which no method serves as it is"
        if reason := why_not_integers(stored, scheme):
            text += f": {reason}"
        remedy = (
            "match it with method: auto to serve it as it is, method: bf16 to dequantize it, or "
            "write requantize: true"
        )
        return [("stored-format", text, remedy)]
    spec = registry.METHODS[scheme.method]
    is_quantized_here = layer.action in ("quantize", "requantize")
    if is_quantized_here and not spec.quantizer:
        return [("conversion", f"{scheme.method} cannot quantize at load", "use another method")]
    if is_quantized_here and (reason := spec.why_not_quantize(scheme.arguments)):
        return [("conversion", f"cannot be quantized at load: {reason}", "change that argument")]
    if layer.action == "as stored" and scheme.method != "bf16":
        return _mismatch(layer)
    return []


def _mismatch(layer: PlannedLayer) -> list[tuple[str, str, str]]:
    scheme, stored = layer.scheme, layer.stored
    assert scheme is not None
    assert stored is not None
    if stored.method != scheme.method:
        text = f"is stored as {stored.description}, not as {scheme.label} asks ({scheme.method})"
        if reason := why_not_integers(stored, scheme):
            text += f": {reason}"
        remedy = (
            f"write method: {stored.method}, bf16 to dequantize it, or requantize: true to have it "
            f"in {scheme.label} with a second rounding"
        )
        return [("stored-format", text, remedy)]
    different = different_arguments(stored, scheme)
    if not different:
        return []
    asked = ", ".join(f"{key}: {scheme.arguments[key]}" for key in different)
    text = f"is stored as {stored.description}, not with {asked}"
    remedy = "write " + ", ".join(f"{key}: {value}" for key, value in different.items())
    return [("stored-format", text, remedy)]


def _stored_problems(layer: PlannedLayer) -> list[tuple[str, str, str]]:
    """Hold a layer that is taken as stored against what its method stores."""
    if layer.action != "as stored" or layer.method == "bf16":
        return []
    problems = []
    for suffix, expected in layer.outputs.items():
        tensor = layer.inputs.get(suffix)
        if tensor is None and layer.stored is not None and suffix in layer.stored.filled:
            continue
        if tensor is None:
            text = f"lacks {suffix}, which {layer.method} needs"
            problems.append(("stored-tensor", text, "the checkpoint is incomplete"))
            continue
        shapes = {expected.shape} | ({(), (1,)} if expected.shape in ((), (1,)) else set())
        floats = {"BF16", "F16", "F32"}
        fits_dtype = tensor.dtype == expected.dtype or {tensor.dtype, expected.dtype} <= floats
        if tensor.shape not in shapes or not fits_dtype:
            text = (
                f"{suffix} is stored as {tensor.dtype} {list(tensor.shape)} "
                f"(expected {expected.dtype} {list(expected.shape)})"
            )
            problems.append(("stored-tensor", text, "the checkpoint is damaged"))
    return problems
