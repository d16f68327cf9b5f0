"""Whole models with experts, several methods in each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

from tests.dryrun import families, whole
from tests.dryrun.cards import Card
from tests.dryrun.cells import class_name
from tests.dryrun.experts import class_names
from tests.dryrun.whole import WholeModel
from tests.presets import write_preset


def run_family(card: Card, name: str, tp_size: int, folder: Path) -> list[WholeModel]:
    """Run a family in the mixes that a card refuses, and in the one with the most that it runs.

    What a setting of the environment makes run is run without it, and with it.
    """
    mixes = list(families.MIXES)
    hardest = families.hardest(card)
    tried = mixes[: mixes.index(hardest) + 1]
    found = [run_model(card, name, mix, tp_size, folder) for mix in tried]
    if name == "DeepSeek-V3" and card.architecture < 89:
        with mock.patch.dict(os.environ, {families.TRITON_ROUTING: "1"}):
            again = run_model(card, name, hardest, tp_size, folder)
        again.setting = families.TRITON_ROUTING
        found.append(again)
    return found


def run_model(card: Card, name: str, mix: str, tp_size: int, folder: Path) -> WholeModel:
    """Load and run a family in a mix of methods."""
    family = families.FAMILIES[name]
    rules = families.preset_rules(family, mix)
    preset = write_preset(folder / f"{card.title}-{name}-{mix}-{tp_size}", *rules)

    def inspect(model: Any) -> dict[str, list[str]]:
        found = {}
        for layer, given in enumerate(families.MIXES[mix]):
            for module in families.modules(family, layer, given):
                path = f"model.layers.{layer}.{module}"
                built = model.get_submodule(path)
                is_experts = module == family.experts
                found[path] = class_names(built) if is_experts else [class_name(built)]
        return found

    model = families.write(name, folder)
    return whole.run(WholeModel(name, mix, tp_size), card, model, preset, inspect)
