"""The findings as tables for the terminal and for docs/compat.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compat.check import FEATURES, METHOD_FEATURES, Finding

BEGIN, END = "<!-- releases -->\n", "<!-- end of releases -->\n"
_SHORT = {
    "plugin framework": "plugins",
    "update_weights_from_disk": "update from disk",
    "experts in several schemes": "experts",
    "CPU platform": "CPU",
}


def table(results: Mapping[str, Sequence[Finding]], constructors_only: Sequence[str]) -> str:
    """A Markdown table, release x feature: ok, or how many things are missing."""
    rows = ["release", *(_SHORT.get(feature, feature) for feature in FEATURES)]
    lines = [_row(rows), _row(["---"] * len(rows))]
    for version, findings in results.items():
        cells = []
        for feature in FEATURES:
            count = sum(finding.feature == feature for finding in findings)
            is_skipped = version in constructors_only and feature not in METHOD_FEATURES
            cells.append("" if is_skipped else f"{count} missing" if count else "ok")
        lines.append(_row([version, *cells]))
    return "\n".join(lines) + "\n"


def missing(results: Mapping[str, Sequence[Finding]]) -> str:
    """What each release lacks, with the line of ours; releases that lack the same share a list."""
    shared: dict[tuple[Finding, ...], list[str]] = {}
    for version, findings in results.items():
        if findings:
            shared.setdefault(tuple(findings), []).append(version)
    parts = []
    for findings, versions in shared.items():
        parts.append(f"### {', '.join(versions)}\n\n")
        for finding in findings:
            parts.append(f"- {finding.feature}: `{finding.where}`: {_text(finding)}\n")
        parts.append("\n")
    return "".join(parts).rstrip("\n") + "\n" if parts else "Nothing is missing.\n"


def whole(results: Mapping[str, Sequence[Finding]]) -> list[str]:
    """The releases that lack nothing."""
    return [version for version, findings in results.items() if not findings]


def rewritten(page: str, block: str) -> str:
    """A page with what lies between its two marks replaced.

    Raises:
        ValueError: the page lacks a mark.
    """
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    return page[:start] + block + page[end:]


def _text(finding: Finding) -> str:
    moved = f"; defined in {', '.join(finding.moved)}" if finding.moved else ""
    return f"`{finding.target}`: {finding.what}{moved}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
