"""Folding layer names that differ in one number: `model.layers.0-29.mlp.up_proj`."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(\d+)")
# a whole component behind the first number; a run that is folded already is none
_SECOND = re.compile(r"^\D*\d[^.]*\..*?(?<=\.)(\d+)(?=\.|$)")
_DIGITS = re.compile(r"(\d+)")


def natural_key(name: str) -> list[str | int]:
    """Sort key under which `layers.2` comes before `layers.10`."""
    parts: list[str | int] = list(_DIGITS.split(name))
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
    plain: dict[tuple[str, str], str] = {}
    for name in names:
        match = pattern.search(name)
        if match is None:
            plain[(name, "")] = name
            groups[(name, "")] = []
        else:
            key = (name[: match.start(1)], name[match.end(1) :])
            groups.setdefault(key, []).append(int(match[1]))
    return [
        plain[key] if key in plain else f"{key[0]}{fold_numbers(numbers)}{key[1]}"
        for key, numbers in groups.items()
    ]


def fold_numbers(numbers: Iterable[int]) -> str:
    """`[0, 1, 2, 5]` -> `0-2,5`."""
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
