"""All cells of one card, in a process of its own: SGLang decides a lot when it is imported.

python -m tests.dryrun.process "H100" LIBCUDA CHECKPOINTS OUT.json
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import warnings
from pathlib import Path

from tests.dryrun.cards import CARDS, Card
from tests.dryrun.driver import load_stub
from tests.dryrun.methods import METHODS, TP_SIZES


def boot(card: Card, library: Path) -> None:
    """Play the card, and put every recorder in place, before SGLang is imported."""
    os.environ["SGLANG_JIT_DEEPGEMM_PRECOMPILE"] = "0"
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


def main(title: str, folder: str) -> None:
    """Run every cell and the whole model, and write what became of them."""
    warnings.simplefilter("ignore")
    card, shared = CARDS[title], Path(folder)
    boot(card, shared / "libcuda.so.1")
    from tests.dryrun import llama
    from tests.dryrun.cells import run_cell
    from tests.dryrun.journal import JOURNAL
    from tests.dryrun.layers import KINDS
    from tests.dryrun.stored import FORMATS

    own = shared / title
    checkpoints = {
        (name, stored): kind.write(own / f"{name}-{stored}", stored)
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
    cells += [
        run_cell(card, method, "column", 1, checkpoints["column", method.stored], other)
        for method in METHODS
    ]
    compiled = dict(JOURNAL.compiled)
    llama.record_norms_and_attention()
    runs = {cell.method for cell in cells if cell.kind == "column" and cell.runs_as}
    methods = [method for method in METHODS if method.title in runs and method.stored == "bf16"]
    models = [llama.run_model(card, methods, size, shared / "llama") for size in TP_SIZES]
    result = {
        "cells": [dataclasses.asdict(cell) for cell in cells],
        "models": [dataclasses.asdict(model) for model in models],
        "compiled": compiled,
    }
    (shared / f"{title}.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
