"""A whole Llama with another method in every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.dryrun import whole
from tests.dryrun.cards import Card
from tests.dryrun.cells import class_name
from tests.dryrun.methods import METHODS, Method
from tests.dryrun.whole import WholeModel
from tests.presets import write_preset

_PROJECTIONS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


def run_model(card: Card, methods: list[Method], tp_size: int, folder: Path) -> WholeModel:
    """Load and run a Llama whose layer i runs in method i, of those that are given.

    Returns:
        `runs_as` by the methods' titles, each with the classes of its layer's four modules.
    """
    rules = [
        f'match: "model.layers.{index}.*_proj", {method.rule}'
        for index, method in enumerate(METHODS)
        if method in methods
    ]
    preset = write_preset(folder.parent / f"{card.title}-{tp_size}", *rules)

    def inspect(model: Any) -> dict[str, list[str]]:
        found = {}
        for index, method in enumerate(METHODS):
            if method in methods:
                layer = model.model.layers[index]
                modules = [layer.get_submodule(name) for name in _PROJECTIONS]
                found[method.title] = [class_name(module) for module in modules]
        return found

    made = WholeModel("Llama", "a method a layer", tp_size)
    return whole.run(made, card, folder, preset, inspect)
