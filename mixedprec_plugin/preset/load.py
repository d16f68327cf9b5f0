"""Reads a preset: files, parents and overrides -> `Preset`."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

from mixedprec_plugin.checkpoint.converted import embedded_preset
from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.errors import PresetError, Problem, UsageError
from mixedprec_plugin.preset.binding import Binder
from mixedprec_plugin.preset.document import Document, Findings, Path, RefusedError, at, join_path
from mixedprec_plugin.preset.interpolation import (
    escape,
    is_interpolated,
    refuse_environment,
)
from mixedprec_plugin.preset.model import KvCache, Location, Preset
from mixedprec_plugin.preset.parents import find_preset, merge, read_with_parents
from mixedprec_plugin.preset.reader import MAX_DEPTH, read_data, read_value
from mixedprec_plugin.preset.schema import check_file, check_preset

FLAG = "--mixedprec-set"

_RULE = "override"
_PART = r"[A-Za-z0-9_-]+"
_KEY = re.compile(rf"{_PART}(\.{_PART}|\[{_PART}\]){{0,{MAX_DEPTH - 1}}}")


def load_preset(path: str | FilePath, overrides: Sequence[str] = ()) -> Preset:
    """Read a preset, its parents and its overrides, and check all of it.

    Args:
        path: a YAML file, or the name of a packaged preset (`awq`).
        overrides: `KEY=VALUE` texts as `--mixedprec-set` takes them, applied in order.
    Raises:
        PresetError: with every problem of all files, by file and line.
    """
    findings = Findings()
    file = find_preset(str(path), findings)
    documents = read_with_parents(file, findings) if file is not None else []
    return _load(documents, overrides, findings)


def load_resolved(resolved: Mapping[str, Any], where: str, overrides: Sequence[str] = ()) -> Preset:
    """Read a preset from plain data, such as a converted checkpoint carries.

    Args:
        resolved: the whole preset, parents merged in, as `Preset.resolved`; not modified. It may
            not read environment variables, files or other checkpoints: it may be anybody's.
        where: what errors call it.
        overrides: as for `load_preset`.
    Raises:
        PresetError: with every problem.
    """
    findings = Findings()
    document = read_data(dict(resolved), where, findings)
    if document.data is not None:
        refuse_environment(document)
        for key in ("extends", "sources"):
            if document.data.get(key):
                what = "reads other files, which a checkpoint's own preset may not"
                document.report((key,), what, "name a preset of your own", "other-files")
    return _load([document], overrides, findings)


def preset_for(named: str, model: Source, overrides: Sequence[str], flag: str) -> Preset:
    """Load the preset that was named, or else the one that the model's checkpoint carries.

    Args:
        named: a path or a packaged preset's name; empty for none.
        flag: what names a preset, for the error.
    Raises:
        UsageError: none was named, and the checkpoint carries none.
        PresetError: with every problem of the preset.
    """
    if named:
        return load_preset(named, overrides)
    resolved = embedded_preset(model.quantization_config)
    if resolved is None:
        text = f"is missing, and {model.path} carries no preset of its own"
        remedy = "name a preset, or a checkpoint that mixedprec convert wrote"
        raise UsageError(Problem(flag, text, remedy, "no-preset"))
    where = f"{model.path / 'config.json'}: quantization_config.preset"
    return load_resolved(resolved, where, overrides)


def _load(documents: list[Document], overrides: Sequence[str], findings: Findings) -> Preset:
    files = [document.file for document in documents]
    readable = [document for document in documents if document.data is not None]
    for document in readable:
        check_file(document)
    bound = None
    if readable and len(readable) == len(documents):
        document = merge(documents)
        _override_all(document, overrides)
        _check_given(document)
        data = shown = document.data
        if any(is_interpolated(value) for _, value in document.parts()):
            from mixedprec_plugin.preset.resolver import resolve

            data, shown = resolve(document)
        if data is not None:
            check_preset(data, shown, document)
            bound = Binder(data, shown, document)
            if not findings.has_errors() and not bound.rules:
                document.report((), "has no rules (expected at least one)", rule="no-rules")
    if bound is None or findings.has_errors():
        raise PresetError(findings.sorted(files, "error"))
    _warn_unused(bound)
    return _preset(bound, files)


def _preset(bound: Binder, files: Sequence[str]) -> Preset:
    data, shown = bound.data, bound.shown
    # the values of environment variables are written nowhere
    written = data | {key: shown[key] for key in ("description", "sources", "lists") if key in data}
    preset = Preset(
        path=files[-1],
        files=tuple(files),
        description=data.get("description", ""),
        sources=bound.sources,
        rules=bound.rules,
        on_fused_conflict=data.get("on_fused_conflict", "error"),
        trust_sources=data.get("trust_sources", False),
        untie_lm_head=data.get("untie_lm_head", False),
        kv_cache=bound.kv_cache,
        resolved=escape(written),
        warnings=bound.document.findings.sorted(files, "warning"),
    )
    section = data.get("draft")
    if section is None:
        return preset
    own = ("draft", "on_fused_conflict", "untie_lm_head", "kv_cache")
    shared = {key: written[key] for key in written if key not in own}
    draft = dataclasses.replace(
        preset,
        description="",
        rules=bound.draft_rules,
        on_fused_conflict=section.get("on_fused_conflict", "error"),
        untie_lm_head=False,
        kv_cache=KvCache(),
        resolved=escape(shared | section),
        warnings=(),
    )
    return dataclasses.replace(preset, draft=draft)


def _override_all(document: Document, overrides: Sequence[str]) -> None:
    """Set every `KEY=VALUE` in a document, in order.

    A mapping is merged into the mapping that is there, a list replaces the list, an item of a list
    is reached by its number (`rules.0.method`, `rules[0].method`) and must exist.
    """
    for override in overrides:
        place = Location(f"{FLAG} {override}", 0)
        try:
            _apply(document, override, place)
        except RefusedError as error:
            document.findings.add(place, *error.args)


def _apply(document: Document, override: str, place: Location) -> None:
    key, equals, text = override.partition("=")
    if not equals or not _KEY.fullmatch(key):
        what = "is not an override (expected KEY=VALUE, such as schemes.experts.group_size=64)"
        raise RefusedError(what, "", _RULE)
    keys = re.findall(_PART, key)
    if keys[0] == "extends":
        what = "the key 'extends' cannot be overridden"
        raise RefusedError(what, "parents are read first; change the file", _RULE)
    if text.startswith("*"):  # a pattern, for YAML an alias
        text = json.dumps(text, ensure_ascii=False)
    value = read_value(text, place.file, document.findings)
    if value is None:
        return
    from omegaconf import OmegaConf

    path = _locate(document.data, keys)
    config = OmegaConf.create(document.data)
    is_merged = isinstance(at(document.data, path), dict) and isinstance(value.data, dict)
    OmegaConf.update(config, join_path(path), value.data, merge=is_merged)
    document.data = OmegaConf.to_container(config)
    for length in range(1, len(path)):
        document.places.setdefault(path[:length], place)
    for below, written in value.places.items():
        document.places[path + below] = written
    for below in value.broken:
        document.mark(path + below)


def _locate(data: Any, keys: Sequence[str]) -> Path:
    """The path that a key of an override means; parts of it that are not there are mappings."""
    path: Path = ()
    for key in keys:
        where = join_path(path)
        if isinstance(data, list):
            if not (key.isdecimal() and len(key) < 10 and int(key) < len(data)):
                what = f"{where} has no item {key!r} (expected a number below {len(data)})"
                raise RefusedError(what, "", _RULE)
            path, data = (*path, int(key)), data[int(key)]
        elif isinstance(data, dict):
            path, data = (*path, key), data.get(key, {})
        elif is_interpolated(data):
            what = f"{where} is the interpolation {data!r} and has no {key!r} of its own"
            remedy = "override what it points at, or set it as a whole"
            raise RefusedError(what, remedy, _RULE)
        else:
            raise RefusedError(f"{where} is {data!r} and has no {key!r}", "", _RULE)
    return path


def _check_given(document: Document) -> None:
    """Refuse `???`, which stands in OmegaConf for a value that is still to be given."""
    for path, value in document.parts():
        if value == "???":
            at(document.data, path[:-1])[path[-1]] = None
            remedy = f"give it with {FLAG} {'.'.join(map(str, path))}=VALUE"
            document.report(path, "has no value yet ('???')", remedy, "missing-value")


def _warn_unused(bound: Binder) -> None:
    """Warn of what the asked-for file itself, or an override, defines and nothing uses."""
    document = bound.document

    def warn(kind: str, name: str, what: str, remedy: str) -> None:
        place = document.locate((f"{kind}s", name))
        if place.file == document.file or place.file.startswith(FLAG):
            document.findings.add(place, what, remedy, f"unused-{kind}", "warning")

    texts = " ".join(value for _, value in document.parts() if is_interpolated(value))
    for name in bound.schemes:
        if name not in bound.used and f"schemes.{name}" not in texts:
            warn("scheme", name, "no rule uses this scheme", "give it a rule, or take it away")
    lists = document.data.get("lists", {})
    for name in lists:  # what was resolved before has no interpolation left, nor places
        if f"lists.{name}" not in texts and ("lists", name) in document.places:
            others = [other for other in lists if other != name]
            remedy = document.findings.suggest(name, others) or "give it a rule, or take it away"
            warn("list", name, "no pattern uses this list", remedy)
    used = {rule.scheme.source for rule in (*bound.rules, *bound.draft_rules)}
    used.add(bound.kv_cache.scales or "")
    for name in bound.sources:
        if name not in used:
            warn("source", name, "no rule takes layers from this source", "give it a rule")
