"""Layers under `method: auto`: each runs as its source stores it.

    the source leaves it unquantized   unquantized, in the model's dtype
    CUDA                               SGLang's own class for the source's `quantization_config`
    CPU, stored as one of our methods  that method
    CPU, anything else                 dequantized if we can, which the plan says; else refused

What SGLang's class cannot read is found at load.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from mixedprec_plugin.checkpoint.formats import StoredFormat
from mixedprec_plugin.errors import Problem
from mixedprec_plugin.methods import registry
from mixedprec_plugin.plan.architecture import last_component
from mixedprec_plugin.plan.folding import fold_names
from mixedprec_plugin.plan.model import Device, PlannedLayer
from mixedprec_plugin.preset.model import Rule, Scheme

AUTO = "auto"


def auto_scheme(scheme: Scheme, stored: StoredFormat, device: Device) -> Scheme:
    """Return what a layer under `auto` runs in; the label stays.

    Returns:
        for CUDA, method `auto` with the source and the stored format as its arguments, so that
        layers of different ones are different schemes; otherwise one of our methods.
    """
    if stored.method == "bf16":
        bound = registry.bind("unquantized", {})
    elif device == "cuda":
        bound = (AUTO, {"source": scheme.source, "stored": stored.description})
    elif stored.method:
        bound = registry.bind(stored.method, stored.arguments)
    else:
        bound = registry.bind("unquantized", {})
    return dataclasses.replace(scheme, method=bound[0], arguments=bound[1])


def is_auto(layer: PlannedLayer) -> bool:
    """Whether the preset says `auto` of a layer, whatever it runs in."""
    return layer.rule is not None and layer.rule.scheme.method == AUTO


def find_mixed_modules(
    modules: Mapping[str, Sequence[str]],
    rules: Mapping[str, Rule],
    stored: Mapping[str, tuple[str, StoredFormat | None]],
) -> tuple[set[str], list[Problem]]:
    """Find fused modules under `auto` whose shards are of several sources or formats.

    Args:
        modules: module name -> its shards' layer names.
        rules: layer name -> the rule that decides.
        stored: layer name -> source and format.
    Returns:
        the modules' names, and an error for each way in which they are mixed.
    """
    mixed: dict[str, tuple[str, list[str]]] = {}
    if not any(rule.scheme.method == AUTO for rule in rules.values()):
        return set(), []
    for module, shards in modules.items():
        automatic = [s for s in shards if s in rules and rules[s].scheme.method == AUTO]
        if not automatic or len(shards) < 2:
            continue
        held = {shard: _held(shard, rules, stored) for shard in shards}
        if len(automatic) < len(shards) or len(set(held.values())) > 1:
            parts = [f"{text} for {last_component(shard)}" for shard, text in held.items()]
            mixed[module] = (", ".join(parts), list(shards))
    found: dict[str, list[str]] = {}
    for module, (text, _) in mixed.items():
        found.setdefault(text, []).append(module)
    problems = [
        Problem(
            ", ".join(fold_names(names)),
            f"under method: auto its shards need one source and one stored format, got {text}",
            "take all of them from one source, or name a method for all of them",
            "fused-auto",
        )
        for text, names in found.items()
    ]
    return set(mixed), problems


def _held(
    shard: str, rules: Mapping[str, Rule], stored: Mapping[str, tuple[str, StoredFormat | None]]
) -> str:
    source, format_ = stored[shard]
    if shard in rules and rules[shard].scheme.method != AUTO:
        return f"method {rules[shard].scheme.method}"
    return f"{format_.description if format_ else 'nothing'} of {source!r}"


def find_auto_faults(layer: PlannedLayer, device: Device) -> list[tuple[str, str, str]]:
    """Return (rule, text, remedy) for what keeps a layer under `auto` from being served."""
    if not is_auto(layer) or layer.stored is None or layer.stored.method == "bf16":
        return []
    if layer.kind == "expert":
        text = f"is an expert stored as {layer.stored.description}, which method: auto does not do"
        return [("auto-expert", text, "name the experts' method")]
    if device == "cuda" and layer.stored.disagreements:
        text = f"{layer.stored.disagreements[0]}, which method: auto would go by"
        return [("auto-config", text, "correct config.json, or name the layer's method")]
    if device == "cpu" and not layer.stored.is_readable:
        text = f"is stored as {layer.stored.description}, which the CPU platform does not read"
        return [("stored-format", text, "name another method or source for it to try the rest")]
    return []


def find_auto_notes(layer: PlannedLayer) -> list[tuple[str, str]]:
    """Return (text, remedy) for what the CPU platform does otherwise than CUDA."""
    if not is_auto(layer) or layer.action != "dequantize" or layer.stored is None:
        return []
    inputs = layer.stored.said.get("inputs")
    text = (
        f"is dequantized here: no method of the CPU platform runs {layer.stored.description}; on "
        f"CUDA it runs as stored{', with quantized activations' if inputs else ''}"
    )
    return [(text, "")]
