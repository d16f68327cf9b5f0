"""One scheme for all shards of a fused module."""

from __future__ import annotations

from collections.abc import Mapping

from mixedprec_plugin.errors import Problem, Severity
from mixedprec_plugin.methods import registry
from mixedprec_plugin.plan.architecture import last_component
from mixedprec_plugin.plan.folding import fold_names
from mixedprec_plugin.preset.model import Preset, Rule, Scheme


def settle_fused_modules(
    preset: Preset,
    modules: Mapping[str, list[str]],
    asked: Mapping[str, Scheme | None],
    rules: Mapping[str, Rule],
) -> tuple[dict[str, Scheme | None], list[Problem]]:
    """Hold the schemes that were asked for the shards of each fused module against each other.

    Args:
        modules: module name -> its shards' layer names.
        asked: layer name -> the scheme that the preset asks for.
        rules: layer name -> the rule that decides.
    Returns:
        layer name -> scheme, one for each module where `on_fused_conflict: highest` says so; and
        an error (or, having taken the highest, a warning) for each kind of conflict.
    """
    schemes = dict(asked)
    conflicts: dict[tuple[str, str], list[str]] = {}
    for module, shards in modules.items():
        first = asked[shards[0]]
        if all(asked[shard] is first for shard in shards):
            continue
        wanted = {s.identity: s for shard in shards if (s := asked[shard]) is not None}
        if len(wanted) < 2:
            continue
        if preset.on_fused_conflict == "highest":
            best = max(wanted.values(), key=_precision)
            schemes.update(dict.fromkeys(shards, best))
            claims = _asked(shards, asked, rules)
            text = f"takes {best.label} for all shards, the most precise of {claims}"
            conflicts.setdefault((text, ""), []).append(module)
        else:
            text = f"its shards need one scheme, got {_asked(shards, asked, rules)}"
            conflicts.setdefault((text, _remedy(shards)), []).append(module)
    severity: Severity = "warning" if preset.on_fused_conflict == "highest" else "error"
    problems = [
        Problem(", ".join(fold_names(names)), text, remedy, "fused-conflict", severity)
        for (text, remedy), names in conflicts.items()
    ]
    return schemes, problems


def _precision(scheme: Scheme) -> float:
    return registry.METHODS[scheme.method].rounding(scheme.arguments).rank


def _asked(shards: list[str], asked: Mapping[str, Scheme | None], rules: Mapping[str, Rule]) -> str:
    parts = []
    for shard in shards:
        scheme = asked[shard]
        label = scheme.label if scheme else "as stored"
        by = f"({rules[shard]})" if shard in rules else "(no rule)"
        parts.append(f"{label} for {last_component(shard)} {by}")
    return ", ".join(parts)


def _remedy(shards: list[str]) -> str:
    names = ",".join(last_component(shard) for shard in shards)
    return (
        f"match all of them with one rule, such as '*.{{{names}}}', "
        "or set on_fused_conflict: highest"
    )
