"""The table as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import sglang
import torch
import transformers

from benchmarks.families.cells import Cell
from benchmarks.families.comparison import LIMITS, MAX_OUTLIERS
from benchmarks.families.methods import COLUMNS

_HEAD = """# Model families

Made by `make families` on a plain CPU, with SGLang {sglang}, transformers {transformers} and torch
{torch}.

Each cell is a tiny random model of the family (two layers, hidden size 512, eight experts), served
by SGLang's model runner with a preset that gives all layers the method, on one rank and on two.
`mixed` gives attention block FP8 and the experts of every layer seven schemes. Logits of a prompt
of 24 tokens and of 8 greedy steps are compared with transformers, which gets the same weights
dequantized by other code and quantizes activations as the method does; two ranks are compared with
one.

A cell shows the distance at the median position, on one rank / two, as a part of the logits'
standard deviation. bf16 rounding alone makes 0.02 of it; with quantized activations, whose codes it
turns over, up to 0.15. Green (✓) is a distance within {limits}, at most {outliers:.0%} of positions
beyond twice of it (where two experts are nearly equal, rounding decides between them), and no
greedy token that the distance does not explain. `refused` is what the plan refuses before anything
is loaded, with the reason below.
"""


def as_markdown(cells: Sequence[Cell]) -> str:
    """Write the page."""
    by_limit: dict[float, list[str]] = {}
    for column, limit in LIMITS.items():
        by_limit.setdefault(limit, []).append(column)
    limits = "; ".join(f"{limit} ({', '.join(names)})" for limit, names in by_limit.items())
    notes: dict[str, int] = {}
    rows = _rows(cells, notes)
    parts = [
        _HEAD.format(
            sglang=sglang.__version__,
            transformers=transformers.__version__,
            torch=torch.__version__.partition("+")[0],
            limits=limits,
            outliers=MAX_OUTLIERS,
        ),
        "\n".join(rows),
        "\n".join(f"{number}. {text}" for text, number in notes.items()),
        _on_cuda(cells),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _rows(cells: Sequence[Cell], notes: dict[str, int]) -> list[str]:
    found = {(cell.architecture, cell.column): cell for cell in cells}
    rows = [f"| family | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for family in dict.fromkeys(cell.architecture for cell in cells):
        texts = [
            _text(found[family, column], notes) if (family, column) in found else ""
            for column in COLUMNS
        ]
        rows.append(f"| {family} | {' | '.join(texts)} |")
    return rows


def _text(cell: Cell, notes: dict[str, int]) -> str:
    if cell.failures:
        return "**failed**"
    shown = []
    for tp_size in (1, 2):
        near = cell.distances.get(tp_size)
        shown.append(f"{near.error:.3f}" if near else "refused")
    text = ("✓ " if cell.is_green else "**too far** ") + " / ".join(shown)
    if not cell.distances:
        text = "refused"
    numbers = sorted({notes.setdefault(note, len(notes) + 1) for note in _notes(cell)})
    return text + "".join(f" [{number}]" for number in numbers)


def _notes(cell: Cell) -> list[str]:
    made = []
    for reason in dict.fromkeys(reason for why in cell.refusals.values() for reason in why):
        sizes = " and ".join(str(size) for size, why in cell.refusals.items() if reason in why)
        kept = f" Served with `{cell.kept}` in bf16." if cell.kept else ""
        made.append(f"Refused on {sizes} rank(s): {reason}.{kept}")
    return made


def _on_cuda(cells: Sequence[Cell]) -> str:
    """What the plan refuses for a GPU, of the same models."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        for tp_size, why in cell.cuda_refusals.items():
            for reason in why:
                place = f"{cell.architecture} {cell.column} ({tp_size})"
                found.setdefault(reason, []).append(place)
    lines = [f"- {reason}. In {', '.join(places)}." for reason, places in found.items()]
    head = "## Refused for a GPU\n\nThe same, planned for CUDA (ranks in brackets).\n"
    return "\n".join([head, *(lines or ["Nothing."])])


def as_json(cells: Sequence[Cell]) -> str:
    """Everything that was measured."""
    made: list[dict[str, Any]] = [
        {
            "family": cell.architecture,
            "method": cell.column,
            "green": cell.is_green,
            "refused": {str(size): why for size, why in cell.refusals.items()},
            "refused_for_cuda": {str(size): why for size, why in cell.cuda_refusals.items()},
            "kept_in_bf16": cell.kept,
            "failures": cell.failures,
            "effect_of_the_method": round(cell.effect, 4),
            "seconds": round(cell.seconds, 1),
            "distances": {
                str(tp_size): {
                    "median": round(near.error, 5),
                    "worst": round(near.worst, 5),
                    "tokens": near.num_tokens,
                    "differing": near.differing,
                    "unexplained": near.unexplained,
                }
                for tp_size, near in cell.distances.items()
            },
        }
        for cell in cells
    ]
    return json.dumps(made, indent=1) + "\n"
