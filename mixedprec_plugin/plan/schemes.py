"""From the rules that decide to schemes: of each layer, one for all shards of a fused module."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping

from mixedprec_plugin.errors import Problem
from mixedprec_plugin.families.names import (
    NEVER_QUANTIZED,
    ExpertShard,
    Kind,
    Shard,
    last_component,
)
from mixedprec_plugin.methods.interface import Arguments, Target
from mixedprec_plugin.methods.registry import AUTO, METHODS, UNQUANTIZED, bind
from mixedprec_plugin.methods.stored import StoredFormat
from mixedprec_plugin.names import fold_numbers
from mixedprec_plugin.plan.auto import described
from mixedprec_plugin.plan.folding import fold_problems
from mixedprec_plugin.preset.model import Preset, Rule, Scheme

_EXPERTS = re.compile(r"experts\.(\d+|\{[\d,{}.-]+\})")


class SchemeChooser:
    """The scheme of each layer; layers of one rule or of no rule that are alike share one."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._known: dict[object, Scheme] = {}

    def of(self, rule: Rule | None, stored: StoredFormat | None, kind: Kind) -> Scheme | None:
        """The scheme of a layer; None where it has no weight that could be quantized.

        What is never quantized, and is stored so, may be dequantized. No rule leaves a layer as it
        is stored.
        """
        is_dequantized = (
            rule is not None and rule.scheme.method == UNQUANTIZED and kind != "draft"
            and stored is not None and not stored.is_float
        )  # fmt: skip
        if stored is None or (kind in NEVER_QUANTIZED and not is_dequantized):
            return None
        key = (id(rule), id(stored))
        if key not in self._known:
            self._known[key] = self._made(rule, stored)
        return self._known[key]

    def _made(self, rule: Rule | None, stored: StoredFormat) -> Scheme:
        if rule is None:
            return Scheme("as stored", *_as_stored(stored, stored.arguments))
        scheme = rule.scheme
        if scheme.method != AUTO:
            arguments = METHODS[scheme.method].complete(scheme.arguments, stored)
            same = arguments == scheme.arguments
            return scheme if same else dataclasses.replace(scheme, arguments=arguments)
        if self._target.device == "cuda" and not stored.is_float:
            # layers of different sources and formats are different schemes
            arguments = {"source": scheme.source, "stored": described(stored)}
            return dataclasses.replace(scheme, arguments=arguments)
        whole = {"group_size": stored.K} if stored.is_one_group else {}
        method, arguments = _as_stored(stored, {**stored.arguments, **whole})
        return dataclasses.replace(scheme, method=method, arguments=arguments)


def _as_stored(stored: StoredFormat, arguments: Arguments) -> tuple[str, Arguments]:
    if stored.is_float or not stored.method:
        return bind(UNQUANTIZED, {"dtype": None})
    return bind(stored.method, arguments)


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
        layer name -> scheme, the highest for a whole module where `on_fused_conflict` says so; and
        an error, or then a warning, for each kind of conflict.
    """
    schemes = dict(asked)
    problems = []
    for module, shards in modules.items():
        first = asked[shards[0]]
        if all(asked[shard] is first for shard in shards):
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
            best = max(wanted.values(), key=_rank)
            schemes |= dict.fromkeys(shards, best)
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


def _rank(scheme: Scheme) -> float:
    return METHODS[scheme.method].rounding(scheme.arguments).rank


def check_expert_ids(rules: Iterable[Rule], shards: Collection[Shard]) -> list[Problem]:
    """Find rules that name single experts beyond the last one: a list made for another model.

    Ranges may reach beyond it: `{16..255}` is a way to say "all from 16 on".
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
