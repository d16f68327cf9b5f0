"""`mixedprec methods`: the quantization methods, their arguments, what they store and run on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any, TextIO

from mixedprec_plugin.cli.output import print_json
from mixedprec_plugin.errors import Problem, UsageError
from mixedprec_plugin.methods.cards import CAPABILITIES, Gpu, version
from mixedprec_plugin.methods.interface import LayerShape, Method, Target
from mixedprec_plugin.methods.registry import METHODS, suggest_method
from mixedprec_plugin.methods.remedies import find_faults
from mixedprec_plugin.names import ranges_of
from mixedprec_plugin.plan.tables import Page, Table

EXAMPLES = """
  mixedprec methods
  mixedprec methods awq
"""
# of the layer that bits and cards are told for: every size that a method asks for divides it
_SIZE = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="one, in full")


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Print all methods, or one."""
    found = [method for method in METHODS.values() if args.name in ("", *method.names)]
    if not found:
        what = f"unknown method {args.name!r} (expected {', '.join(METHODS)})"
        raise UsageError(Problem("", what, suggest_method(args.name), "unknown-method"))
    page = Page(out)
    if args.json:
        print_json([_as_dict(method) for method in found], out)
    elif args.name:
        _print(found[0], page)
    else:
        table = Table(
            ("method", False), ("bits", True), ("GPUs", False), ("what it is", False),
            ("also called", False), dropped=("also called",),
        )  # fmt: skip
        for method in found:
            bits = bits_of(method)
            table.add(
                method.name, f"{bits:.2f}" if bits else "", _ranges(cards_of(method)),
                method.title, ", ".join(method.aliases),
            )  # fmt: skip
        page.print(table)
        page.print("\nBits count scales; GPUs are compute capabilities. All of them run on a CPU.")
        page.print("mixedprec methods NAME has arguments and stored tensors.")
    return 0


def bits_of(method: Method) -> float:
    """Stored bits a weight by default, scales counted; 0 where it stores none of its own."""
    stored = method.stored(method.defaults, _SIZE, _SIZE, "BF16")
    return 8 * sum(spec.num_bytes for spec in stored.values()) / _SIZE**2


def cards_of(method: Method) -> list[int]:
    """Compute capabilities of the GPUs that run its linear layers, as major * 10 + minor."""

    def runs(capability: int) -> bool:
        dtype = "BF16" if capability >= 80 else "F16"
        target = Target("cuda", 1, dtype, Gpu("", capability))
        shape = LayerShape(_SIZE, _SIZE, (_SIZE,), "column", dtype=dtype)
        return not find_faults(method.name, method.defaults, shape, target)

    return [capability for capability in CAPABILITIES if runs(capability)]


def _ranges(capabilities: list[int]) -> str:
    """`7.5-9.0, 12.0`: runs of the capabilities that there are."""
    runs = ranges_of(map(CAPABILITIES.index, capabilities))
    ends = [dict.fromkeys(version(CAPABILITIES[index]) for index in run) for run in runs]
    return ", ".join("-".join(pair) for pair in ends)


def _arguments(schema: Mapping[str, Any]) -> str:
    values = schema.get("enum")
    choices = f"; one of {', '.join(map(_written, values))}" if values else ""
    return f"default {_written(schema['default'])}{choices}"


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _print(method: Method, page: Page) -> None:
    page.print(f"{method.name}: {method.title}", "bold")
    page.print(method.description)
    if method.aliases:
        page.print("\nalso called")
    for alias, implied in method.aliases.items():
        said = ", ".join(f"{key}: {_written(value)}" for key, value in implied.items())
        page.print(f"  {alias}{f'  ({said})' if said else ''}")
    page.print("\narguments" if method.schema else "\nno arguments")
    for name, schema in method.schema.items():
        page.print(f"  {name}  {_arguments(schema)}")
        page.print(f"      {schema['description']}")
    stored = method.stored(method.defaults, _SIZE, _SIZE, "BF16")
    if stored:
        page.print(f"\nstores of a weight [{_SIZE}, {_SIZE}], {bits_of(method):.2f} bits a weight")
    for suffix, spec in stored.items():
        page.print(f"  {suffix}  {spec.dtype} {list(spec.shape)}")
    page.print(f"\nruns on GPUs of compute capability {_ranges(cards_of(method))}, and on a CPU")


def _as_dict(method: Method) -> dict[str, Any]:
    stored = method.stored(method.defaults, _SIZE, _SIZE, "BF16")
    return {
        "name": method.name,
        "title": method.title,
        "description": method.description,
        "aliases": {alias: dict(implied) for alias, implied in method.aliases.items()},
        "arguments": dict(method.schema),
        "bits_per_weight": round(bits_of(method), 4),
        "stored": {suffix: spec.dtype for suffix, spec in stored.items()},
        "capabilities": [version(capability) for capability in cards_of(method)],
    }
