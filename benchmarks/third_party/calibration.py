"""What every tool's script shares: its command line and the text it calibrates on.

Imports neither torch nor the package, so that it runs in each tool's own environment.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PROSE = Path(__file__).resolve().parents[1] / "data" / "prose.txt"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read `MODEL OUT ARGUMENTS`: two folders, and the recipe's arguments as a dict."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path, help="checkpoint to read")
    parser.add_argument("out", type=Path, help="folder to write, which exists and is empty")
    parser.add_argument("arguments", type=json.loads, help="JSON")
    return parser.parse_args(arguments)


def windows_of(tokenizer: Any, arguments: Mapping[str, Any]) -> list[list[int]]:
    """What a recipe calibrates on: windows of token ids.

    Args:
        arguments: "text", a JSON file of them, or "windows" and "tokens" for prose.
    """
    if "text" not in arguments:
        return calibration_windows(tokenizer, arguments["windows"], arguments["tokens"])
    windows: list[list[int]] = json.loads(Path(arguments["text"]).read_text(encoding="utf-8"))
    return windows


def calibration_windows(tokenizer: Any, num_windows: int, num_tokens: int) -> list[list[int]]:
    """Cut the prose in benchmarks/data into windows that begin at even distances.

    Args:
        tokenizer: a transformers tokenizer.
        num_windows: how many; more than fit side by side overlap.
        num_tokens: tokens of each.
    Returns:
        `num_windows` lists of `num_tokens` token ids.
    Raises:
        ValueError: the prose is shorter than one window.
    """
    tokens = tokenizer(PROSE.read_text(encoding="utf-8"))["input_ids"]
    last = len(tokens) - num_tokens
    if last < 0:
        raise ValueError(f"{PROSE.name}: {len(tokens)} tokens (expected {num_tokens} or more)")
    starts = [round(i * last / max(num_windows - 1, 1)) for i in range(num_windows)]
    return [tokens[start : start + num_tokens] for start in starts]
