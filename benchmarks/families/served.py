"""What became of the newer families, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.families.outcomes import Outcome

_HEAD = """## What people serve beside

A tiny random checkpoint of each family, as transformers' `save_pretrained` writes it, with `fp8`
for all decoder layers, or `bf16` where that is refused; what stays bf16 is named. Each is one of

- **serves and agrees**: loaded right, and the median distance of the logits of SGLang's engine on
  a CPU from transformers' on the same tokens, as above, is what rounding does: at most 0.03 in bf16
  and 0.2 in fp8, which also rounds activations;
- **loads right**: every parameter in floats is, bit for bit, what SGLang's own loader makes of the
  checkpoint, and every quantized layer computes what that one's weights say, but for rounding to
  FP8: each weight of a linear layer on its own, experts by their outputs. Why it was not served
  stands beside;
- **refused**: by the plan, or by SGLang's model built without weights, with what is missing;
- **failed**: anything else.

| family | in | outcome | parameters the same | layers rounded | logits | |
|---|---|---|---|---|---|---|
"""


def entry_of(outcome: Outcome) -> dict[str, Any]:
    """Everything that was found of a family, as plain data."""
    values = outcome.values
    return {
        "family": outcome.family,
        "outcome": outcome.status,
        "method": outcome.method,
        "kept_in_bf16": outcome.kept if outcome.method != "bf16" else "",
        "refused": outcome.refused,
        "unchecked": outcome.unchecked,
        "same": values.same if values else 0,
        "rounded": values.rounded if values else 0,
        "unread_by_sglang": values.unread if values else "",
        "logits": {method: round(error, 4) for method, error in outcome.distances.items()},
        "not_served": outcome.note,
        "failures": outcome.failures,
        "seconds": round(outcome.seconds, 1),
    }


def section(entries: Sequence[Mapping[str, Any]]) -> str:
    """Write the section; an empty text where there is nothing to tell.

    Args:
        entries: of `entry_of`.
    """
    return _HEAD + "\n".join(map(_row, entries)) if entries else ""


def _row(entry: Mapping[str, Any]) -> str:
    logits = ", ".join(f"{method} {error:.3f}" for method, error in entry["logits"].items())
    words = []
    if entry["method"] and entry["kept_in_bf16"]:
        words.append(f"`{entry['kept_in_bf16']}` in bf16")
    if entry["method"] and entry["not_served"]:
        words.append(f"not served: {entry['not_served']}")
    if entry["unread_by_sglang"]:
        words.append("SGLang's own loader does not read it here")
    if entry["unchecked"]:
        words.append(entry["unchecked"])
    for method, why in entry["refused"].items():
        words += [f"{method} refused: {reason}" for reason in why]
    words += [failure.splitlines()[-1] for failure in entry["failures"]]
    cells = [
        entry["family"],
        entry["method"],
        f"**{entry['outcome']}**",
        str(entry["same"] or ""),
        str(entry["rounded"] or ""),
        logits,
        "; ".join(words).replace("|", "\\|"),
    ]
    return f"| {' | '.join(cells)} |"
