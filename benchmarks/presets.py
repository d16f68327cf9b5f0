"""Which shipped presets a model can be served with."""

from __future__ import annotations

from pathlib import Path

from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.preset.load import load_preset

PRESETS = Path(__file__).resolve().parents[1] / "configs" / "presets"


def fitting_presets(model_path: Path) -> list[str]:
    """Names of the shipped presets whose plan for a model has no errors, in order.

    Those for models with experts name layers that a dense model does not have.
    """
    source = open_source(model_path)
    plans = {
        path.stem: resolve_plan(load_preset(path), source, Target(device="cpu"))
        for path in sorted(PRESETS.glob("*.yaml"))
    }
    return [name for name, plan in plans.items() if not plan.errors]
