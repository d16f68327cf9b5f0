"""What a search found, as text, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixedprec_plugin.errors import printable
from mixedprec_plugin.families.names import last_component
from mixedprec_plugin.names import without_numbers
from mixedprec_plugin.plan.budget import Budget as CardBudget
from mixedprec_plugin.plan.folding import fold_names, natural_key
from mixedprec_plugin.plan.render import format_bytes
from mixedprec_plugin.plan.tables import Page, Table
from mixedprec_plugin.search.allocate import TOLERANCE
from mixedprec_plugin.search.candidates import AS_STORED
from mixedprec_plugin.search.finder import Found, Kind

# what a loss is -> its unit, and what is said of it
_KINDS: Mapping[Kind, tuple[str, str]] = {
    "nats": ("nats a token", "predicted KL on the text that was scored on"),
    "measured": ("nats a token", "sum of the KL of single units, measured in the engine"),
    "shares": ("", "sum of the shares of outputs that are error; no divergence"),
    "parts": ("", "sum of the parts of the residual stream that are error; no divergence"),
    "guesses": ("", "a rule of thumb from shapes alone; no divergence, nothing was measured"),
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a check measured: KL in nats a token, its standard error, and on what."""

    kl: float
    error: float | None
    text: str


def header_lines(found: Found, path: Path, model: str, verb: str = "search") -> list[str]:
    """The comment at the top of a preset: what it is, how to serve it, what it is predicted."""
    point, (unit, what) = found.point, _KINDS[found.way.kind]
    config, name = (shlex.quote(printable(text)) for text in (path.name, model))
    command = [
        f"sglang serve --model-path {name} --load-format mixedprec --mixedprec-config {config}"
    ]
    if any(found.choices.candidates[x].needs_conversion for x in found.choice.values()):
        command = [
            f"mixedprec convert --model {name} --preset {config} --out DIR",
            "sglang serve --model-path DIR --load-format mixedprec",
        ]
    size = f"{format_bytes(point.rank_bytes)} a rank"
    lines = [f"{point.bits:.3f} bits a weight of linear layers, scales counted; {size}."]
    lines += [f"Loss {point.loss:.4f} {unit}".rstrip() + f": {what}."]
    lines += [f"Scored on {printable(found.way.scored_on)}."] * bool(found.way.scored_on)
    return [
        *_labelled("Purpose", [f"Found by mixedprec {verb} for {printable(model)}.", *lines]),
        *_labelled("Command", command),
    ]


def _labelled(label: str, lines: Sequence[str]) -> list[str]:
    return [f"{label if not number else '':<9} {line}" for number, line in enumerate(lines)]


def print_found(
    found: Found, card: CardBudget | None, measured: Measured | None, seconds: float, path: Path,
    page: Page,
) -> None:  # fmt: skip
    """Print where the bytes go and what that costs."""
    if card is not None:
        held = Table(("on each rank", False), ("GB", True), ("", False))
        for row in card.lines:
            held.add(row.title, f"{row.num_bytes / 1e9:.2f}", row.formula)
        page.print(held)
    page.print(_schemes(found))
    if found.named:
        beside = Table(("for comparison", False), ("bits", True), ("loss", True))
        for point in sorted(found.named, key=lambda point: point.bits):
            beside.add(point.name, f"{point.bits:.2f}", f"{point.loss:.4f}")
        page.print(beside)
    unit, what = _KINDS[found.way.kind]
    point, allocation = found.point, found.allocation
    said = [
        f"{point.bits:.3f} bits a weight of linear layers, "
        f"{format_bytes(point.rank_bytes)} a rank; loss {point.loss:.4f} {unit}".rstrip()
        + f" ({what})",
        f"at most {max(allocation.gap, 0):.2%} above the least that is possible (bound "
        f"{allocation.bound:.4f}); up to {TOLERANCE:.0%} is given for a scheme less",
    ]
    if measured is not None:
        error = "" if measured.error is None else f" ± {measured.error:.4f}"
        said.append(
            f"measured KL {measured.kl:.4f}{error} nats a token, predicted {point.loss:.4f} "
            f"({measured.text})"
        )
    said += [f"scored on {found.way.scored_on}"] * bool(found.way.scored_on)
    for why in dict.fromkeys(found.way.without.values()):
        units = fold_names(unit for unit, own in found.way.without.items() if own == why)
        said.append(f"left as stored: {', '.join(units)}: {why}")
    said += [f"left out: source {name}: {why}" for name, why in found.choices.apart.items()]
    made = f"{found.num_made:,} scores made" if found.num_made else "scores were there"
    said.append(f"{path}: written ({made}, {seconds:.1f} s)")
    for line in said:
        page.print(printable(line))


