"""Reads a preset: `load_preset`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

from mixedprec_plugin.errors import PresetError
from mixedprec_plugin.preset.binding import Binder
from mixedprec_plugin.preset.document import Document, Findings, Path, Scalar, rewrite
from mixedprec_plugin.preset.interpolation import escape, is_interpolated, resolve
from mixedprec_plugin.preset.model import Preset
from mixedprec_plugin.preset.overrides import FLAG, apply_overrides
from mixedprec_plugin.preset.parents import find_preset, merge, read_with_parents
from mixedprec_plugin.preset.reader import read_data
from mixedprec_plugin.preset.schema import check_file, check_preset


def load_preset(path: str | FilePath, overrides: Sequence[str] = ()) -> Preset:
    """Read a preset, its parents and its overrides, and check all of it.

    Args:
        path: a YAML file, or the name of a packaged preset (`awq`).
        overrides: `KEY=VALUE` texts as `--mixedprec-set` takes them, applied in order.
    Returns:
        The preset, ready to be planned with.
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
            not read environment variables: it may be anybody's.
        where: what errors call it.
        overrides: as for `load_preset`.
    Raises:
        PresetError: with every problem.
    """
    findings = Findings()
    document = read_data(resolved, where, findings)
    return _load([document], overrides, findings, untrusted=where)


def _load(
    documents: Sequence[Document],
    overrides: Sequence[str],
    findings: Findings,
    untrusted: str = "",
) -> Preset:
    files = [document.file for document in documents]
    for document in documents:
        if document.data is not None:
            check_file(document)
    preset = None
    if documents and all(document.data is not None for document in documents):
        preset = _bind(merge(documents), overrides, files, untrusted)
    if preset is None or findings.has_errors():
        raise PresetError(findings.sorted(files, "error"))
    return preset


def _bind(
    document: Document, overrides: Sequence[str], files: Sequence[str], untrusted: str
) -> Preset | None:
    apply_overrides(document, overrides)
    _check_given(document)
    data, shown = resolve(document, untrusted)
    if data is None:
        return None
    check_preset(data, shown, document)
    bound = Binder(data, shown, document)
    if document.findings.has_errors():
        return None
    if not bound.rules:
        document.report((), "has no rules (expected at least one)", rule="no-rules")
    _warn_unused(bound, document)
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
        resolved=escape(written),
        warnings=document.findings.sorted(files, "warning"),
    )
    section = data.get("draft")
    if section is None:
        return preset
    shared = {key: value for key, value in written.items() if key != "on_fused_conflict"}
    draft = dataclasses.replace(
        preset,
        description="",
        rules=bound.draft_rules,
        on_fused_conflict=section.get("on_fused_conflict", "error"),
        resolved=escape({key: shared[key] for key in shared if key != "draft"} | section),
        warnings=(),
    )
    return dataclasses.replace(preset, draft=draft)


def _check_given(document: Document) -> None:
    """Refuse `???`, which stands in OmegaConf for a value that is still to be given."""

    def check(path: Path, value: Scalar) -> Scalar:
        if value != "???":
            return value
        key = ".".join(str(part) for part in path)
        remedy = f"give it with {FLAG} {key}=VALUE"
        document.report(path, "has no value yet ('???')", remedy, "missing-value")
        return None

    document.data = rewrite(document.data, check)


def _warn_unused(bound: Binder, document: Document) -> None:
    """Warn of schemes and sources that the asked-for file itself defines and nothing uses."""
    texts = " ".join(value for _, value in document.scalars() if is_interpolated(value))
    used = {rule.scheme.source for rule in (*bound.rules, *bound.draft_rules)}
    unused = [
        *(
            (("schemes", name), "no rule uses this scheme", "give it a rule, or take it away")
            for name in bound.schemes
            if name not in bound.used and f"schemes.{name}" not in texts
        ),
        *(
            (("sources", name), "no rule takes layers from this source", "give it a rule")
            for name in bound.sources
            if name not in used
        ),
    ]
    for path, what, remedy in unused:
        place = document.locate(path)
        if place.file == document.file:
            document.findings.add(place, what, remedy, f"unused-{path[0][:-1]}", "warning")
