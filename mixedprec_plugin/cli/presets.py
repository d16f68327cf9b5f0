"""`mixedprec presets`: the presets that ship, with what they are for."""

from __future__ import annotations

import argparse
from typing import TextIO

from mixedprec_plugin.cli.output import print_json
from mixedprec_plugin.preset.load import load_preset
from mixedprec_plugin.resources import preset_dir

EXAMPLES = """
  mixedprec presets
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments: none."""


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Print a line for each packaged preset, then where they lie."""
    files = sorted(preset_dir().glob("*.yaml"))
    if args.json:
        found = {file.stem: load_preset(file).description for file in files}
        print_json({"folder": preset_dir(), "presets": found}, out)
        return 0
    width = max((len(file.stem) for file in files), default=0)
    for file in files:
        print(f"{file.stem:{width}}  {load_preset(file).description}", file=out)
    print(f"\nin {preset_dir()}", file=out)
    return 0
