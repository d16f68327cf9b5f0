"""Folding layer names that differ in one number: `model.layers.0-29.mlp.up_proj`."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable

from mixedprec_plugin.errors import Problem, Severity
from mixedprec_plugin.names import fold_numbers, unfold_numbers

_NUMBER = re.compile(r"(\d+)")
# a whole component behind the first number; a run that is folded already is none
_SECOND = re.compile(r"^\D*\d[^.]*\..*?(?<=\.)(\d+)(?=\.|$)")

_FOLDED = re.compile(r"(?<=\.)(\d{1,9}(?:-\d{1,9})?(?:,\d{1,9}(?:-\d{1,9})?)*)(?=\.|$)")


def natural_key(name: str) -> list[str | int]:
    """Sort key under which `layers.2` comes before `layers.10`."""
    parts: list[str | int] = list(_NUMBER.split(name))
    parts[1::2] = map(int, parts[1::2])
    return parts


def fold_names(names: Iterable[str]) -> list[str]:
    """Fold names that are alike but for their first number, then for their second.

    Returns:
        folded names in the order of their first member: `model.layers.0-3,7.mlp`,
        `model.layers.3-60.mlp.experts.0-255.up_proj`.
    """
    return _fold(_fold(names, _NUMBER), _SECOND)


def _fold(names: Iterable[str], pattern: re.Pattern[str]) -> list[str]:
    """Fold over the number that the pattern's last group is."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        match = pattern.search(name)
        key = (name[: match.start(1)], name[match.end(1) :]) if match else (name, "")
        groups.setdefault(key, []).extend([int(match[1])] if match else [])
    return [f"{start}{fold_numbers(numbers)}{end}" for (start, end), numbers in groups.items()]


def unfold_names(text: str, most: int) -> list[str]:
    """Undo `fold_names`, joined by ", ": the names that a problem's `where` stands for.

    Args:
        most: a folded name of more than so many is taken for one name: nobody folded it.
    """
    names: list[str] = []
    for folded in text.split(", "):
        parts = _FOLDED.split(folded)
        numbers = [unfold_numbers(part) for part in parts[1::2]]
        if math.prod(sum(map(len, ranges)) for ranges in numbers) > most:
            names.append(folded)
            continue
        choices = [[part] for part in parts]
        choices[1::2] = [[str(n) for each in ranges for n in each] for ranges in numbers]
        names += map("".join, itertools.product(*choices))
    return names


def fold_problems(problems: Iterable[Problem]) -> list[Problem]:
    """Make problems of layers one where they are alike but for the layers' names in `where`."""
    alike: dict[tuple[str, str, str, Severity], list[str]] = {}
    for each in problems:
        key = (each.what, each.remedy, each.rule, each.severity)
        alike.setdefault(key, []).append(each.where)
    return [Problem(", ".join(fold_names(names)), *key) for key, names in alike.items()]
