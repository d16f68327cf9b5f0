"""An assignment -> a preset that a person can read, checked before it is there.

A first rule has the scheme of most weights; what differs follows, with what it takes and costs.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mixedprec_plugin.errors import ConvertError, PlanError, Problem, printable
from mixedprec_plugin.methods.registry import AUTO, METHODS
from mixedprec_plugin.names import ranges_of, without_numbers
from mixedprec_plugin.plan.conversion import is_auto
from mixedprec_plugin.plan.matching import Candidates
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.render import format_bytes
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.preset.load import load_preset
from mixedprec_plugin.preset.model import Scheme, SourceReference
from mixedprec_plugin.search.candidates import AS_STORED, Choices

_WIDTH = 100


class Chosen(NamedTuple):
    """Unit -> candidate, unit -> what that costs, and lines of the comment at the top."""

    choice: Mapping[str, str]
    loss: Mapping[str, float]
    about: Sequence[str]


def preset_text(choices: Choices, chosen: Chosen) -> str:
    """Write an assignment as YAML."""
    used = list(dict.fromkeys(chosen.choice.values()))
    weights = {
        name: sum(choices.units[u].num_weights for u, c in chosen.choice.items() if c == name)
        for name in used
    }
    by_share = sorted(used, key=lambda name: (-weights[name], name))
    own = [name for name in by_share if choices.candidates[name].scheme.source == "model"]
    first = own[0] if own and own[0] != AS_STORED else ""
    lines = [*(f"# {line}".rstrip() for line in chosen.about), "version: 1"]
    lines += [f"description: {json.dumps(_description(choices, weights))}"]
    sources = {choices.candidates[name].scheme.source for name in used} - {"model"}
    lines += ["sources:"] * bool(sources)
    lines += [f"  {name}: {_source(choices.others[name][0])}" for name in sorted(sources)]
    schemes = [name for name in by_share if choices.candidates[name].scheme.method != AUTO]
    again = _requantized(choices, chosen.choice)
    lines += ["schemes:"] * bool(schemes)
    for name in schemes:
        more = {"requantize": True} if name in again else {}
        lines += [f"  {name}: {_flow(_given(choices.candidates[name].scheme) | more)}"]
    lines += ["rules:"]
    for name in [first] * bool(first) + [name for name in by_share if name != first]:
        lines += _rules(choices, chosen, name, is_first=name == first)
        if name == first and (others := _not_searched(choices)):
            lines += ["  # not searched: as stored", *_rule(others, [f"method: {AUTO}"])]
    return "\n".join(lines) + "\n"


def publish(text: str, choices: Choices, choice: Mapping[str, str], path: Path) -> Plan:
    """Write a preset, once its plan is what was chosen, and return the plan.

    Raises:
        PlanError, ConvertError: the layers do not fit each other so, or the file is not written.
    """
    temporary, base = path.with_name(f".{path.name}.tmp.yaml"), choices.base
    try:
        temporary.write_text(text, encoding="utf-8")
        preset = load_preset(temporary)
        used = {rule.scheme.source for rule in preset.rules} - {"model"}
        sources = {name: choices.others[name][1] for name in used}
        plan = resolve_plan(preset, base.source, base.target, sources).check()
        _check(plan, choices, choice)
        os.replace(temporary, path)
    except PlanError as error:
        # the file that the rules stand in is gone
        problems = [dataclasses.replace(problem, asked_at="") for problem in error.problems]
        raise PlanError(problems) from None
    except OSError as error:
        what = f"cannot be written ({error.strerror})"
        raise ConvertError(Problem(str(path), what, "name another file", "write")) from error
    finally:
        temporary.unlink(missing_ok=True)
    return dataclasses.replace(plan, preset=load_preset(path))


def _check(plan: Plan, choices: Choices, choice: Mapping[str, str]) -> None:
    """See that every layer is planned as it was chosen, and takes what was reckoned with."""
    expected = sum(choices.units[unit].options[name].num_bytes for unit, name in choice.items())
    for unit, name in choice.items():
        for layer in choices.units[unit].options[name].layers:
            made = plan.by_name[layer.name]
            assert made.source == layer.source, (layer.name, made.source)
            assert made.scheme is not None
            assert layer.scheme is not None
            assert made.scheme.identity == layer.scheme.identity, (layer.name, made.scheme)
    assert plan.bytes_after == expected + choices.rest[0], (plan.bytes_after, expected)


def _description(choices: Choices, weights: Mapping[str, int]) -> str:
    total = sum(weights.values())
    shares = sorted(weights.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{count / total:.0%} in {name}" for name, count in shares)
    return f"Found for {printable(choices.base.source.shown.rpartition('/')[2])}: {listed}."


def _source(reference: SourceReference) -> str:
    path = reference.shown_path
    if path == reference.path and Path(path).expanduser().is_dir():
        path = str(Path(path).expanduser().resolve())
    given = {"path": path, "revision": reference.shown_revision}
    return _flow({key: value for key, value in given.items() if value is not None})


def _requantized(choices: Choices, choice: Mapping[str, str]) -> set[str]:
    """The candidates that change what is stored in another quantized format."""
    return {
        name
        for unit, name in choice.items()
        for layer in choices.units[unit].options[name].planned
        if layer.action in ("requantize", "repack")
    }


def _given(scheme: Scheme) -> dict[str, Any]:
    """What of a scheme is to be written: what is no default."""
    defaults = METHODS[scheme.method].defaults
    given = {key: value for key, value in scheme.arguments.items() if value != defaults[key]}
    if scheme.source != "model":
        given["source"] = scheme.source
    return {"method": scheme.method, **given}


def _flow(values: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {_shown(value)}" for key, value in values.items()) + "}"


def _shown(value: Any) -> str:
    is_plain = isinstance(value, str) and value.replace("_", "").isalnum()
    return str(value) if is_plain else json.dumps(value)


def _rules(choices: Choices, chosen: Chosen, name: str, *, is_first: bool) -> list[str]:
    """The rules of one candidate, each under what it takes and costs."""
    units = [unit for unit, candidate in chosen.choice.items() if candidate == name]
    if is_first:
        return [_remark(choices, chosen, units), *_rule(["*"], [f"scheme: {name}"])]
    # by what they are (attention, the MLP, experts), and what a rule says of each kind
    parts: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for unit in units:
        kind = without_numbers(choices.units[unit].layers[0].name.rpartition(".")[0])
        parts.setdefault((kind, _says(choices, name, unit)), []).append(unit)
    names, lines = _quantizable(choices), []
    for (_, says), part in parts.items():
        layers = [layer.name for unit in part for layer in choices.units[unit].layers]
        lines += [_remark(choices, chosen, part), *_rule(patterns(layers, names), says)]
    return lines


def _says(choices: Choices, name: str, unit: str) -> tuple[str, ...]:
    """What a rule says of a unit, `key: value` each."""
    asked = choices.candidates[name].scheme
    if asked.method != AUTO:
        return (f"scheme: {name}",)
    layer = choices.units[unit].options[name].planned[0]
    scheme = asked if is_auto(layer.rule) or layer.scheme is None else layer.scheme
    return tuple(f"{key}: {_shown(value)}" for key, value in _given(scheme).items())


def _remark(choices: Choices, chosen: Chosen, units: Sequence[str]) -> str:
    size = sum(choices.units[unit].options[chosen.choice[unit]].num_bytes for unit in units)
    loss = sum(chosen.loss[unit] for unit in units)
    count = len({choices.units[unit].layers[0].module for unit in units})
    return f"  # {count} module{'s' if count > 1 else ''}, {format_bytes(size)}, loss {loss:.4f}"


def _rule(found: Sequence[str], says: Sequence[str]) -> list[str]:
    if len(found) == 1:
        line = f"  - {{match: {json.dumps(found[0])}, {', '.join(says)}}}"
        if len(line) <= _WIDTH:
            return [line]
    lines = ["  - match:", *(f"      - {json.dumps(pattern)}" for pattern in found)]
    return [*lines, *(f"    {one}" for one in says)]


def _quantizable(choices: Choices) -> list[str]:
    return [x.name for x in choices.base.layers if x.kind in ("linear", "expert") and x.num_weights]


def _not_searched(choices: Choices) -> list[str]:
    own = {layer.name for unit in choices.units.values() for layer in unit.layers}
    names = _quantizable(choices)
    others = [name for name in names if name not in own]
    return patterns(others, names) if others else []


# for each place between the dots of a name, the words that stand there: names are their product
Box = tuple[tuple[str, ...], ...]


def patterns(wanted: Collection[str], names: Collection[str]) -> list[str]:
    """Globs that match just some of a model's layers, as few as may be."""
    known = Candidates(names)
    alike: dict[Box, list[Box]] = {}
    for box in _boxes(wanted):
        before = tuple(itertools.takewhile(lambda words: not words[0].isdecimal(), box))
        numbers = tuple(words for words in box if words[0].isdecimal())
        alike.setdefault(before + numbers, []).append(box)
    made = [pattern for boxes in alike.values() for pattern in _globs(boxes, known)]
    assert set(wanted) == {name for pattern in made for name in known.match(pattern)}
    return made


