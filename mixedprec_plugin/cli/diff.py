"""`mixedprec diff`: what two presets, folders or running servers make different."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from mixedprec_plugin.cli.output import print_json
from mixedprec_plugin.cli.planning import (
    add_model_argument,
    add_override_argument,
    add_target_arguments,
    make_named_plan,
)
from mixedprec_plugin.cli.running import ask, is_address
from mixedprec_plugin.errors import Problem, UsageError
from mixedprec_plugin.plan.folding import fold_names
from mixedprec_plugin.plan.render import format_bytes, plan_as_dict
from mixedprec_plugin.plan.tables import Page, Table

EXAMPLES = """
  mixedprec diff awq fp8-block --model DIR
  mixedprec diff mine.yaml DIR-awq --model DIR         a preset and a converted folder
  mixedprec diff mine.yaml plan.json --model DIR       what --mixedprec-plan wrote at a start
  mixedprec diff mine.yaml http://127.0.0.1:30000 --model DIR
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "preset, converted folder, plan as JSON, or a running server's address"
    parser.add_argument("a", metavar="A", help=what)
    parser.add_argument("b", metavar="B", help="the same")
    add_model_argument(parser, is_required=False)
    add_override_argument(parser)
    add_target_arguments(parser)


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Print the layers that are served otherwise, and what all take."""
    before, after = _plan(args.a, args), _plan(args.b, args)
    changes = _changes(before, after)
    if args.json:
        sides = {"a": before["totals"], "b": after["totals"]}
        print_json({**sides, "layers": changes}, out)
        return 0
    page = Page(out)
    table = Table(("layers", False), (args.a, False), (args.b, False), ("bytes", True))
    alike: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for change in changes:
        alike.setdefault((change["a"], change["b"]), []).append(change)
    for (a, b), group in alike.items():
        names = fold_names(change["name"] for change in group)
        grown = sum(change["bytes"] for change in group)
        table.add(names, a, b, f"{'-' if grown < 0 else '+'}{format_bytes(abs(grown))}")
    if changes:
        page.print(table)
        page.print()
    for name, side in ((args.a, before), (args.b, after)):
        totals = side["totals"]
        bits = totals["bits_per_weight"]
        page.print(f"{name}: {format_bytes(totals['bytes'])} served, {bits:.2f} bits a weight")
    page.print(f"{len(changes)} of {len(after['layers'])} layers differ")
    return 0


def _plan(named: str, args: argparse.Namespace) -> Mapping[str, Any]:
    """A plan as plain data."""
    if is_address(named):
        return _parsed(*ask(named))
    if named.endswith(".json") and Path(named).is_file():
        return _parsed(Path(named).read_text(encoding="utf-8"), named)
    if not args.model and not (named and Path(named).is_dir()):
        what = f"is a preset, and there is no model to plan {named!r} over"
        raise UsageError(Problem("--model", what, "add --model DIR"))
    return plan_as_dict(make_named_plan(args, named))


def _parsed(text: str, where: str) -> Mapping[str, Any]:
    try:
        plan: Mapping[str, Any] = json.loads(text)
        return {"layers": plan["layers"], "totals": plan["totals"]}
    except (ValueError, KeyError, TypeError) as error:
        what = "is not a plan (expected what --mixedprec-plan or mixedprec plan --json writes)"
        raise UsageError(Problem(where, what)) from error


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Layers that are served otherwise, in the order of the second plan."""
    old = {layer["name"]: layer for layer in before["layers"]}
    new = {layer["name"]: layer for layer in after["layers"]}
    changes = []
    for name in {**new, **old}:
        a, b = _served(old.get(name)), _served(new.get(name))
        if a != b:
            grown = new.get(name, {}).get("bytes", 0) - old.get(name, {}).get("bytes", 0)
            changes.append({"name": name, "a": a, "b": b, "bytes": grown})
    return changes


def _served(layer: Mapping[str, Any] | None) -> str:
    """Method and arguments in few words; how it is made differs between a folder and a preset."""
    if layer is None:
        return "(none)"
    said = " ".join(
        f"{key}={json.dumps(value)}"
        for key, value in layer["arguments"].items()
        if key not in ("rounding", "dtype")
    )
    return f"{layer['method']} {said}".strip()
