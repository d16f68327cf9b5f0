"""Evaluating several plans, and printing what was found."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from mixedprec_plugin.calibrate.network import Network
from mixedprec_plugin.calibrate.text import text_for
from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.compose.stream import compose_served
from mixedprec_plugin.errors import Problem, UsageError, printable
from mixedprec_plugin.evaluate.divergence import Divergence, Mean, divergences, served_divergences
from mixedprec_plugin.evaluate.server import Server
from mixedprec_plugin.methods.registry import AUTO
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.render import totals
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.plan.tables import Page, Table
from mixedprec_plugin.preset.load import load_resolved

UNQUANTIZED = "(unquantized)"
_LARGEST_EXPONENT = math.log(sys.float_info.max)

# name of a row -> what serves it and writes a log to a file
Servers = Mapping[str, Callable[[Path], AbstractContextManager[Server]]]


@dataclasses.dataclass(frozen=True)
class Row:
    """What one preset costs, and its served bits a weight of linear layers, scales counted."""

    name: str
    bits: float
    num_bytes: int
    found: Divergence


def evaluate(
    plans: Mapping[str, Plan], reference: Source, text: Path | None, num_windows: int, length: int,
    seed: int, folder: Path, progress: Progress, servers: Servers | None = None,
) -> list[Row]:  # fmt: skip
    """Evaluate plans against an unquantized model, which is the first row.

    Args:
        text: a file; None has the reference write the text.
        folder: an empty one for hidden states and logs.
        servers: of the unquantized model and of each plan; without, they run in transformers.
    Raises:
        ServerError: a server does not start, or fails.
        UsageError: the reference is quantized itself, or the text too short.
        PlanError: the reference is not whole.
        CheckpointError: a source is damaged, or of a class that transformers does not have.
    """
    own = _unquantized(reference, plans)
    with Reader() as reader:
        network = Network(own, reader)
        tokens = text_for(network, text, num_windows, length, seed, progress)
        found = _found(network, plans, tokens, reader, folder, progress, servers)
    rows = {UNQUANTIZED: own, **plans}
    return [
        Row(name, totals(plan)["bits_per_linear_weight"], plan.bytes_after, one)
        for (name, plan), one in zip(rows.items(), found.values(), strict=True)
    ]


def _found(
    network: Network, plans: Mapping[str, Plan], tokens: torch.Tensor, reader: Reader, folder: Path,
    progress: Progress, servers: Servers | None,
) -> dict[str, Divergence]:  # fmt: skip
    """What each model's predictions are like, the reference's first."""
    count = len(network.layers)
    if servers is not None:
        task = progress.add_task("serving", total=count + len(servers) * len(tokens))
        return served_divergences(network, servers, tokens, folder, lambda: progress.advance(task))
    networks = {name: Network(plan, reader, compose=compose_served) for name, plan in plans.items()}
    task = progress.add_task("layers", total=count + sum(len(x.layers) for x in networks.values()))
    return divergences(network, networks, tokens, folder, lambda: progress.advance(task))


def _unquantized(reference: Source, plans: Mapping[str, Plan]) -> Plan:
    """The reference as it is stored."""
    target = next(iter(plans.values())).target
    preset = load_resolved({"version": 1, "rules": [{"match": "*", "method": AUTO}]}, "reference")
    plan = resolve_plan(preset, reference, target)
    quantized = [x.name for x in plan.layers if x.stored is not None and not x.stored.is_float]
    if quantized:
        what = f"{reference.path} is quantized itself ({len(quantized)} layers)"
        remedy = "name the unquantized model with --reference"
        raise UsageError(Problem("--reference", what, remedy))
    return plan.check()


def _with_error(mean: Mean, digits: int) -> str:
    error = "" if mean.error is None else f" ± {mean.error:.{digits}f}"
    return f"{mean.value:.{digits}f}{error}"


def print_rows(
    rows: Sequence[Row], text: Path | None, page: Page, *, is_served: bool = False
) -> None:
    """Print a table of what was found."""
    numbers = ("linear bits", "KL, nats a token", "perplexity", "top-1 agreement")
    table = Table(("preset", False), *((title, True) for title in numbers))
    for row in rows:
        found = row.found
        likelihood, error = found.log_likelihood.value, found.log_likelihood.error
        perplexity = math.exp(likelihood) if likelihood < _LARGEST_EXPONENT else math.inf
        table.add(
            row.name, f"{row.bits:.2f}", _with_error(found.kl, 4),
            _with_error(Mean(perplexity, error and perplexity * error), 2),
            _with_error(found.top1, 4),
        )  # fmt: skip
    page.print(table)
    page.print()
    read = printable(str(text)) if text else "text that the unquantized model wrote"
    count = len(rows[0].found.windows)
    how = (
        f"Served by SGLang, against transformers in float32: {UNQUANTIZED} is the engine's noise."
        if is_served
        else "In transformers: weights are as served, activations are not quantized."
    )
    page.print(f"On {read}, {count} windows; ± is the standard error over windows. {how}")


def as_dict(rows: Sequence[Row], text: Path | None, *, is_served: bool = False) -> dict[str, Any]:
    """What was found, for JSON."""
    return {
        "text": str(text) if text else None,
        "engine": "sglang" if is_served else "transformers",
        "windows": len(rows[0].found.windows),
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def draw(rows: Sequence[Row]) -> Any:
    """A figure of divergence against bits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if floor := rows[0].found.kl.value:
        axes.axhline(floor, linestyle=":", color="gray")
    for row in rows[1:]:
        kl = row.found.kl
        axes.errorbar(row.bits, kl.value, yerr=kl.error or 0, fmt="o")
        axes.annotate(row.name, (row.bits, kl.value), xytext=(5, 5), textcoords="offset points")
    axes.set(xlabel="bits a weight of linear layers", ylabel="KL, nats a token", ylim=(0, None))
    axes.grid(alpha=0.3)
    return figure
