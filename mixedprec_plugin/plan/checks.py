"""What does not fit: rules without layers, layers without a way, shapes without a kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from mixedprec_plugin.checkpoint.fused_experts import is_fused, why_not_split
from mixedprec_plugin.checkpoint.headers import unreadable
from mixedprec_plugin.errors import Problem, Severity
from mixedprec_plugin.families.config import Config, num_kv_ranks
from mixedprec_plugin.families.names import (
    NEVER_QUANTIZED,
    ExpertShard,
    Kind,
    Shard,
    last_component,
    parallel_kind,
    shard_order,
)
from mixedprec_plugin.families.table import family_of
from mixedprec_plugin.methods.interface import Fault, LayerShape, Target
from mixedprec_plugin.methods.kernels import kernel
from mixedprec_plugin.methods.recognition import faults_as_stored
from mixedprec_plugin.methods.registry import AUTO, METHODS, UNQUANTIZED
from mixedprec_plugin.methods.remedies import find_faults
from mixedprec_plugin.methods.stored import FLOAT_DTYPES, StoredFormat
from mixedprec_plugin.plan.auto import find_auto_notes
from mixedprec_plugin.plan.family_checks import (
    mla_faults,
    stored_shards,
    why_not_family,
    why_not_stored_fused,
)
from mixedprec_plugin.plan.folding import fold_names
from mixedprec_plugin.plan.heads import padded
from mixedprec_plugin.plan.matching import Matches
from mixedprec_plugin.plan.memory import why_not_in_memory
from mixedprec_plugin.plan.model import Plan, PlannedLayer
from mixedprec_plugin.plan.near_globs import NearGlobs
from mixedprec_plugin.preset.model import Preset, Rule, Scheme

# that a message names
_MOST_RULES = 3


def check_rules(
    preset: Preset,
    matches: Matches,
    kinds: Mapping[str, Kind],
    fused: Mapping[str, tuple[str, Shard]],
    tied: Mapping[str, str],
) -> list[Problem]:
    """Find rules that match nothing, that later rules shadow wholly, or that ask the impossible.

    Args:
        kinds: name of every layer, tied ones too -> its kind.
        fused: name of every layer -> the module that runs it, and the shard of it that it is.
        tied: a head -> the embedding that SGLang runs in its place.
    """
    problems = []
    near_globs = NearGlobs({name: fused.get(name, (name, None)) for name in kinds})
    decided = {rule.index for rule in matches.deciding.values()}
    for rule in preset.rules:
        where, matched = str(rule.location), matches.matched[rule.index]
        idle = [rule.shown[index] for index in matches.idle[rule.index]]
        if idle and not rule.optional:
            what = f"{', '.join(map(repr, idle))} matches no layer of the model"
            # what stands for the value of an environment variable is not repeated
            hints = map(near_globs.remedy, [p for p in idle if p in rule.patterns])
            found = [hint for hint in dict.fromkeys(hints) if hint]
            remedy = "; ".join((*found, "add optional: true if it need not match"))
            remedy = remedy.replace("?; ", "? ")
            severity: Severity = "warning" if matched else "error"
            problems.append(Problem(where, what, remedy, "unmatched-rule", severity))
        if matched and rule.index not in decided:
            problems.append(_why_nothing_decided(rule, matched, matches))
        elif matched and _asks_in_vain(rule, matched, kinds, tied, matches):
            names = sorted(matched)
            folded, reason = ", ".join(fold_names(names)[:3]), NEVER_QUANTIZED[kinds[names[0]]]
            remedy = "remove the rule; such layers are served as stored"
            if names[0] in tied:
                reason = f"it shares the weight of {tied[names[0]]}"
                remedy = (
                    "write untie_lm_head: true for it to be a matrix of its own, which takes that "
                    "much more memory, or remove the rule"
                )
            asked = f"run in {rule.scheme.label}"
            if rule.scheme.method in (UNQUANTIZED, AUTO):
                asked = f"come from source {rule.scheme.source!r}"
            what = f"{folded} cannot {asked}: {reason}"
            problems.append(Problem(where, what, remedy, "never-quantized"))
    return problems


def _asks_in_vain(
    rule: Rule,
    matched: frozenset[str],
    kinds: Mapping[str, Kind],
    tied: Mapping[str, str],
    matches: Matches,
) -> bool:
    """Whether a rule quantizes what never is, or takes a head from where its embedding is not."""
    if rule.scheme.method not in (UNQUANTIZED, AUTO):
        return all(kinds[name] in NEVER_QUANTIZED for name in matched)
    deciding = [matches.deciding.get(tied.get(name, "")) for name in matched]
    sources = {own.scheme.source if own else "model" for own in deciding}
    return matched <= tied.keys() and rule.scheme.source not in sources


def _why_nothing_decided(rule: Rule, matched: frozenset[str], matches: Matches) -> Problem:
    where = str(rule.location)
    later = sorted({matches.deciding[name].index for name in matched & matches.deciding.keys()})
    if not later:
        head = min(matched)
        what = f"decides no layer: a rule that quantizes {head} spells its name"
        remedy = f"write match: {head}, or remove the rule"
        severity: Severity = "warning" if rule.optional else "error"
        return Problem(where, what, remedy, "unmatched-rule", severity)
    what = f"decides no layer: rules {', '.join(map(str, later))} match all of its layers after it"
    return Problem(where, what, "move it after them or remove it", "shadowed-rule", "warning")


def check_layers(layers: Sequence[PlannedLayer], target: Target, config: Config) -> list[Problem]:
    """Check that each layer can be made what the plan says and that its method serves its shape."""
    rules = {layer.name: layer.rule for layer in layers if layer.rule is not None}
    faults = layer_faults(layers, target, config)
    return [
        *(_located(fault, names, rules) for fault, names in faults.items()),
        *why_not_family(config, target, layers),
        *why_not_in_memory(layers, target, config),
    ]


def _located(fault: Problem, names: Sequence[str], rules: Mapping[str, Rule]) -> Problem:
    """Say which layers have a fault, and which rules asked for it."""
    asking = {rules[name].index: str(rules[name].location) for name in names if name in rules}
    places = list(asking.values())[:_MOST_RULES] if fault.severity == "error" else []
    more = [f"{len(asking) - len(places)} more"] if 0 < len(places) < len(asking) else []
    asked_at = ", ".join([*places, *more])
    return dataclasses.replace(fault, where=", ".join(fold_names(names)), asked_at=asked_at)


def layer_faults(
    layers: Sequence[PlannedLayer], target: Target, config: Config
) -> dict[Problem, list[str]]:
    """What is wrong with single layers, each fault without a `where` -> names of its layers."""
    faults: dict[Problem, list[str]] = {}

    def add(text: str, remedy: str, rule: str) -> None:
        faults.setdefault(Problem("", text, remedy, rule), []).append(layer.name)

    # layers that are alike have the same faults; a large model has 70,000 layers of few kinds
    known: dict[object, list[list[str]]] = {}
    for layer, shards, alike in with_shards(layers):
        if layer.kind == "other" and is_fused(layer.name, layer.inputs):
            remedy = "take a checkpoint that stores them one by one"
            add(why_not_split(layer.inputs, config), remedy, "fused-experts")
        if (dtypes := unreadable(layer.inputs.values())) and not layer.reasons:
            text = f"holds tensors of {', '.join(dtypes)}, which this release does not read"
            add(text, "take a checkpoint in another format", "stored-format")
        if layer.stored is None:
            continue
        key = (alike, layer.rule is None)
        if key not in known:
            own = faults_of_layer(layer, shards, target, config)
            known[key] = [faults.setdefault(fault, []) for fault in own]
        for names in known[key]:
            names.append(layer.name)
    return faults


def with_shards(
    layers: Sequence[PlannedLayer],
) -> Iterator[tuple[PlannedLayer, Sequence[PlannedLayer], object]]:
    """Yield each layer, the layers that share its parameter, and what it is alike in with others.

    Layers that are alike have the same shape, scheme, action and faults.
    """
    siblings: dict[object, list[PlannedLayer]] = {}
    parameters = [_parameter(layer) for layer in layers]
    for layer, parameter in zip(layers, parameters, strict=True):
        siblings.setdefault(parameter, []).append(layer)
    shapes: dict[object, object] = {}
    for parameter, shards in siblings.items():
        if len(shards) > 1:
            shards.sort(key=lambda layer: shard_order(layer.shard))
        shapes[parameter] = tuple([(s.shard in ("k", "v"), id(s.stored)) for s in shards])
    for layer, parameter in zip(layers, parameters, strict=True):
        alike = (
            id(layer.stored), id(layer.scheme), layer.action, layer.kind,
            last_component(layer.name), shapes[parameter],
        )  # fmt: skip
        yield layer, siblings[parameter], alike


def faults_of_layer(
    layer: PlannedLayer, shards: Sequence[PlannedLayer], target: Target, config: Config
) -> Iterator[Problem]:
    """Yield what keeps a layer that has a stored format from being served, and what it loses.

    Args:
        shards: the layers that share its parameter, itself among them.
    Returns:
        problems without a `where`: those of layers that are alike are the same.
    """
    scheme, stored = layer.scheme, layer.stored
    assert stored is not None
    if layer.kind == "draft":
        return
    for text in stored.disagreements:
        remedy = "its tensors decide; check that the checkpoint is whole"
        yield Problem("", text, remedy, "stored-disagreement", "warning")
    for rule, text, remedy in layer.reasons:
        yield Problem("", text, remedy, rule)
    if layer.reasons or scheme is None or layer.kind in NEVER_QUANTIZED:
        return
    if text := why_not_stored_fused(layer, config):
        yield Problem("", text, "config.json and weights are of different models", "config-shape")
        return
    losses = *_losses(layer, scheme, stored, target), *_shard_losses(shards, target)
    for text, remedy in (*losses, *find_auto_notes(layer)):
        yield Problem("", text, remedy, "loss", "warning")
    shape = layer_shape(layer, shards, target, config)

    def faults_on(target: Target) -> list[Fault]:
        # SGLang's classes ask neither shape nor GPU of experts under `auto` in all cases
        if scheme.method == AUTO and layer.kind == "expert":
            return faults_as_stored(stored, shape, target)
        return find_faults(scheme.method, scheme.arguments, shape, target)

    faults = faults_on(target)
    for rule, text, remedy in (*faults, *mla_faults(layer, shards, target.device, config)):
        yield Problem("", text, remedy, rule)
    if target.device == "cpu" and not faults:
        for fault in faults_on(Target(tp_size=target.tp_size, dtype=target.dtype)):
            text = f"does not run on CUDA: {fault.text}"
            yield Problem("", text, fault.remedy, "cuda-shape", "warning")


def _losses(
    layer: PlannedLayer, scheme: Scheme, stored: StoredFormat, target: Target
) -> list[tuple[str, str]]:
    """(text, remedy) for what a layer's plan loses beside its one rounding.

    The size of a second one is told from the formats alone, for weights that are normally
    distributed; those of real models come close to it, larger outliers make it larger.
    """
    if layer.action == "requantize":
        error = METHODS[scheme.method].rounding(scheme.arguments).error(stored.N, stored.K)
        size = f"about {error:.1%} of the weights' RMS" if error else "its own"
        text = (
            f"is rounded twice: what {stored.description} lost stays lost, and {scheme.label} adds "
            f"an error of {size}"
        )
        return [(text, "take it from an unquantized source for one rounding")]
    # kernels of integers in groups multiply by scales in the dtype that the model runs in
    scale = layer.inputs.get("scales") or layer.inputs.get("weight_scale")
    is_rounded = (
        layer.action in ("repack", "as stored") and stored.numbers == "integers"
        and target.dtype == "BF16" and scale is not None and scale.dtype != target.dtype
    )  # fmt: skip
    if not is_rounded or scale is None:
        return []
    name = FLOAT_DTYPES[scale.dtype]
    text = f"its codes are kept, its {name} scales are rounded to bfloat16, up to 0.2% each"
    return [(text, "start with --dtype float16 to keep them" if scale.dtype == "F16" else "")]


def _shard_losses(layers: Sequence[PlannedLayer], target: Target) -> list[tuple[str, str]]:
    """(text, remedy) for what a fused module loses whose shards are of several sources.

    Source: `Fp8LinearMethod.process_weights_after_loading` (layers/quantization/fp8.py:1200-1249).
    """
    scales = [layer.outputs.get("weight_scale") for layer in layers]
    per_tensor = all(scale is not None and not scale.shape for scale in scales)
    if target.device != "cuda" or not per_tensor or len({layer.source for layer in layers}) < 2:
        return []
    text = (
        "its shards are of several sources, each with its own scale; on compute capability 12.x "
        "SGLang rounds them all again, to the largest scale"
    )
    return [(text, "use method: fp8_channel there")]


def _parameter(layer: PlannedLayer) -> object:
    """What holds a layer's weights: its module, or `w13` or `w2` of one expert."""
    if isinstance(layer.shard, ExpertShard):
        return layer.module, layer.shard.expert, layer.shard.projection == "w2"
    return layer.module


