"""What shipped presets would hold on a GPU, beside what the plan predicts.

The widened demo model, loaded and repacked on fake tensors; tests/gpu/memory.py does it on a GPU.

python -m tests.dryrun.prediction H100 FOLDER
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.dryrun.cards import Card
from tests.dryrun.process import run_on_card

PRESETS = ("attention-fp8-mlp-int4", "awq", "down-proj-finer", "fp8-block", "gptq")


def run_all(card: Card, shared: Path) -> dict[str, Any]:
    """Load each preset; the bytes that were planned and that are held."""
    from demo.model import checkpoint
    from tests.dryrun import attention
    from tests.gpu.card import PRESETS as PRESET_FOLDER

    attention.install()
    model = checkpoint("widened")
    return {name: measure(card, model, PRESET_FOLDER / f"{name}.yaml") for name in PRESETS}


def measure(card: Card, model: Path, preset: Path) -> dict[str, Any]:
    """Return "planned" and "held" bytes."""
    from mixedprec_plugin.cpu.heap import storage_bytes
    from mixedprec_plugin.serving.loader import served_config
    from tests.dryrun import whole
    from tests.dryrun.fake_device import fake_card
    from tests.dryrun.journal import JOURNAL
    from tests.dryrun.rank import rank

    JOURNAL.clear()
    with rank(1), fake_card():
        loaded = whole.load(model, preset, card)
        plan = served_config(loaded).plan
        return {
            "planned": plan.bytes_after,
            "held": storage_bytes(loaded.parameters()),
        }


if __name__ == "__main__":
    run_on_card(run_all)
