"""Layers under `method: auto`: each runs as its source stores it.

    the source leaves it unquantized   unquantized, in the model's dtype
    CUDA                               SGLang's own class for the source's `quantization_config`
    CPU, stored as one of our methods  that method
    CPU, anything else                 dequantized if we can, which the plan says; else refused

SGLang's class runs all experts of a layer in the form that it finds for the first one: they need
one source and one stored format, on the CPU too.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence

from mixedprec_plugin.errors import Problem
from mixedprec_plugin.families.names import ExpertShard, last_component
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.methods.registry import METHODS, bind
from mixedprec_plugin.methods.stored import StoredFormat
from mixedprec_plugin.plan.conversion import action_of, is_auto
from mixedprec_plugin.plan.folding import fold_problems
from mixedprec_plugin.plan.model import PlannedLayer
from mixedprec_plugin.preset.model import Rule

_SHAPE = re.compile(r"( of)? \[[\d, ]*\]")


def described(stored: StoredFormat) -> str:
    """The format in words, the same for layers of several shapes.

    An expert's may be of one group and of several; and what is not read is told by its shapes.
    """
    if stored.is_one_group:
        return stored.description.replace("group -1", f"group {stored.K}")
    if not stored.is_float and not stored.codec:
        return _SHAPE.sub("", stored.description)
    return stored.description


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
    mixed: set[str] = set()
    problems = []
    for module, shards in modules.items():
        automatic = [shard for shard in shards if is_auto(rules.get(shard))]
        if not automatic or len(shards) < 2:
            continue
        held = {shard: _held(shard, rules, stored) for shard in shards}
        if len(automatic) < len(shards) or len(set(held.values())) > 1:
            mixed.add(module)
            parts = ", ".join(f"{text} for {last_component(s)}" for s, text in held.items())
            text = (
                f"under method: auto its shards need one source and one stored format, got {parts}"
            )
            remedy = "take all of them from one source, or name a method for all of them"
            problems.append(Problem(module, text, remedy, "fused-auto"))
    return mixed, fold_problems(problems)


def find_mixed_experts(layers: Collection[PlannedLayer]) -> list[Problem]:
    """Find layers of experts, some of them quantized and under `auto`, that are not all alike.

    Source:
        compressed-tensors asks for expert 0 (compressed_tensors.py, `get_moe_scheme`), the other
        classes for the layer: a group of experts, a layer of its own in a composite, has no name
        that a source's lists and patterns know.
    """
    automatic = {layer.module for layer in layers if is_bound(layer)}
    modules: dict[str, dict[tuple[str, str], set[int]]] = {}
    for layer in layers:
        if layer.module in automatic and isinstance(layer.shard, ExpertShard):
            forms = modules.setdefault(layer.module, {})
            forms.setdefault(_form(layer), set()).add(layer.shard.expert)
    return fold_problems(
        Problem(
            module,
            "under method: auto SGLang's class runs all experts of a layer alike: they need one "
            f"source and one stored format, got {_told(forms)}",
            "take all of them from one source, or name a method for all of them",
            "mixed-experts",
        )
        for module, forms in modules.items()
        if len(forms) > 1
    )


def by_method(layer: PlannedLayer, target: Target) -> PlannedLayer:
    """A quantized expert under `auto`, which has all experts of a layer alike, by its own method.

    As it is, where no method runs what is stored.
    """
    scheme, rule, stored = layer.scheme, layer.rule, layer.stored
    if not is_bound(layer) or scheme is None or rule is None or stored is None:
        return layer
    if stored.method not in METHODS:
        return layer
    known = METHODS[stored.method].schema
    given = {key: value for key, value in stored.arguments.items() if key in known}
    method, arguments = bind(stored.method, given)
    named = dataclasses.replace(scheme, method=method, arguments=arguments)
    if action_of(named, stored, layer.inputs, target.dtype) != "as stored":
        return layer
    return dataclasses.replace(layer, scheme=named, rule=dataclasses.replace(rule, scheme=named))


def is_bound(layer: PlannedLayer) -> bool:
    """Whether a layer is an expert that only runs as all others of its layer do."""
    is_quantized = layer.stored is not None and not layer.stored.is_float
    return layer.kind == "expert" and is_auto(layer.rule) and is_quantized


def _form(layer: PlannedLayer) -> tuple[str, str]:
    """What experts of a layer need to agree in: the tensors', and what is said of activations."""
    if not is_auto(layer.rule) or layer.stored is None:
        return f"method {layer.method}", ""
    inputs = layer.stored.said.get("inputs")
    said = ", ".join(f"{key} {value}" for key, value in sorted(inputs.items())) if inputs else ""
    return f"{described(layer.stored)} of {layer.source!r}", said


def _told(forms: Mapping[tuple[str, str], Collection[int]]) -> str:
    is_told_by_tensors = len({stored for stored, _ in forms}) == len(forms)
    parts = []
    for (stored, said), experts in forms.items():
        activations = "" if is_told_by_tensors else f" with activations {said or 'as they are'}"
        ids = sorted(experts)
        listed = ", ".join(map(str, ids[:3])) + (", ..." if len(ids) > 3 else "")
        parts.append(f"{stored}{activations} for expert{'s' if len(ids) > 1 else ''} {listed}")
    return ", ".join(parts)


def _held(
    shard: str, rules: Mapping[str, Rule], stored: Mapping[str, tuple[str, StoredFormat | None]]
) -> str:
    if shard in rules and not is_auto(rules[shard]):
        return f"method {rules[shard].scheme.method}"
    source, format_ = stored[shard]
    return f"{described(format_) if format_ else 'nothing'} of {source!r}"


def find_auto_notes(layer: PlannedLayer) -> list[tuple[str, str]]:
    """(text, no remedy) for what the CPU platform does otherwise than CUDA."""
    if not is_auto(layer.rule) or layer.action != "dequantize" or layer.stored is None:
        return []
    stored = layer.stored
    text = f"is dequantized here: no method of the CPU platform runs {stored.description}"
    if not stored.no_class:
        text += "; on CUDA it runs as stored"
        text += ", with quantized activations" if stored.said.get("inputs") else ""
        text += ", if SGLang has a kernel for such experts" if layer.kind == "expert" else ""
    return [(text, "")]
