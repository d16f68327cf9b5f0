"""All cells of one card, in a process of its own: SGLang decides a lot when it is imported.

python -m tests.dryrun.process "H100" FOLDER
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.dryrun.cards import CARDS, Card
from tests.dryrun.driver import load_stub
from tests.dryrun.methods import METHODS, TP_SIZES, Method


def run_on_card(run: Callable[[Card, Path], Any]) -> None:
    """Play the card of the command line, and write what `run` finds as TITLE.json to its folder."""
    title, folder = sys.argv[1:]
    warnings.simplefilter("ignore")
    card, shared = CARDS[title], Path(folder)
    _boot(card, shared / "libcuda.so.1")
    (shared / f"{title}.json").write_text(json.dumps(run(card, shared), indent=1))


def _boot(card: Card, library: Path) -> None:
    """Play the card, and put every recorder in place, before SGLang is imported."""
    os.environ["SGLANG_JIT_DEEPGEMM_PRECOMPILE"] = "0"
    os.environ["HUMMING_DISABLE_PARALLEL_BUILD"] = "1"
    load_stub(library)
    from tests.dryrun.played_cuda import play

    play(card)
    from tests.dryrun import fake_device, ptx, recorders, stand_ins

    fake_device.install()
    recorders.install()
    ptx.install(card)
    stand_ins.install()
    from sglang.srt.plugins import load_plugins

    load_plugins()


def run(card: Card, shared: Path) -> dict[str, Any]:
    """Run every cell and the whole models.

    What was compiled is counted over all: Triton compiles a kernel once in a process.
    """
    # all that is tried is imported at once: what changes on the disk meanwhile does not mix in
    import mixedprec_plugin.serving.loader  # noqa: F401
    from tests.dryrun import attention, experts, llama, moe_models  # noqa: F401
    from tests.dryrun.journal import JOURNAL

    start = time.perf_counter()
    cells = _linear(card, shared / card.title)
    middle = time.perf_counter()
    expert_cells = experts.run_all(card, shared / f"{card.title}-experts")
    end = time.perf_counter()
    attention.install()
    runs = {cell.method for cell in cells if cell.kind == "column" and cell.runs_as}
    methods = [method for method in METHODS if method.title in runs and method.stored == "bf16"]
    models = _models(card, methods, shared)
    return {
        "cells": [dataclasses.asdict(cell) for cell in cells],
        "experts": [dataclasses.asdict(cell) for cell in expert_cells],
        "models": [dataclasses.asdict(model) for model in models],
        "compiled": dict(JOURNAL.compiled),
        "seconds": {
            "linear": middle - start,
            "experts": end - middle,
            "models": time.perf_counter() - end,
        },
    }


def _linear(card: Card, folder: Path) -> list[Any]:
    from tests.dryrun.cells import run_cell
    from tests.dryrun.layers import KINDS
    from tests.dryrun.stored import FORMATS

    checkpoints = {
        (name, stored): kind.write(folder / f"{name}-{stored}", stored)
        for name, kind in KINDS.items()
        for stored in FORMATS
    }
    cells = [
        run_cell(card, method, name, tp_size, checkpoints[name, method.stored])
        for method in METHODS
        for name in KINDS
        for tp_size in TP_SIZES
    ]
    other = "float16" if card.dtype == "bfloat16" else "bfloat16"
    return cells + [
        run_cell(card, method, "column", 1, checkpoints["column", method.stored], other)
        for method in METHODS
    ]


def _models(card: Card, methods: list[Method], shared: Path) -> list[Any]:
    from tests.dryrun import families, llama, moe_models

    models = [llama.run_model(card, methods, size, shared / "llama") for size in TP_SIZES]
    for name in families.FAMILIES:
        for size in TP_SIZES:
            models += moe_models.run_family(card, name, size, shared)
    return models


if __name__ == "__main__":
    run_on_card(run)
