"""The table as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sglang
import torch
import transformers

from benchmarks.families.cells import Cell
from benchmarks.families.comparison import LIMIT, Distance, Held
from benchmarks.families.methods import COLUMNS
from benchmarks.families.served import section

_HEAD = """# Model families

Made by `make families` on a plain CPU, with SGLang {sglang}, transformers {transformers} and torch
{torch}.

Each cell is a tiny random model of the family (two layers, hidden size 512, eight experts), served
by SGLang's model runner with a preset that gives all layers the method, on one rank and on two;
`mxfp4` the experts alone, which are all that it runs, and `humming` all but experts.
`mixed` gives attention block FP8 and the experts of every layer seven schemes. A prompt of 24
tokens and 8 greedy steps are compared with transformers, which gets the same weights dequantized by
other code and quantizes activations as SGLang's kernels do.

They are compared layer by layer. Each linear layer and each block of experts of the reference gets
the input that the engine's got, and the input that the reference had by itself must be the same but
for rounding; so must the logits at the end, which are made of the reference's own sums. The reason
is that two correct models part ways: a value between two codes of quantized activations falls to
one side here and to the other there, and so does a token between two experts.

A cell shows the greatest distance of all inputs and logits on one rank / two: of an input as a part
of its norm, of the logits at a position as a part of their standard deviation. Green (✓) is at
most {limit:.4f}, four roundings to bf16, whatever the method; the same experts for each token,
unless one rounding of the router's logits leads to the others; and no greedy token that the
distance does not explain. `refused` is what the plan refuses before anything is loaded, with the
reason below.
"""

_ALONE = """## Left alone

Median distance of the logits, as above, on one rank, from the reference that gets nothing but the
engine's tokens. Where two numbers stand, the second is from the reference that also sends tokens to
the experts that the engine chose, where its own router's logits are nearly equal. This is what
rounding does in two layers, and no measure of correctness. {differing} of {tokens} greedy tokens
are not the reference's; each of them by less than the distance explains, but for {unexplained}.
"""


Entry = Mapping[str, Any]


def as_markdown(entries: Sequence[Entry], newer: Sequence[Entry] = ()) -> str:
    """Write the page.

    Args:
        entries: of `entry_of`.
        newer: of `served.entry_of`.
    """
    notes: dict[str, int] = {}
    rows = _rows(entries, lambda entry: _text(entry, notes))
    parts = [
        _HEAD.format(
            sglang=sglang.__version__,
            transformers=transformers.__version__,
            torch=torch.__version__.partition("+")[0],
            limit=LIMIT,
        ),
        "\n".join(rows),
        "\n".join(f"{number}. {text}" for text, number in notes.items()),
        section(newer),
        _alone(entries),
        _on_cuda(entries),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _rows(entries: Sequence[Entry], write: Callable[[Entry], str]) -> list[str]:
    found = {(entry["family"], entry["method"]): entry for entry in entries}
    rows = [f"| family | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for family in dict.fromkeys(entry["family"] for entry in entries):
        texts = [
            write(found[family, column]) if (family, column) in found else "" for column in COLUMNS
        ]
        rows.append(f"| {family} | {' | '.join(texts)} |")
    return rows


def _text(entry: Entry, notes: dict[str, int]) -> str:
    if entry["failures"]:
        return "**failed**"
    shown = []
    for ranks in ("1", "2"):
        held = entry["held"].get(ranks)
        worst = max(held["logits"]["worst"], held["worst_input"]["error"]) if held else 0.0
        shown.append(f"{worst:.4f}" if held else "refused")
    text = ("✓ " if entry["green"] else "**too far** ") + " / ".join(shown)
    if not entry["held"]:
        text = "refused"
    numbers = sorted({notes.setdefault(note, len(notes) + 1) for note in _notes(entry)})
    return text + "".join(f" [{number}]" for number in numbers)


def _notes(entry: Entry) -> list[str]:
    made = []
    refused = entry["refused"]
    for reason in dict.fromkeys(reason for why in refused.values() for reason in why):
        ranks = " and ".join(size for size, why in refused.items() if reason in why)
        kept = f" Served with `{entry['kept_in_bf16']}` in bf16." if entry["kept_in_bf16"] else ""
        made.append(f"Refused on {ranks} rank(s): {reason}.{kept}")
    return made


def _alone(entries: Sequence[Entry]) -> str:
    """How far the models are from references that go their own ways."""
    served = [entry["alone"] for entry in entries if entry["alone"]]
    head = _ALONE.format(
        differing=sum(near["differing"] for near in served),
        tokens=sum(near["tokens"] for near in served),
        unexplained=sum(near["unexplained"] for near in served),
    )
    return "\n".join([head, *_rows(entries, _median)])


def _median(entry: Entry) -> str:
    if not entry["alone"]:
        return ""
    alone, routed = entry["alone"]["median"], entry["routed"]["median"]
    return f"{alone:.3f}" + ("" if alone == routed else f", {routed:.3f}")


def _on_cuda(entries: Sequence[Entry]) -> str:
    """What the plan refuses for a GPU, of the same models."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        for ranks, why in entry["refused_for_cuda"].items():
            for reason in why:
                place = f"{entry['family']} {entry['method']} ({ranks})"
                found.setdefault(reason, []).append(place)
    lines = [f"- {reason}. In {', '.join(places)}." for reason, places in found.items()]
    head = "## Refused for a GPU\n\nThe same, planned for CUDA (ranks in brackets).\n"
    return "\n".join([head, *(lines or ["Nothing."])])


def entry_of(cell: Cell) -> dict[str, Any]:
    """Everything that was measured of a cell, as plain data."""
    return {
        "family": cell.architecture,
        "method": cell.column,
        "green": cell.is_green,
        "refused": {str(size): list(why) for size, why in cell.refusals.items()},
        "refused_for_cuda": {str(size): list(why) for size, why in cell.cuda_refusals.items()},
        "kept_in_bf16": cell.kept,
        "failures": list(cell.failures),
        "effect_of_the_method": round(cell.effect, 4),
        "seconds": round(cell.seconds, 1),
        "held": {str(tp_size): _held(held) for tp_size, held in cell.held.items()},
        "alone": _logits(cell.alone),
        "routed": _logits(cell.routed),
    }


def _held(held: Held) -> dict[str, Any]:
    steps = held.steps
    worst = max(steps.errors, key=steps.errors.__getitem__, default="")
    return {
        "logits": _logits(held.logits),
        "worst_input": {"of": worst, "error": round(steps.worst, 5)},
        "choices_of_experts": steps.num_choices,
        "tied": steps.tied,
        "elsewhere": steps.elsewhere,
    }


def _logits(near: Distance | None) -> dict[str, Any] | None:
    if near is None:
        return None
    return {
        "median": round(near.error, 5),
        "worst": round(near.worst, 5),
        "tokens": near.num_tokens,
        "differing": near.differing,
        "unexplained": near.unexplained,
    }