def _schemes(found: Found) -> Table:
    table = Table(
        ("scheme", False), ("modules", True), ("size", True), ("bits", True), ("loss", True)
    )
    schemes: dict[str, list[str]] = {}
    for unit_name, scheme in found.choice.items():
        schemes.setdefault(scheme, []).append(unit_name)
    for name, units in sorted(schemes.items(), key=lambda item: -len(item[1])):
        options = [found.choices.units[unit].options[name] for unit in units]
        size = sum(option.num_bytes for option in options)
        weights = sum(found.choices.units[unit].num_weights for unit in units)
        loss = sum(found.losses[unit] for unit in units)
        cells = (str(len(units)), format_bytes(size), f"{8 * size / weights:.2f}", f"{loss:.4f}")
        table.add(name, *cells)
    return table


def as_dict(
    found: Found, card: CardBudget | None, measured: Measured | None, seconds: float
) -> dict[str, Any]:
    """The same as data for JSON."""
    allocation = found.allocation
    return {
        "kind": found.way.kind,
        "scored_on": found.way.scored_on,
        "unscored": dict(found.way.without),
        "point": found.point,
        "bound": allocation.bound,
        "gap": allocation.gap,
        "units": {
            unit: {"scheme": name, "loss": found.losses[unit]}
            for unit, name in found.choice.items()
        },
        "as_stored": AS_STORED,
        "front": found.front,
        "named": found.named,
        "card": [line._asdict() for line in card.lines] if card else None,
        "measured": measured,
        "scores_made": found.num_made,
        "seconds": seconds,
    }


def draw(found: Found) -> Any:
    """The front with named presets beside it, and the map of layers by bits, as one figure."""
    from matplotlib.figure import Figure

    rows, columns, bits = _layer_map(found)
    figure = Figure(figsize=(9, 4 + 0.3 * len(rows)), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=(4, 0.3 * len(rows) + 0.6))
    _draw_front(found, upper)
    image = lower.imshow(bits, aspect="auto", cmap="viridis", vmin=2, vmax=16)
    lower.set_yticks(range(len(rows)), rows)
    step = max(1, len(columns) // 16)
    lower.set_xticks(range(0, len(columns), step), columns[::step])
    lower.set(xlabel="layer")
    figure.colorbar(image, ax=lower, label="bits a weight")
    return figure


def _draw_front(found: Found, axes: Any) -> None:
    points = [point for point in found.front if point.loss > 0]
    axes.plot([p.bits for p in points], [p.loss for p in points], label="the front")
    for point in found.named:
        if point.loss > 0:
            axes.plot(point.bits, point.loss, "s", color="gray")
            axes.annotate(
                point.name, (point.bits, point.loss), xytext=(4, 4), textcoords="offset points",
                fontsize=7,
            )  # fmt: skip
    axes.plot(found.point.bits, found.point.loss, "o", color="red", label="this preset")
    unit, what = _KINDS[found.way.kind]
    label = ", ".join(filter(None, (what.partition(";")[0], unit)))
    axes.set(xlabel="bits a weight of linear layers, scales counted", ylabel=label, yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()


def _layer_map(found: Found) -> tuple[list[str], list[str], list[list[float]]]:
    """Kinds of modules, layers, and the bits of each in each: not a number where there is none."""
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for name, candidate in found.choice.items():
        unit = found.choices.units[name]
        module = unit.layers[0].module
        parent = last_component(without_numbers(module).rpartition(".")[0])
        number = next((part for part in module.split(".") if part.isdecimal()), "")
        key = (f"{parent}.{last_component(module)}", number)
        size, weights = sums.get(key, (0, 0))
        sums[key] = size + unit.options[candidate].num_bytes, weights + unit.num_weights
    rows = list(dict.fromkeys(kind for kind, _ in sums))
    columns = sorted({number for _, number in sums}, key=natural_key)
    bits = [
        [8 * sums[r, c][0] / sums[r, c][1] if (r, c) in sums else float("nan") for c in columns]
        for r in rows
    ]
    return rows, columns, bits
