"""docs/calibration.md: what `benchmarks.calibration` measured, beside what was asked for."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.calibration_models import SUBJECTS, Subject
from benchmarks.figures import Figure

Row = dict[str, Any]
# "preset | rounding" -> row
Rows = dict[str, Row]

HEAD = Path(__file__).with_name("data") / "calibration.md"
MANUAL, CODE, OWN = "manual", "code", "own text"
TEXTS = (MANUAL, CODE, OWN)
NEAREST, CALIBRATED = "nearest", "calibrated"
AWQ, GPTQ = "awq, groups of 64", "gptq, groups of 64"

MEASURED = """\
`make bench-rounding`; Python {python}, {packages}, {machine}. KL(bf16 || quantized) in nats a
token by `mixedprec eval`, weights only, ± its standard error over windows: {windows} of {length}
tokens on texts that nothing was chosen on, Python's manual pages and the source of its library; and
64 of 128 that the model wrote, of another seed than what was calibrated on. "Of nearest": the share
of what rounding to nearest costs on the manual, on code and on the model's own text, ± the standard
error of the ratio, windows taken in pairs. "Predicted": by the gradients of tokens that the model
wrote with those and that were held out. CPU seconds are of the whole conversion, the text included.
"""


def write_page(found: Mapping[str, Rows], windows: int, length: int) -> str:
    """The whole page, from what was measured."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    measured = MEASURED.format(
        python=platform.python_version(), packages=packages, machine=platform.machine(),
        windows=windows, length=length,
    )  # fmt: skip
    parts = [HEAD.read_text(encoding="utf-8").rstrip() + "\n", "## Measured\n", measured]
    if SUBJECTS[0].title in found:
        parts += [asked(found[SUBJECTS[0].title]), ""]
    for subject in SUBJECTS:
        if subject.title in found:
            parts += [f"### {subject.title}\n", table(subject, found[subject.title]), ""]
        else:
            parts += [f"### {subject.title}\n", "Not measured.", ""]
    return "\n".join(parts)


def table(subject: Subject, rows: Rows) -> str:
    """Markdown of one model's rows; what is absent or was not finished says so."""
    lines = [
        "| preset | rounding | bits | " + " | ".join(f"KL, {name}" for name in TEXTS)
        + " | top-1, manual / code | of nearest | predicted | CPU s |",
        "|---|---|--:|" + "--:|" * (len(TEXTS) + 4),
    ]  # fmt: skip
    for preset, rounding in subject.variants:
        row = rows.get(f"{preset} | {rounding}", {"why": "not measured"})
        first = f"| {preset} | {rounding}"
        if "bits" not in row:
            why = row.get("why", "not measured")
            lines.append(f"{first}: {why} |" + " |" * (len(TEXTS) + 5))
            continue
        plain = rows.get(f"{preset} | {NEAREST}", {})
        cells = [_kl(row.get(name)) for name in TEXTS]
        top1 = " / ".join(
            f"{row[name]['top1']['value']:.3f}" for name in (MANUAL, CODE) if name in row
        )
        shares = "" if rounding == NEAREST else " / ".join(_shares(row, plain))
        predicted = f"{row['predicted']:.4f}" if row.get("predicted") else ""
        seconds = f"{row['seconds']:.0f}" if row.get("seconds") else ""
        if row.get("minutes"):
            seconds = f"{row['minutes']:.0f} min"
        cells = [f"{row['bits']:.2f}", *cells, top1, shares, predicted, seconds]
        lines.append(f"{first} | {' | '.join(cells)} |")
    return "\n".join(lines)


# what, preset, rounding, another rounding, text, the most that one KL may be of the other
WANTED = (
    ("AWQ, of nearest", AWQ, CALIBRATED, NEAREST, MANUAL, 0.40),
    ("AWQ, of nearest", AWQ, CALIBRATED, NEAREST, CODE, 0.35),
    ("AWQ, of AutoAWQ's", AWQ, CALIBRATED, "AutoAWQ", MANUAL, 0.70),
    ("symmetric GPTQ, of nearest", GPTQ, CALIBRATED, NEAREST, MANUAL, 0.45),
)


def figures_of(rows: Rows) -> list[Figure]:
    """The KLs that something was asked for, of those that were measured."""
    figures = []
    for what, preset, own, other, text, most in WANTED:
        pair = [rows.get(f"{preset} | {rounding}", {}).get(text) for rounding in (own, other)]
        if all(pair):
            ours, peer = (one["kl"]["value"] for one in pair if one)
            figures.append(Figure(f"{what}, {text}, KL", ours, peer, most * peer))
    return figures


def asked(rows: Rows) -> str:
    """Markdown of what calibration was to reach, and what it does."""
    lines = ["| what | text | at most | found |", "|---|---|--:|--:|"]
    for what, preset, own, other, text, most in WANTED:
        found = ratio(rows.get(f"{preset} | {own}", {}), rows.get(f"{preset} | {other}", {}), text)
        said = "not measured" if found is None else f"{found[0]:.3f} ± {found[1]:.3f}"
        lines.append(f"| {what} | {text} | {most:.2f} | {said} |")
    row = rows.get(f"{AWQ} | {CALIBRATED}", {})
    if OWN in row and row.get("predicted"):
        off = row["predicted"] / row[OWN]["kl"]["value"] - 1
        lines.append(f"| AWQ, predicted against measured | {OWN} | ± 10% | {off:+.1%} |")
    return "\n".join(lines)


def ratio(row: Row, other: Row, text: str) -> tuple[float, float] | None:
    """One KL over another, and its standard error over windows; None if one is missing."""
    if text not in row or text not in other:
        return None
    own, base = row[text]["windows"], other[text]["windows"]
    count, mean = len(base), math.fsum(base) / len(base)
    share = math.fsum(own) / count / mean
    left = math.fsum((a - share * b) ** 2 for a, b in zip(own, base, strict=True))
    return share, math.sqrt(left / (count * max(count - 1, 1))) / mean


def _shares(row: Row, plain: Row) -> Sequence[str]:
    found = [ratio(row, plain, text) for text in TEXTS]
    return [f"{one[0]:.2f} ± {one[1]:.2f}" for one in found if one]


def _kl(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{found['kl']['value']:.4f} ± {found['kl']['error'] or 0:.4f}"
