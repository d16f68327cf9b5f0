"""--mixedprec-config and its kin on SGLang's command line."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mixedprec_plugin.errors import MixedPrecisionError, Problem, UsageError
from mixedprec_plugin.serving.settings import Settings, parse_extra_config, split_extra_config

LOAD_FORMAT = "mixedprec"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add our flags to SGLang's server parser."""
    group = parser.add_argument_group("mixed precision (--load-format mixedprec)")
    group.add_argument(
        "--mixedprec-config",
        metavar="PRESET",
        help="YAML preset that names a quantization method for each layer: a path, or the name of "
        "a packaged preset.",
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


def fold_flags(args: argparse.Namespace) -> argparse.Namespace:
    """Fold our flags into `model_loader_extra_config`, which SGLang carries to every rank.

    ServerArgs is sealed and knows only its own fields, so our flags cannot travel as themselves.

    Raises:
        UsageError: the load format without a preset, or a preset without the load format.
    """
    extra = parse_extra_config(getattr(args, "model_loader_extra_config", None))
    settings, rest = split_extra_config(extra)
    config = getattr(args, "mixedprec_config", None)
    overrides = tuple(getattr(args, "mixedprec_set", None) or ())
    plan_path = getattr(args, "mixedprec_plan", None)
    asked = getattr(args, "load_format", None) == LOAD_FORMAT
    if not asked:
        given = [
            flag
            for flag, value in (
                ("--mixedprec-config", config),
                ("--mixedprec-set", overrides),
                ("--mixedprec-plan", plan_path),
            )
            if value
        ]
        if given:
            raise UsageError(
                Problem(", ".join(given), "needs --load-format mixedprec", "add it", "flags")
            )
        return args
    if config:
        settings = Settings(_absolute(config), overrides, _absolute_file(plan_path))
    if settings is None:
        raise UsageError(
            Problem(
                "--load-format mixedprec",
                "needs a preset",
                "add --mixedprec-config PRESET, such as configs/presets/fp8-block.yaml",
                "flags",
            )
        )
    args.model_loader_extra_config = json.dumps({**rest, **settings.to_extra_config()})
    return args


def _absolute(config: str) -> str:
    """A path that every rank can open wherever it runs; a packaged preset's name as it is."""
    path = Path(config)
    is_name = path.suffix == "" and path.name == config and not path.exists()
    return config if is_name else str(path.absolute())


def _absolute_file(path: str | None) -> str:
    return str(Path(path).absolute()) if path else ""


def exit_with(error: MixedPrecisionError) -> None:
    """Print an error as the command line's last word and leave with exit code 1."""
    print(f"mixedprec: {len(error.problems)} error(s)", file=sys.stderr)
    for problem in error.problems:
        print(f"  {problem}", file=sys.stderr)
    raise SystemExit(1)
