"""The plan as a table, as JSON and as one screen of log."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from mixedprec_plugin.errors import printable
from mixedprec_plugin.families.names import ExpertShard, sglang_name
from mixedprec_plugin.families.record import Family
from mixedprec_plugin.families.table import family_of
from mixedprec_plugin.names import fold_numbers
from mixedprec_plugin.plan.family_checks import shared_experts_line
from mixedprec_plugin.plan.folding import fold_names
from mixedprec_plugin.plan.kv_cache import kv_cache_as_dict, kv_cache_line
from mixedprec_plugin.plan.memory import memory_lines, usual_load
from mixedprec_plugin.plan.model import Plan, PlannedLayer
from mixedprec_plugin.plan.tables import Page, Table


class Group(NamedTuple):
    """Modules that are alike: one row of the table.

    Attributes:
        name: folded module names, `model.layers.0-29.self_attn.qkv_proj`.
        sglang: what SGLang calls them; empty where that is `name`, and for layers without a method.
        method: the scheme's method with its main arguments, `gptq 4-bit g128`.
        source, action, stored: all that its layers have.
    """

    name: str
    sglang: str
    scheme: str
    method: str
    source: str
    action: str
    stored: str
    num_modules: int
    layers: Sequence[PlannedLayer]


def group_modules(plan: Plan) -> list[Group]:
    """Fold the plan's modules into rows: alike but for a number, same scheme, same action."""
    buckets: dict[tuple[str, ...], dict[str, tuple[PlannedLayer, ...]]] = {}
    for module, layers in _units(plan):
        scheme = layers[0].scheme
        key = (
            _listed(layer.source for layer in layers),
            _listed(f"{x.action} ({x.notes})" if x.notes else x.action for x in layers),
            _listed(layer.stored.description for layer in layers if layer.stored),
            ".".join("#" if part.isdigit() else part for part in module.split(".")),
            f"{scheme.label} {scheme.identity}" if scheme else "",
            ",".join(f"{x.stored.N}x{x.stored.K}" if x.stored else "" for x in layers),
        )
        buckets.setdefault(key, {})[module] = layers
    groups = []
    family = family_of(plan.source.config)
    for (source, action, stored, *_), modules in buckets.items():
        layers = tuple(layer for group in modules.values() for layer in group)
        name, sglang, label, method = ", ".join(fold_names(modules)), "", "-", ""
        if scheme := layers[0].scheme:
            other = ", ".join(fold_names(sglang_name(module, family) for module in modules))
            sglang, label, method = other if other != name else "", scheme.label, scheme.summary
        groups.append(
            Group(name, sglang, label, method, source, action, stored, len(modules), layers)
        )
    return groups


def _units(plan: Plan) -> Iterator[tuple[str, tuple[PlannedLayer, ...]]]:
    """Every module with its layers; a module of experts as one unit for each of its schemes."""
    for module, layers in plan.modules.items():
        groups = plan.expert_groups.get(module, ())
        if not groups:
            yield module, layers
        for group in groups:
            ids = set(group.experts)
            own = (x for x in layers if isinstance(x.shard, ExpertShard) and x.shard.expert in ids)
            yield f"{module}.{fold_numbers(ids)}", tuple(own)


def _listed(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(words))


