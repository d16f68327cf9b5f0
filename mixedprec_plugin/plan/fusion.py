"""Rules held against fused modules: one scheme for all shards, no expert that no layer has."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from mixedprec_plugin.errors import Problem
from mixedprec_plugin.families.names import ExpertShard, Shard, last_component
from mixedprec_plugin.methods import registry
from mixedprec_plugin.names import fold_numbers
from mixedprec_plugin.plan.folding import fold_problems
from mixedprec_plugin.preset.model import Preset, Rule, Scheme

_EXPERTS = re.compile(r"experts\.(\d+|\{[\d,{}.-]+\})")


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
    problems = []
    for module, shards in modules.items():
        if all(asked[shard] is asked[shards[0]] for shard in shards):
            continue
        wanted = {s.identity: s for shard in shards if (s := asked[shard]) is not None}
        if len(wanted) < 2:
            continue
        claims = ", ".join(
            f"{s.label if (s := asked[shard]) else 'as stored'} for {last_component(shard)} "
            f"({rules.get(shard, 'no rule')})"
            for shard in shards
        )
        if preset.on_fused_conflict == "highest":
            best = max(
                wanted.values(), key=lambda s: registry.METHODS[s.method].rounding(s.arguments).rank
            )
            schemes.update(dict.fromkeys(shards, best))
            text = f"takes {best.label} for all shards, the most precise of {claims}"
            problems.append(Problem(module, text, "", "fused-conflict", "warning"))
            continue
        names = ",".join(map(last_component, shards))
        text = f"its shards need one scheme, got {claims}"
        remedy = (
            f"match all of them with one rule, such as '*.{{{names}}}', "
            "or set on_fused_conflict: highest"
        )
        problems.append(Problem(module, text, remedy, "fused-conflict"))
    return schemes, fold_problems(problems)


def check_expert_ids(rules: Iterable[Rule], shards: Collection[Shard]) -> list[Problem]:
    """Find rules that name single experts beyond the last one: a list made for another model.

    Ranges may reach beyond it: `{16..255}` is a way to say "all from 16 on".

    Args:
        shards: of all layers.
    """
    count = 1 + max((s.expert for s in shards if isinstance(s, ExpertShard)), default=-1)
    problems = []
    for rule in rules:
        # ids that its patterns spell out
        words = [
            word
            for pattern in rule.patterns
            for match in _EXPERTS.finditer(pattern)
            for word in match[1].strip("{}").split(",")
        ]
        beyond = sorted({int(word) for word in words if word.isdigit() and int(word) >= count})
        if beyond and count and not rule.optional:
            what = (
                f"names expert{'s' if len(beyond) > 1 else ''} {fold_numbers(beyond)}, and the "
                f"model's layers have {count} (expected 0 to {count - 1})"
            )
            remedy = "take them out, or write optional: true"
            problems.append(Problem(str(rule.location), what, remedy, "expert-ids"))
    return problems
