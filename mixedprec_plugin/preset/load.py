"""Reads a preset: `load_preset`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

from mixedprec_plugin.errors import PresetError
from mixedprec_plugin.preset.binding import Binder
from mixedprec_plugin.preset.family import find_preset, merge, read_family
from mixedprec_plugin.preset.findings import Findings
from mixedprec_plugin.preset.interpolation import escape, resolve
from mixedprec_plugin.preset.lists import expand_lists
from mixedprec_plugin.preset.model import Location, Preset
from mixedprec_plugin.preset.overrides import FLAG, apply_overrides
from mixedprec_plugin.preset.schema import check_file, check_preset
from mixedprec_plugin.preset.tree import Node, node_from_plain


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
    files: list[str] = []
    file = find_preset(str(path), findings)
    preset = _load(file, overrides, files, findings) if file is not None else None
    if preset is None or findings.has_errors():
        raise PresetError(findings.sorted(files, "error"))
    return preset


def load_resolved(resolved: Mapping[str, Any], where: str, overrides: Sequence[str] = ()) -> Preset:
    """Read a preset from plain data, such as `Preset.resolved`.

    Args:
        resolved: the whole preset, parents merged in; not modified.
        where: what errors call it.
        overrides: as for `load_preset`.
    Raises:
        PresetError: with every problem.
    """
    findings = Findings()
    tree = node_from_plain(dict(resolved), Location(where, 0))
    check_file(tree, findings)
    findings.mute_found()
    preset = _bind(tree, overrides, [where], findings)
    if preset is None or findings.has_errors():
        raise PresetError(findings.sorted([where], "error"))
    return preset


def _load(
    file: FilePath, overrides: Sequence[str], files: list[str], findings: Findings
) -> Preset | None:
    members = read_family(file, findings)
    files.extend(member.file for member in members)
    for member in members:
        if member.tree is not None:
            check_file(member.tree, findings)
    if any(member.tree is None for member in members):
        return None
    findings.mute_found()
    return _bind(merge(members), overrides, files, findings)


def _bind(
    merged: Node, overrides: Sequence[str], files: list[str], findings: Findings
) -> Preset | None:
    tree = expand_lists(apply_overrides(merged, overrides, findings))
    _check_set(tree, findings)
    data = resolve(tree, findings)
    findings.mute_found()
    check_preset(data, tree, findings)
    bound = Binder(data, tree, findings)
    if findings.has_errors():
        return None
    if not bound.rules:
        findings.add(tree.location, "has no rules (expected at least one)", rule="no-rules")
    _warn_unused(bound, tree, files[-1], findings)
    draft = _draft(bound, data, files) if bound.draft_rules else None
    return Preset(
        path=files[-1],
        files=tuple(files),
        description=data.get("description", ""),
        sources=bound.sources,
        rules=bound.rules,
        on_fused_conflict=data.get("on_fused_conflict", "error"),
        trust_sources=data.get("trust_sources", False),
        resolved=escape(data),
        warnings=findings.sorted(files, "warning"),
        draft=draft,
    )


def _draft(bound: Binder, data: Mapping[str, Any], files: Sequence[str]) -> Preset:
    """The section `draft` as a preset of its own."""
    section = data["draft"]
    own = {key: value for key, value in data.items() if key not in ("draft", "on_fused_conflict")}
    return Preset(
        path=files[-1],
        files=tuple(files),
        description="",
        sources=bound.sources,
        rules=bound.draft_rules,
        on_fused_conflict=section.get("on_fused_conflict", "error"),
        trust_sources=data.get("trust_sources", False),
        resolved=escape({**own, **section}),
        warnings=(),
    )


def _check_set(tree: Node, findings: Findings) -> None:
    """Refuse `???`, which stands in OmegaConf for a value that is still to be given."""
    for path, node in tree.scalars():
        if node.value == "???":
            location = tree.locate(path)
            key = ".".join(str(part) for part in path)
            what = "has no value yet ('???')"
            findings.add(location, what, f"give it with {FLAG} {key}=VALUE", "missing-value")


def _warn_unused(bound: Binder, tree: Node, file: str, findings: Findings) -> None:
    """Warn of schemes and sources that the asked-for file itself defines and nothing uses."""
    texts = [str(node.value) for _, node in tree.scalars() if "${" in str(node.value)]
    for name in bound.schemes:
        location = tree.locate(("schemes", name))
        is_used = name in bound.used or any(f"schemes.{name}" in text for text in texts)
        if not is_used and location.file == file:
            what, remedy = "no rule uses this scheme", "give it a rule, or take it away"
            findings.add(location, what, remedy, "unused-scheme", "warning")
    used = {rule.scheme.source for rule in (*bound.rules, *bound.draft_rules)}
    for name, source in bound.sources.items():
        if name not in used and source.location.file == file:
            what, remedy = "no rule takes layers from this source", "give it a rule"
            findings.add(source.location, what, remedy, "unused-source", "warning")