def _boxes(wanted: Collection[str]) -> list[Box]:
    """Names that differ in a number are put together, then those that differ in the last word."""
    boxes: list[Box] = [tuple((word,) for word in name.split(".")) for name in wanted]
    numbers = {at for box in boxes for at, words in enumerate(box) if words[0].isdecimal()}
    for place in (*sorted(numbers, reverse=True), -1):
        merged: dict[tuple[bool, Box, Box], list[str]] = {}
        for box in boxes:
            # a shorter name has its last word there
            at = place if 0 <= place < len(box) else len(box) - 1
            key = box[at][0].isdecimal(), box[:at], box[at + 1 :]
            merged.setdefault(key, []).extend(box[at])
        boxes = [
            (*front, tuple(sorted(words, key=int) if is_number else words), *back)
            for (is_number, front, back), words in merged.items()
        ]
    return boxes


def _globs(boxes: Sequence[Box], known: Candidates) -> list[str]:
    """The globs of names with the same numbers: one for all of them, or one for each box."""
    shared = zip(*(box[:-1] for box in boxes), strict=False)
    stem = [words for words, *_ in itertools.takewhile(lambda x: len(set(x)) == 1, shared)]
    wanted = {name for box in boxes for name in _names(box)}
    places = list(map(_braces, stem))
    first = next((at for at, words in enumerate(stem) if words[0].isdecimal()), len(stem))
    for whole in ([*places[:first], "*", *places[first + 1 :], "*"], [*places, "*"]):
        if set(known.match(".".join(whole))) == wanted:
            return [".".join(whole)]
    found = []
    for box in boxes:
        *parent, last = map(_braces, box)
        short = ".".join([*parent, "*"])
        is_right = set(known.match(short)) == set(_names(box))
        found.append(short if is_right else ".".join([*parent, last]))
    return found


def _names(box: Box) -> Iterator[str]:
    return map(".".join, itertools.product(*box))


def _braces(words: Sequence[str]) -> str:
    """`{0..3}` for what runs on, `{{0..3},7}` for several runs, `{a,b}` for words, `7` as it is."""
    if len(words) == 1:
        return words[0]
    if not words[0].isdecimal():
        return "{" + ",".join(words) + "}"
    parts = [
        str(a) if a == b else f"{{{a}..{b}}}" if b > a + 1 else f"{a},{b}"
        for a, b in ranges_of(map(int, words))
    ]
    return parts[0] if len(parts) == 1 and parts[0][0] == "{" else "{" + ",".join(parts) + "}"
