"""`mixedprec cache list|clear`: the quantized layers that are kept for the next start."""

from __future__ import annotations

import argparse
from typing import Any, TextIO

from mixedprec_plugin.cli.output import print_json
from mixedprec_plugin.compose.cache import cache_folder, clear, entries
from mixedprec_plugin.plan.render import format_bytes

EXAMPLES = """
  mixedprec cache list
  mixedprec cache clear
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("list", "clear"), help="show what is kept, or delete it")


def run(args: argparse.Namespace, out: TextIO) -> int:
    """List models and schemes with their bytes, or delete everything."""
    folder = cache_folder()
    if args.what == "clear":
        num_bytes = clear(folder)
        if args.json:
            print_json({"folder": folder, "deleted_bytes": num_bytes}, out)
        else:
            print(f"deleted {format_bytes(num_bytes)} in {folder}", file=out)
        return 0
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in entries(folder):
        key = entry.told.get("model", ""), entry.told.get("scheme", "")
        row = rows.setdefault(key, {"entries": 0, "bytes": 0})
        row["entries"] += 1
        row["bytes"] += entry.num_bytes
    if args.json:
        told = [{"model": m, "scheme": s, **row} for (m, s), row in sorted(rows.items())]
        print_json({"folder": folder, "layers": told}, out)
        return 0
    for (model, scheme), row in sorted(rows.items()):
        size = format_bytes(row["bytes"])
        print(f"{size:>12}  {row['entries']:>7} entries  {scheme}  {model}", file=out)
    total = sum(row["bytes"] for row in rows.values())
    print(f"{format_bytes(total):>12}  in {folder}", file=out)
    return 0
