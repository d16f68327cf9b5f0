"""`mixedprec presets`: the presets that ship, and what becomes of one."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TextIO

import yaml

from mixedprec_plugin.cli.output import print_json, write_new
from mixedprec_plugin.cli.planning import add_override_argument
from mixedprec_plugin.errors import Problem, UsageError
from mixedprec_plugin.plan.tables import Page, Table
from mixedprec_plugin.preset.load import load_preset
from mixedprec_plugin.preset.parents import locate_preset
from mixedprec_plugin.preset.schema import PRESET_SCHEMA
from mixedprec_plugin.resources import preset_dir, schema_path

EXAMPLES = """
  mixedprec presets                        list those that ship
  mixedprec presets show mine.yaml         parents and overrides merged, interpolations resolved
  mixedprec presets copy awq               write ./awq.yaml, which editors check as you type
"""
_MODELINE = "# yaml-language-server: $schema="


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action", nargs="?", choices=("list", "show", "copy"), default="list", metavar="ACTION",
        help="list, show NAME or copy NAME [FILE]",
    )  # fmt: skip
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="a name or a file")
    parser.add_argument("file", nargs="?", default="", metavar="FILE", help="the copy's")
    add_override_argument(parser)


def run(args: argparse.Namespace, out: TextIO) -> int:
    """List, show or copy."""
    sets = [f"--set {override}" for override in args.overrides]
    unread = {"list": [args.name, *sets], "show": [args.file], "copy": sets}[args.action]
    if found := " ".join(filter(None, unread)):
        raise UsageError(Problem(args.action, f"does not read {found!r}", "leave it out"))
    if args.action == "list":
        _list(args, out)
        return 0
    if not args.name:
        raise UsageError(Problem(args.action, "names no preset", "mixedprec presets lists some"))
    preset = load_preset(args.name, args.overrides)
    if args.action == "copy":
        path = _copy(args.name, Path(args.file or f"{Path(args.name).stem}.yaml"))
        if args.json:
            print_json({"file": path}, out)
        else:
            print(f"{path}: edit it, and plan with --preset {path}", file=out)
    elif args.json:
        print_json(preset.resolved, out)
    else:
        print(f"# {' + '.join(preset.files)}", file=out)
        print(yaml.safe_dump(dict(preset.resolved), sort_keys=False, width=100), end="", file=out)
    return 0


def _list(args: argparse.Namespace, out: TextIO) -> None:
    found = {file.stem: load_preset(file) for file in sorted(preset_dir().glob("*.yaml"))}
    if args.json:
        shown = {name: preset.description for name, preset in found.items()}
        print_json({"folder": preset_dir(), "presets": shown}, out)
        return
    table = Table(("preset", False), ("what it does", False))
    for name, preset in found.items():
        table.add(name, preset.description)
    page = Page(out)
    page.print(table)
    page.print(f"\nin {preset_dir()}; mixedprec presets copy NAME writes one to edit")


def _copy(name: str, path: Path) -> Path:
    """Write a preset's text with the line by which editors find its schema."""
    source = locate_preset(name, Path())
    assert source is not None  # it was loaded
    text = source.read_text(encoding="utf-8")
    first, _, rest = text.partition("\n")
    write_new(path, with_modeline(rest if first.startswith(_MODELINE) else text))
    return path


def with_modeline(text: str) -> str:
    """A preset's text under the line by which editors find its schema."""
    return f"{_MODELINE}{os.path.abspath(schema_path(PRESET_SCHEMA))}\n{text}"