def _has_sources(plan: Plan) -> bool:
    return any(layer.source != plan.source.name for layer in plan.layers)


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain data for JSON.

    Returns:
        "preset" with the digest of what it says, "layers": one entry a layer of the checkpoint,
        "totals", "problems".
    """
    family = family_of(plan.source.config)
    preset = plan.preset
    return {
        "preset": {
            "path": preset.path,
            "description": preset.description,
            "digest": preset.digest,
        },
        "layers": [_layer_as_dict(layer, family) for layer in plan.layers],
        "tied": dict(plan.tied),
        "kv_cache": kv_cache_as_dict(plan),
        "target": dataclasses.asdict(plan.target),
        "totals": totals(plan),
        "problems": [dataclasses.asdict(problem) for problem in plan.problems],
    }


def _layer_as_dict(layer: PlannedLayer, family: Family) -> dict[str, Any]:
    stored, rescale = layer.stored, layer.rescale
    return {
        "name": layer.name,
        "module": layer.module,
        "sglang_module": sglang_name(layer.module, family),
        "kind": layer.kind,
        "scheme": layer.scheme.label if layer.scheme else None,
        "method": layer.method,
        "arguments": dict(layer.scheme.arguments) if layer.scheme else {},
        "source": layer.source,
        "stored": stored.description if stored else None,
        "action": layer.action,
        # the norms that columns are multiplied and divided by
        "rescaled": rescale
        and {
            "norm": rescale.own.name,
            "times": layer.source,
            "over": rescale.source,
            "offset": rescale.offset,
        },
        "note": layer.note,
        "shape": [stored.N, stored.K] if stored else None,
        "bytes_before": layer.bytes_before,
        "bytes": layer.bytes_after,
        "bits_per_weight": round(layer.bits_per_weight, 4),
        "rule": layer.rule.index if layer.rule else None,
    }


def totals(plan: Plan) -> dict[str, Any]:
    """Sums over the plan; `bytes_unquantized` is the same model wholly in its running dtype.

    Bits a weight are served ones, scales and zero points counted: of all matrices, and of linear
    layers, experts among them, which leaves out embeddings and `lm_head`.
    """
    matrices = [layer for layer in plan.layers if layer.num_weights and layer.kind != "draft"]
    linear = [layer for layer in matrices if layer.kind in ("linear", "expert")]
    # a head that was untied would share the embedding's weight
    own = sum(layer.num_weights for layer in matrices if layer.bytes_before)
    unquantized = plan.bytes_after - _served(matrices) + 2 * own
    return {
        "layers": len(plan.layers),
        "bytes_before": plan.bytes_before,
        "bytes": plan.bytes_after,
        "bytes_unquantized": unquantized,
        "bits_per_weight": round(bits_a_weight(matrices), 4),
        "bits_per_linear_weight": round(bits_a_weight(linear), 4),
    }


def bits_a_weight(layers: Sequence[PlannedLayer]) -> float:
    """Served bits a weight, scales counted; 0 without a weight matrix."""
    num_weights = sum(layer.num_weights for layer in layers)
    return 8 * _served(layers) / num_weights if num_weights else 0.0


def _served(layers: Iterable[PlannedLayer]) -> int:
    return sum(layer.bytes_after for layer in layers)


def print_plan(plan: Plan, page: Page) -> None:
    """Print the plan: a row for each group of modules, and totals."""
    has_sources = _has_sources(plan)
    table = Table(
        ("layers", False), ("scheme", False), ("method", False),
        *([("source", False)] if has_sources else []), ("stored", False), ("action", False),
        ("before", True), ("after", True), ("bits", True),
        dropped=("before", "stored", "scheme", "action"),
    )  # fmt: skip
    for group in group_modules(plan):
        before = format_bytes(sum(layer.bytes_before for layer in group.layers))
        bits = bits_a_weight(group.layers)
        table.add(
            [group.name, f"SGLang: {group.sglang}"] if group.sglang else group.name,
            group.scheme, group.method, *([group.source] if has_sources else []),
            group.stored, group.action,
            before, format_bytes(_served(group.layers)), f"{bits:.2f}" if bits else "",
        )  # fmt: skip
    for name, embedding in plan.tied.items():
        source = [plan.by_name[embedding].source] if has_sources else []
        table.add(name, "-", "", *source, f"tied to {embedding}", "as stored", "", "", "")
    page.print(table)
    page.print()
    page.print(totals_line(plan))
    for line in memory_lines(plan, usual_load(plan.preset)):
        page.print(line)
    for line in filter(None, (*_notes(plan), _unmatched_line(plan))):
        page.print(printable(line))


def _notes(plan: Plan) -> Iterator[str]:
    return filter(None, (kv_cache_line(plan), shared_experts_line(plan)))


def _unmatched_line(plan: Plan) -> str:
    """What becomes of layers in codes that no rule names; empty if there are none."""
    own = [x for x in plan.layers if x.stored and not x.stored.is_float and x.kind != "draft"]
    count = sum(layer.rule is None and layer.action == "as stored" for layer in own)
    if not count:
        return ""
    return (
        f"{count} of {len(own)} layers that are stored quantized match no rule and stay as they "
        "are; a rule with method: auto leaves them to SGLang's own class"
    )


def totals_line(plan: Plan) -> str:
    """One line of sums: stored, served, and against the same model unquantized."""
    sums = totals(plan)
    saved = 1 - sums["bytes"] / sums["bytes_unquantized"] if sums["bytes_unquantized"] else 0.0
    return (
        f"{sums['layers']} layers: {format_bytes(sums['bytes_before'])} stored, "
        f"{format_bytes(sums['bytes'])} served, {sums['bits_per_linear_weight']:.2f} bits a weight "
        f"of linear layers, {sums['bits_per_weight']:.2f} of all; "
        f"unquantized {format_bytes(sums['bytes_unquantized'])}, {saved:.0%} saved"
    )


def summary_lines(plan: Plan) -> list[str]:
    """The plan as one screen of log lines."""
    lines = [f"mixedprec: {plan.preset.path} over {plan.source.path}"]
    for group in group_modules(plan):
        bits = bits_a_weight(group.layers)
        # the label alone where it says as much
        method = f" ({group.method})" if group.method not in ("", group.scheme) else ""
        lines.append(
            f"mixedprec:   {group.name}  {group.scheme}{method}  "
            f"{group.source + '  ' if _has_sources(plan) else ''}{group.action}  "
            f"{format_bytes(_served(group.layers))}  {f'{bits:5.2f} bits' if bits else ''}".rstrip()
        )
    lines.append(f"mixedprec: {totals_line(plan)}")
    lines.extend(f"mixedprec: {line}" for line in _notes(plan))
    lines.extend(f"mixedprec: {p.severity}: {p}" for p in plan.problems)
    return list(map(printable, lines))


def format_bytes(num_bytes: int) -> str:
    """`1536` -> `1.5 KiB`."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
