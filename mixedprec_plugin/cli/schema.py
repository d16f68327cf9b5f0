"""`mixedprec schema`: the JSON Schema of presets, with the methods that are installed."""

from __future__ import annotations

import argparse
import json
import os
from typing import TextIO

from mixedprec_plugin.cli.output import print_json
from mixedprec_plugin.methods.registry import METHODS
from mixedprec_plugin.preset.schema import PRESET_SCHEMA, preset_schema
from mixedprec_plugin.resources import schema_path

EXAMPLES = """
  mixedprec schema > preset.schema.json
  mixedprec schema --path                  the file that ships, for an editor's settings
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--path", action="store_true", help="print where the schema's file lies")


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Print the schema."""
    if args.path:
        path = os.path.abspath(schema_path(PRESET_SCHEMA))
        print(json.dumps(path) if args.json else path, file=out)
    else:
        print_json(preset_schema(METHODS.values()), out)
    return 0
