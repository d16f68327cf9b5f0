"""Make plain float32 weights of the third-party checkpoints, by code that is not ours.

    python -m benchmarks.third_party.reference [NAME ...]

Each checkpoint of benchmarks.third_party.make is dequantized in the environment of the tool that
made it, by that tool's own code, to ~/.cache/mixedprec/third-party/NAME-dequantized: what our own
dequantizers, and servers that run the checkpoint, are compared with.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.third_party.environments import run_module
from benchmarks.third_party.make import checkpoints_dir, make
from benchmarks.third_party.recipes import RECIPES, Recipe


def reference(recipe: Recipe) -> Path:
    """Return the folder of a recipe's plain weights, making it where it is missing.

    The folder holds model.safetensors, float32, layers named as in the original, and a config.json
    without `quantization_config`: transformers loads it as it is.

    Raises:
        subprocess.CalledProcessError: the tool failed; its log is kept beside the folder.
    """
    stored = make(recipe)
    folder = checkpoints_dir() / f"{recipe.name}-dequantized"
    if folder.is_dir():
        return folder
    staging = folder.parent / f".{folder.name}"
    log = folder.parent / f"{folder.name}.log"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    arguments = [str(stored), str(staging), json.dumps(dict(recipe.arguments))]
    run_module(recipe.tool, f"dequantize_{recipe.tool.script}", arguments, log)
    config = json.loads((stored / "config.json").read_text(encoding="utf-8"))
    for key in ("quantization_config", "dtype", "torch_dtype"):
        config.pop(key, None)
    config["torch_dtype"] = "float32"
    (staging / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    staging.rename(folder)
    log.unlink()
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Dequantize the checkpoints that are named, all by default; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.third_party.reference")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - RECIPES.keys():
        parser.error(f"no recipe {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    for name in options.names or RECIPES:
        try:
            print(reference(RECIPES[name]), flush=True)
        except subprocess.CalledProcessError as error:
            print(f"error: {name}: {error}; see {checkpoints_dir()}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
