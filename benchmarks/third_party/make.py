"""Quantize the widened SmolLM2-135M-Instruct with other people's tools, on the CPU.

    python -m benchmarks.third_party.make [NAME ...]

Each tool runs in an environment of its own (requirements/TOOL.txt, ~/.cache/mixedprec/envs), and
writes ~/.cache/mixedprec/third-party/NAME. What is there already is kept; remove a folder to make
it again. Nothing is downloaded but packages.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import Distribution
from pathlib import Path

from benchmarks.third_party.environments import python_of, run_module
from benchmarks.third_party.recipes import RECIPES, Recipe
from demo.model import cache_dir, checkpoint

MADE = "made.json"


def checkpoints_dir() -> Path:
    """Return the folder that the checkpoints lie in."""
    return cache_dir() / "third-party"


def make(recipe: Recipe) -> Path:
    """Return the folder of a recipe's checkpoint, making it where it is missing.

    The folder appears only when it is whole; `made.json` in it says how it was made.

    Raises:
        subprocess.CalledProcessError: the tool failed; its log is kept beside the folder.
    """
    folder = checkpoints_dir() / recipe.name
    if folder.is_dir():
        return folder
    python = python_of(recipe.tool)
    staging = folder.parent / f".{recipe.name}"
    log = folder.parent / f"{recipe.name}.log"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    begin = time.perf_counter()
    run_module(
        recipe.tool,
        f"quantize_{recipe.tool.script}",
        [str(checkpoint("widened")), str(staging), json.dumps(dict(recipe.arguments))],
        log,
    )
    seconds = time.perf_counter() - begin
    made = {
        "tool": recipe.tool.name,
        "version": _version(python, recipe.tool.name),
        "arguments": dict(recipe.arguments),
        "seconds": round(seconds),
    }
    (staging / MADE).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    staging.rename(folder)
    log.unlink()
    return folder


def _version(python: Path, name: str) -> str:
    site_packages = [str(path) for path in python.parents[1].glob("lib/python*/site-packages")]
    return next(iter(Distribution.discover(name=name, path=site_packages))).version


def weights_bytes(folder: Path) -> int:
    """Size of a checkpoint's safetensors files in bytes."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the checkpoints that are named, all by default; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.third_party.make")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - RECIPES.keys():
        parser.error(f"no recipe {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    for name in options.names or RECIPES:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            folder = make(RECIPES[name])
        except subprocess.CalledProcessError as error:
            log = checkpoints_dir() / f"{name}.log"
            print(f"error: {name}: {error}; see {log}", file=sys.stderr)
            return 1
        made = json.loads((folder / MADE).read_text(encoding="utf-8"))
        print(
            f"{folder}: {made['tool']} {made['version']}, {made['seconds']} s, "
            f"{weights_bytes(folder) / 2**20:.1f} MiB",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
