"""The front with named presets beside it, and the map of layers by bits, as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixedprec_plugin.errors import Problem, UsageError
from mixedprec_plugin.families.names import last_component
from mixedprec_plugin.names import without_numbers
from mixedprec_plugin.plan.folding import natural_key
from mixedprec_plugin.search.finder import Found

_LABELS = {
    "nats": "predicted KL, nats a token",
    "measured": "sum of the KL of single units, nats a token",
    "shares": "sum of relative errors of outputs",
    "parts": "sum of relative errors of the residual stream",
    "guesses": "rule of thumb",
}


def draw(found: Found, path: Path) -> None:
    """Draw it, in the format that the file's name says.

    Raises:
        UsageError: matplotlib does not know the format.
    """
    from matplotlib.figure import Figure

    rows, columns, bits = layer_map(found)
    figure = Figure(figsize=(9, 4 + 0.3 * len(rows)), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=(4, 0.3 * len(rows) + 0.6))
    _draw_front(found, upper)
    image = lower.imshow(bits, aspect="auto", cmap="viridis", vmin=2, vmax=16)
    lower.set_yticks(range(len(rows)), rows)
    step = max(1, len(columns) // 16)
    lower.set_xticks(range(0, len(columns), step), columns[::step])
    lower.set(xlabel="layer")
    figure.colorbar(image, ax=lower, label="bits a weight")
    try:
        figure.savefig(path)
    except (ValueError, OSError) as error:
        raise UsageError(Problem("--plot", f"{path} cannot be written ({error})")) from error


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
    axes.set(
        xlabel="bits a weight of linear layers, scales counted",
        ylabel=_LABELS[found.kind],
        yscale="log",
    )
    axes.grid(alpha=0.3)
    axes.legend()


def layer_map(found: Found) -> tuple[list[str], list[str], list[list[float]]]:
    """Bits of each kind of module in each layer; of experts, their mean.

    Returns:
        rows, columns, and bits [row][column], not a number where a layer has no such module.
    """
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for name, candidate in found.choice.items():
        unit = found.choices.units[name]
        module = unit.layers[0].module
        number = next((part for part in module.split(".") if part.isdecimal()), "")
        key = (_kind(module), number)
        size, weights = sums.get(key, (0, 0))
        sums[key] = size + unit.options[candidate].num_bytes, weights + unit.num_weights
    rows = list(dict.fromkeys(kind for kind, _ in sums))
    columns = sorted({number for _, number in sums}, key=natural_key)
    bits = [
        [8 * sums[r, c][0] / sums[r, c][1] if (r, c) in sums else float("nan") for c in columns]
        for r in rows
    ]
    return rows, columns, bits


def _kind(module: str) -> str:
    parent = last_component(without_numbers(module).rpartition(".")[0])
    return f"{parent}.{last_component(module)}"
