"""--mixedprec-config and its kin on SGLang's command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from mixedprec_plugin.errors import MixedPrecisionError, Problem, UsageError
from mixedprec_plugin.preset.parents import locate_preset
from mixedprec_plugin.resources import preset_dir
from mixedprec_plugin.serving.settings import KEYS, Settings, split_extra_config

LOAD_FORMAT = "mixedprec"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add our flags to SGLang's server parser."""
    group = parser.add_argument_group("mixed precision (--load-format mixedprec)")
    for field in dataclasses.fields(Settings):
        group.add_argument(_flag(field.name), **field.metadata)


def _flag(field: str) -> str:
    return "--" + KEYS[field].replace("_", "-")


def fold_flags(args: argparse.Namespace) -> argparse.Namespace:
    """Fold our flags into `model_loader_extra_config`, which SGLang carries to every rank.

    ServerArgs is sealed and knows only its own fields, so our flags cannot travel as themselves.

    Raises:
        UsageError: one of our flags without the load format.
    """
    before, rest = split_extra_config(getattr(args, "model_loader_extra_config", None))
    asked = {field: getattr(args, key, None) for field, key in KEYS.items()}
    given: dict[str, Any] = {field: value for field, value in asked.items() if value}
    if getattr(args, "load_format", None) != LOAD_FORMAT:
        if given:
            flags = ", ".join(map(_flag, given))
            raise UsageError(Problem(flags, "needs --load-format mixedprec", "add it", "flags"))
        return args
    for field in given.keys() & {"plan_path", "verify", "inputs"}:
        given[field] = str(Path(given[field]).absolute())
    if "config" in given:
        given["config"] = _absolute(given["config"])
    if "overrides" in given:
        given["overrides"] = tuple(given["overrides"])
    settings = dataclasses.replace(before or Settings(), **given)
    # said now if they are none
    _ = settings.cache_bytes, settings.num_input_tokens
    args.model_loader_extra_config = json.dumps({**rest, **settings.to_extra_config()})
    return args


def _absolute(config: str) -> str:
    """A path that every rank can open wherever it runs; a packaged preset's name as it is."""
    found = locate_preset(config, Path())
    if found is None:
        found = Path(config)
    elif found.parent == preset_dir():
        return config
    return str(found.absolute())


def exit_with(error: MixedPrecisionError) -> None:
    """Print an error as the command line's last word and leave with exit code 1."""
    print(f"mixedprec: {len(error.problems)} error(s)", file=sys.stderr)
    for problem in error.problems:
        print(f"  {problem}", file=sys.stderr)
    raise SystemExit(1)
