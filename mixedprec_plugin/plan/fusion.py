"""Rules held against fused modules: one scheme for all shards, no expert that no layer has."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from mixedprec_plugin.errors import Problem, Severity
from mixedprec_plugin.families.names import ExpertShard, Shard, last_component
from mixedprec_plugin.methods import registry
from mixedprec_plugin.plan.folding import fold_names, fold_numbers
from mixedprec_plugin.preset.model import Preset, Rule, Scheme

_EXPERTS = re.compile(r"experts\.(\d+|\{[\d,{}.-]+\})")
_RANGE = re.compile(r"\{?-?\d+\.\.[\d.-]+\}?")


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
        claims = _asked(shards, asked, rules)
        text, remedy = f"its shards need one scheme, got {claims}", _remedy(shards)
        if preset.on_fused_conflict == "highest":
            best = max(
                wanted.values(), key=lambda s: registry.METHODS[s.method].rounding(s.arguments).rank
            )
            schemes.update(dict.fromkeys(shards, best))
            text = f"takes {best.label} for all shards, the most precise of {claims}"
            remedy = ""
        conflicts.setdefault((text, remedy), []).append(module)
    severity: Severity = "warning" if preset.on_fused_conflict == "highest" else "error"
    problems = [
        Problem(", ".join(fold_names(names)), text, remedy, "fused-conflict", severity)
        for (text, remedy), names in conflicts.items()
    ]
    return schemes, problems


def _asked(shards: list[str], asked: Mapping[str, Scheme | None], rules: Mapping[str, Rule]) -> str:
    labels = {shard: s.label if (s := asked[shard]) else "as stored" for shard in shards}
    return ", ".join(
        f"{label} for {last_component(shard)} ({rules.get(shard, 'no rule')})"
        for shard, label in labels.items()
    )


def _remedy(shards: list[str]) -> str:
    names = ",".join(last_component(shard) for shard in shards)
    return (
        f"match all of them with one rule, such as '*.{{{names}}}', "
        "or set on_fused_conflict: highest"
    )


def check_expert_ids(rules: Iterable[Rule], shards: Collection[Shard]) -> list[Problem]:
    """Find rules that name single experts beyond the last one: a list made for another model.

    Ranges may reach beyond it: `{16..255}` is a way to say "all from 16 on".

    Args:
        shards: of all layers.
    """
    count = 1 + max((s.expert for s in shards if isinstance(s, ExpertShard)), default=-1)
    problems = []
    for rule in rules:
        beyond = sorted({n for p in rule.patterns for n in _named(p) if n >= count})
        if beyond and count and not rule.optional:
            what = (
                f"names expert{'s' if len(beyond) > 1 else ''} {fold_numbers(beyond)}, and the "
                f"model's layers have {count} (expected 0 to {count - 1})"
            )
            remedy = "take them out, or write optional: true"
            problems.append(Problem(str(rule.location), what, remedy, "expert-ids"))
    return problems


def _named(pattern: str) -> Iterator[int]:
    """Ids that a pattern spells out."""
    for match in _EXPERTS.finditer(pattern):
        for word in match[1].strip("{}").split(","):
            if not _RANGE.fullmatch(word) and word.isdigit():
                yield int(word)
