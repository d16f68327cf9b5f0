"""A plan's bytes as a map in SVG, for reports: areas are bytes served, colours bits a weight."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any, NamedTuple

from mixedprec_plugin.errors import printable
from mixedprec_plugin.plan.document import place_of
from mixedprec_plugin.plan.model import Plan, PlannedLayer
from mixedprec_plugin.plan.render import bits_a_weight, format_bytes, totals_line
from mixedprec_plugin.resources import page_path

_WIDTH, _HEIGHT, _HEAD, _FOOT = 1000, 520, 58, 34
_INK, _MUTED = "#1b1b19", "#64645e"
# a letter's width, as a share of the size of its font
_LETTER = 0.6


class Rect(NamedTuple):
    """A rectangle, in pixels."""

    x: float
    y: float
    width: float
    height: float


class Tile(NamedTuple):
    """Layers of one kind in one method, whatever their blocks and experts."""

    name: str
    method: str
    layers: list[PlannedLayer]

    @property
    def num_bytes(self) -> int:
        """What they take, served."""
        return sum(layer.bytes_after for layer in self.layers)


def _tiles(plan: Plan) -> list[Tile]:
    """Every kind of module in every method that it runs in, the largest first."""
    found: dict[tuple[str, str], Tile] = {}
    for layer in plan.layers:
        template = place_of(layer.module).template
        name = (template.partition(".{}.")[2] or template).replace(".{}", "")
        method = layer.scheme.summary if layer.scheme else "as stored"
        found.setdefault((name, method), Tile(name, method, [])).layers.append(layer)
    tiles = [tile for tile in found.values() if tile.num_bytes]
    return sorted(tiles, key=lambda tile: -tile.num_bytes)


def map_of(plan: Plan) -> str:
    """The SVG of a plan: a tile for each kind of module and method, legend and totals."""
    scale = json.loads(page_path("scale.json").read_text(encoding="utf-8"))
    kinds = _tiles(plan)
    whole = Rect(0, _HEAD, _WIDTH, _HEIGHT)
    places = halved([kind.num_bytes for kind in kinds], whole)
    tiles = [_tile(*pair, scale) for pair in zip(kinds, places, strict=True)]
    title = f"{plan.preset.path.rpartition('/')[2]} over {plan.source.shown.rpartition('/')[2]}"
    height = _HEAD + _HEIGHT + _FOOT
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
            f'width="{_WIDTH}" height="{height}" font-family="system-ui, sans-serif" role="img" '
            'aria-labelledby="title">',
            f'<title id="title">{_text(title)}: {_text(totals_line(plan))}</title>',
            '<rect width="100%" height="100%" fill="#ffffff"/>',
            _line(0, 20, title, 17, _INK, "600"),
            _line(0, 42, totals_line(plan), 13, _MUTED),
            *tiles,
            *_legend(scale, _HEAD + _HEIGHT + 12),
            "</svg>\n",
        ]
    )


def halved(sizes: Sequence[int], place: Rect) -> list[Rect]:
    """Tile a rectangle in proportion to positive sizes: it is cut across, near half of them."""
    if len(sizes) < 2:
        return [place] * len(sizes)
    sums, total = list(itertools.accumulate(sizes)), sum(sizes)
    cut = min(range(1, len(sizes)), key=lambda n: abs(2 * sums[n - 1] - total))
    x, y, width, height = place
    share = sums[cut - 1] / total
    if width >= height:
        first = Rect(x, y, width * share, height)
        rest = Rect(x + first.width, y, width - first.width, height)
    else:
        first = Rect(x, y, width, height * share)
        rest = Rect(x, y + first.height, width, height - first.height)
    return halved(sizes[:cut], first) + halved(sizes[cut:], rest)


def _tile(kind: Tile, place: Rect, scale: dict[str, Any]) -> str:
    bits = bits_a_weight(kind.layers)
    color = _color(bits, scale)
    x, y, width, height = place
    count = f"{len(kind.layers):,} layer{'s' if len(kind.layers) > 1 else ''}"
    told = f", {bits:.2f} bits" if bits else ""
    words = [kind.name, kind.method, f"{format_bytes(kind.num_bytes)}{told}", count]
    title = f"<title>{_text(', '.join(words))}</title>"
    shape = f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width - 1):.1f}" height="'
    shape += f'{max(0.0, height - 1):.1f}" fill="{color}"/>'
    ink, size = _ink_on(color), 12
    letters = int((width - 12) / (size * _LETTER))
    shown = words[: max(0, int((height - 6) / 16))]
    lines = []
    for k, word in enumerate(shown if letters > 5 else ()):
        text = word if len(word) <= letters else f"{word[: letters - 1]}…"
        lines.append(_line(x + 6, y + 17 + 16 * k, text, size, ink, "400" if k else "600"))
    return f"<g>{title}{shape}{''.join(lines)}</g>"


def _legend(scale: dict[str, Any], y: float) -> Iterator[str]:
    yield _line(0, y + 11, "bits a weight", 12, _MUTED)
    for number, bits in enumerate((2, 3, 4, 5, 6, 8, 12, 16, 0)):
        x = 86 + 52 * number
        yield f'<rect x="{x}" y="{y}" width="18" height="13" fill="{_color(bits, scale)}"/>'
        yield _line(x + 22, y + 11, str(bits or "no matrix"), 12, _INK)


def _color(bits: float, scale: dict[str, Any]) -> str:
    """The page's colour of so many bits a weight; that of no matrix for none."""
    if not bits:
        return str(scale["none"]["light"])
    low, high, stops = scale["bits"]["from"], scale["bits"]["to"], scale["bits"]["light"]
    at = min(1.0, max(0.0, math.log2(bits / low) / math.log2(high / low))) * (len(stops) - 1)
    one, other = stops[int(at)], stops[min(int(at) + 1, len(stops) - 1)]
    parts = (
        round(int(one[k : k + 2], 16) * (1 - at % 1) + int(other[k : k + 2], 16) * (at % 1))
        for k in (1, 3, 5)
    )
    return "#" + "".join(f"{part:02x}" for part in parts)


def _ink_on(color: str) -> str:
    """The better of black and white, as the page's `inkOn`."""
    parts = (int(color[k : k + 2], 16) / 255 for k in (1, 3, 5))
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "#ffffff"


def _line(x: float, y: float, text: str, size: int, ink: str, weight: str = "400") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" fill="{ink}"'
    return f"<text {place}>{_text(text)}</text>"


def _text(text: str) -> str:
    return escape(printable(text))