def kernel_of(layer: PlannedLayer, plan: Plan) -> str:
    """Name the kernel that runs a layer on the plan's GPU; empty where it is not known."""
    shards = next(s for x, s, _ in with_shards(plan.modules[layer.module]) if x is layer)
    return kernel_among(layer, shards, plan.target, plan.source.config)


def kernel_among(
    layer: PlannedLayer, shards: Sequence[PlannedLayer], target: Target, config: Config
) -> str:
    """The same of a layer and those that share its parameter."""
    if layer.stored is None or layer.scheme is None or layer.reasons:
        return ""
    shape = layer_shape(layer, shards, target, config)
    return kernel(layer.method, layer.scheme.arguments, shape, target)


def layer_shape(
    layer: PlannedLayer, siblings: Sequence[PlannedLayer], target: Target, config: Config
) -> LayerShape:
    """The shape of a layer that has a stored format, as methods' rules see it."""
    assert layer.stored is not None
    kv_ranks = num_kv_ranks(config, target.tp_size)
    is_head = last_component(layer.name) in family_of(config).lm_heads
    shards = (
        [("", padded(layer.stored.N, target.tp_size))]
        if is_head
        else [
            part
            for s in siblings
            if s.stored is not None
            for part in stored_shards(s, config) or ((str(s.shard), s.stored.N),)
        ]
    )
    return LayerShape(
        N=layer.stored.N,
        K=layer.stored.K,
        shard_sizes=tuple(N for _, N in shards),
        parallel=parallel_kind(layer.name, family_of(config)),
        tp_size=target.tp_size,
        dtype=target.dtype,
        shard_ranks=tuple(kv_ranks if s in ("k", "v") else target.tp_size for s, _ in shards),
        is_expert=isinstance(layer.shard, ExpertShard),
        is_head=is_head,
        has_bias="bias" in layer.outputs,
    )
