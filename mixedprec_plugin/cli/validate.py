"""`mixedprec validate`: are preset files right in themselves?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TextIO

from mixedprec_plugin.cli.output import print_json
from mixedprec_plugin.errors import PresetError, Problem
from mixedprec_plugin.preset.load import load_preset

EXAMPLES = """
  mixedprec validate mine.yaml presets/*.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="preset files, or names")


def run(args: argparse.Namespace, out: TextIO) -> Sequence[Problem]:
    """Check every file, with its parents; whether a model has the layers, the plan tells."""
    problems: list[Problem] = []
    for file in args.files:
        try:
            preset = load_preset(file)
        except PresetError as error:
            problems += error.problems
            continue
        problems += preset.warnings
        if not args.json:
            count = len(preset.rules)
            print(f"{file}: fine, {count} rule{'s' if count > 1 else ''}", file=out)
    if args.json:
        print_json({"files": args.files, "problems": problems}, out)
    return problems
