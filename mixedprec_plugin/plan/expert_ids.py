"""Experts that a rule names and no layer has: a list that was made for another model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

from mixedprec_plugin.errors import Problem
from mixedprec_plugin.plan.architecture import ExpertShard, Shard
from mixedprec_plugin.plan.folding import fold_numbers
from mixedprec_plugin.preset.model import Rule

_EXPERTS = re.compile(r"experts\.(\d+|\{[\d,{}.-]+\})")
_RANGE = re.compile(r"\{?-?\d+\.\.[\d.-]+\}?")


def check_expert_ids(rules: Iterable[Rule], shards: Collection[Shard]) -> list[Problem]:
    """Find rules that name single experts beyond the last one.

    Ranges may reach beyond it: `{16..255}` is a way to say "all from 16 on".

    Args:
        shards: of all layers.
    """
    count = 1 + max((s.expert for s in shards if isinstance(s, ExpertShard)), default=-1)
    problems = []
    for rule in rules:
        beyond = sorted({n for p in rule.patterns for n in _named(p) if n >= count})
        if beyond and count and not rule.optional:
            noun = "expert" if len(beyond) == 1 else "experts"
            problems.append(
                Problem(
                    str(rule.location),
                    f"names {noun} {fold_numbers(beyond)}, and the model's layers have {count} "
                    f"(expected 0 to {count - 1})",
                    "take them out, or write optional: true",
                    "expert-ids",
                )
            )
    return problems


def _named(pattern: str) -> Iterator[int]:
    """Ids that a pattern spells out."""
    for match in _EXPERTS.finditer(pattern):
        for word in match[1].strip("{}").split(","):
            if not _RANGE.fullmatch(word) and word.isdigit():
                yield int(word)
