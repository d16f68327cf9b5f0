"""All comparisons, worst first: as a table, as JSON, as errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mixedprec_plugin.errors import Problem
from mixedprec_plugin.plan.folding import fold_problems
from mixedprec_plugin.plan.tables import Page, Table
from mixedprec_plugin.verify.verifier import Comparison

NUM_SHOWN = 20
# times the usual error of a scheme
_MUCH = 2


def worst_first(found: Sequence[Comparison]) -> list[Comparison]:
    """Sort by how near a layer is to its limit; those that were not compared come last."""

    def share(one: Comparison) -> float:
        if one.distance is None:
            return -1.0
        error = one.distance.relative_error
        return math.inf if math.isnan(error) else error / one.limit

    return sorted(found, key=share, reverse=True)


def problems(found: Sequence[Comparison]) -> list[Problem]:
    """An error for each layer that is too far from its reference or cannot be held against it."""
    texts = []
    for one in worst_first(found):
        if one.distance is None:
            texts.append(_not_compared(one))
        elif one.is_too_far:
            what = (
                f"in {one.method} from {one.source!r} its relative error is "
                f"{one.distance.relative_error:.3g}, its cosine {one.distance.cosine:.4f} "
                f"(expected at most {one.limit:g})"
            )
            remedy = "the checkpoint is damaged, of another model, or read wrongly; take the layer "
            texts.append(Problem(one.layer, what, f"{remedy}from another source", "verify"))
    return texts


def _not_compared(one: Comparison) -> Problem:
    remedy = "give a reference that holds the whole of this model in a format that can be read"
    return Problem(one.layer, f"was not compared: {one.note}", remedy, "verify")


def comparison_as_dict(one: Comparison) -> dict[str, Any]:
    """A comparison as plain data for JSON; an infinite number is null."""
    far = one.distance
    return {
        "layer": one.layer,
        "method": one.method,
        "source": one.source,
        "relative_error": _finite(far.relative_error) if far else None,
        "cosine": _finite(far.cosine) if far else None,
        "limit": _finite(one.limit),
        "usual_error": one.usual or None,
        "too_far": one.is_too_far,
        "compared": far is not None,
        "note": one.note,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def print_comparisons(found: Sequence[Comparison], page: Page) -> None:
    """Print the worst layers, then how many of all are too far."""
    table = Table(
        ("layer", False), ("method", False), ("source", False), ("relative error", True),
        ("limit", True), ("cosine", True), ("compared", False),
    )  # fmt: skip
    ordered = worst_first(found)
    shown = [one for one in ordered if one.is_too_far or one.distance is None]
    shown = shown or ordered[:NUM_SHOWN]
    for one in shown:
        far = one.distance
        table.add(
            one.layer, one.method, one.source,
            f"{far.relative_error:.4f}" if far else "-",
            f"{one.limit:g}" if math.isfinite(one.limit) else "",
            f"{far.cosine:.5f}" if far else "-", one.note,
            style="red" if one.is_too_far or far is None else "",
        )  # fmt: skip
    page.print(table)
    page.print()
    if len(shown) < len(found):
        page.print(f"The worst {len(shown)} of {len(found)} layers, nearest to their limit first.")
    num_far = sum(one.is_too_far for one in found)
    num_missing = sum(one.distance is None for one in found)
    missing = f", {num_missing} not compared" if num_missing else ""
    page.print(f"{len(found) - num_missing} compared: {num_far} too far{missing}")
    if not num_far and not num_missing:
        page.print(
            "Every layer is what its method makes of the reference: none is damaged, swapped or "
            "read wrongly.\nWhat the rounding costs in predictions, mixedprec eval measures."
        )


def summary(found: Sequence[Comparison]) -> list[Problem]:
    """What the comparisons say, in errors and warnings that are few however many layers are."""
    told = []
    for one in found:
        if one.distance is None:
            told.append(_not_compared(one))
        elif one.is_too_far:
            what = f"is not what {one.method} makes of the reference"
            remedy = (
                f"it is damaged, of another model or read wrongly; take it from another source "
                f"than {one.source!r}"
            )
            told.append(Problem(one.layer, what, remedy, "verify"))
        elif one.distance.relative_error > _MUCH * one.usual > 0:
            what = f"{one.method} rounds it badly: an error of {one.usual:.1%} is usual"
            remedy = "its weights have outliers; give it smaller groups or more bits"
            told.append(Problem(one.layer, what, remedy, "large-rounding", "warning"))
    return fold_problems(told)
