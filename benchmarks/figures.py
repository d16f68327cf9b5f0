"""What `make bench` measures, as rows of ours, a peer's and a limit: one table, JSON and plot.

    python -m benchmarks.figures     (the last step of `make bench`)

Every benchmark hands its rows to `keep`; the rows of its earlier runs give way. Less is better in
all of them, so that a ratio below 1 is good news everywhere.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parents[1] / "build" / "bench.json"
_ROW, _BAR, _LABEL = 16, 360, 430


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured number; less of it is better.

    Attributes:
        name: what it is, its unit included.
        peer: the same of what it is compared with, in the same run; None where there is none.
        limit: the most that ours may be; None where nothing was asked for.
    """

    name: str
    ours: float
    peer: float | None = None
    limit: float | None = None

    @property
    def ratio(self) -> float | None:
        """Ours over the peer's."""
        return self.ours / self.peer if self.peer else None

    @property
    def is_met(self) -> bool:
        """Whether ours keeps to its limit."""
        return self.limit is None or self.ours <= self.limit


def keep(part: str, figures: Sequence[Figure], file: Path = FILE) -> bool:
    """Print a part's rows, and put them in the place of its earlier ones in JSON and plot.

    Returns:
        whether all of them keep to their limits.
    """
    found = read(file)
    found[part] = list(figures)
    rows = [
        {"part": name, "figure": one.name, "ours": one.ours, "peer": one.peer, "ratio": one.ratio,
         "limit": one.limit}
        for name, ones in found.items() for one in ones
    ]  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".svg").write_text(plot(found), encoding="utf-8")
    print(table({part: found[part]}), flush=True)
    return all(one.is_met for one in figures)


def read(file: Path = FILE) -> dict[str, list[Figure]]:
    """What was measured, by part."""
    found: dict[str, list[Figure]] = {}
    rows: list[dict[str, Any]] = json.loads(file.read_text("utf-8")) if file.exists() else []
    for row in rows:
        figure = Figure(row["figure"], row["ours"], row["peer"], row["limit"])
        found.setdefault(row["part"], []).append(figure)
    return found


def table(found: dict[str, list[Figure]]) -> str:
    """Lines of text; what is over its limit says so."""
    lines = []
    for part, figures in found.items():
        width = max(len(part), *(len(one.name) for one in figures))
        lines.append(f"{part:<{width}}  {'ours':>9}  {'peer':>9}  {'ratio':>6}  {'limit':>9}")
        for one in figures:
            cells = f"{_number(one.ours):>9}  {_number(one.peer):>9}"
            ratio = "-" if one.ratio is None else f"{one.ratio:.2f}"
            over = "" if one.is_met else "  over"
            lines.append(f"{one.name:<{width}}  {cells}  {ratio:>6}  {_number(one.limit):>9}{over}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def plot(found: dict[str, list[Figure]]) -> str:
    """SVG: ours as bars over their limit, or else over the peer's; a line is where that is 1."""
    # a bar of 1 takes half of the room
    y, line, drawn = 0, _LABEL + _BAR // 2, []
    for part, figures in found.items():
        y += _ROW
        drawn.append(f'<text x="4" y="{y}" font-weight="bold">{escape(part)}</text>')
        for one in figures:
            base = one.limit or one.peer
            if not base:
                continue
            y += _ROW
            share, of = one.ours / base, "limit" if one.limit else "peer"
            colour, width = "#4878a8" if one.is_met else "#c05030", min(share, 2) * _BAR / 2
            drawn += [
                f'<text x="12" y="{y}">{escape(one.name)}</text>',
                f'<rect x="{_LABEL}" y="{y - 9}" width="{width:.1f}" height="10" fill="{colour}"/>',
                f'<text x="{_LABEL + _BAR + 8}" y="{y}">{share:.2f} of {of}</text>',
            ]
    drawn.append(f'<path d="M{line} 0V{y + _ROW}" stroke="#888" stroke-dasharray="3"/>')
    size = f'width="{_LABEL + _BAR + 110}" height="{y + _ROW}"'
    font = 'font-family="sans-serif" font-size="11" style="background: white"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>', *drawn, "</svg>"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(read()))
