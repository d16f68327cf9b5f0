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
from mixedprec_plugin.serving.settings import KEYS, PLACES, Settings, split_extra_config

LOAD_FORMAT = "mixedprec"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add our flags to SGLang's server parser."""
    group = parser.add_argument_group("mixed precision (--load-format mixedprec)")
    group.add_argument(
        "--mixedprec-config",
        metavar="PRESET",
        help="YAML preset that names a quantization method for each layer: a path, or the name of "
        "a packaged preset. A checkpoint that mixedprec convert wrote carries its own.",
    )
    group.add_argument(
        "--mixedprec-set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="Override a key of the preset, such as schemes.experts.group_size=64; repeatable.",
    )
    group.add_argument(
        "--mixedprec-plan", metavar="FILE", help="Write the plan to FILE as JSON at start."
    )
    group.add_argument(
        "--mixedprec-verify",
        metavar="DIR",
        help="Compare every composed layer with this checkpoint while loading, and do not serve a "
        "model that is too far from it.",
    )
    group.add_argument(
        "--mixedprec-cache",
        metavar="SIZE",
        help="Keep what is quantized or repacked for the next start, up to SIZE, such as 20GiB; 0 "
        "keeps nothing (default: MIXEDPREC_CACHE_SIZE, or 64GiB; in ~/.cache/mixedprec).",
    )
    group.add_argument(
        "--mixedprec-quantize-on",
        choices=PLACES,
        help="Where weights are quantized while they are loaded: on the CPU (the default), or on "
        "the device that serves them.",
    )
    group.add_argument(
        "--mixedprec-inputs",
        metavar="FOLDER",
        help="Gather what each layer reads of the first prompts, for mixedprec search --inputs. "
        "It slows prefill until there are enough tokens, and prompts can be read out of it.",
    )
    group.add_argument(
        "--mixedprec-inputs-tokens",
        metavar="N",
        help="How many tokens are gathered, an eighth of them of one pass at most (default: 2048).",
    )


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
            flags = ", ".join("--" + KEYS[field].replace("_", "-") for field in given)
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
