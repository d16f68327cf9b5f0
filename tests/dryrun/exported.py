"""Checkpoints that were exported as compressed-tensors, in stock SGLang on a card that is played.

No plugin is loaded: SGLang's own loader (`--load-format auto`) finds the method of every layer in
config.json, fills and repacks it, and a forward pass launches the kernels.

python -m tests.dryrun.exported H100 FOLDER
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

from tests.dryrun.cards import Card
from tests.dryrun.process import run_on_card


def run_export(card: Card, shared: Path) -> dict[str, Any]:
    """Load FOLDER/exported and run it."""
    from tests.dryrun import attention, auto

    attention.install()
    auto.stand_in_for_zero_points()
    return run(card, shared / "exported")


def run(card: Card, exported: Path) -> dict[str, Any]:
    """Load, repack and run a whole model.

    Returns:
        "runs_as": module -> class; "kernels" of a forward pass; "ours": what of this plugin SGLang
        was given: its load format, hooks, and classes of methods.
    """
    from sglang.srt.layers.linear import LinearBase

    from tests.dryrun.fake_device import fake_card
    from tests.dryrun.journal import JOURNAL
    from tests.dryrun.rank import rank

    JOURNAL.clear()
    with rank(1), fake_card():
        model = _load(exported, card)
        runs_as = {
            name: f"{type(module.quant_method).__name__}/{_scheme(module)}"
            for name, module in model.named_modules()
            if isinstance(module, LinearBase)
        }
        JOURNAL.take_kernels()
        _forward(model)
    return {"runs_as": runs_as, "kernels": JOURNAL.take_kernels(), "ours": _ours(model)}


def _ours(model: Any) -> list[str]:
    from sglang.srt.arg_groups.choices import LOAD_FORMAT_CHOICES
    from sglang.srt.plugins.hook_registry import HookRegistry

    methods = {type(getattr(module, "quant_method", None)) for module in model.modules()}
    return [
        *(name for name in LOAD_FORMAT_CHOICES if name == "mixedprec"),
        *(str(hook) for hook in HookRegistry._hooks),
        *(str(method) for method in methods if method.__module__.startswith("mixedprec_plugin")),
    ]


def _scheme(module: Any) -> str:
    return type(getattr(module, "scheme", None)).__name__


def _load(exported: Path, card: Card) -> Any:
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader.loader import DefaultModelLoader, get_model_loader

    from tests.dryrun.cells import check_filled

    repack = DefaultModelLoader.postprocess_weights

    def check_and_repack(model: Any, target_device: Any) -> None:
        check_filled(model)
        repack(model, target_device)

    model_config = ModelConfig(str(exported), dtype=card.dtype)
    loader = get_model_loader(LoadConfig(load_format="auto"), model_config)
    assert type(loader) is DefaultModelLoader
    with mock.patch.object(DefaultModelLoader, "postprocess_weights", check_and_repack):
        return loader.load_model(model_config=model_config, device_config=DeviceConfig("cuda"))


def _forward(model: Any) -> None:
    from tests.dryrun.whole import forward

    forward(model)


if __name__ == "__main__":
    # an allow-list that names none of those installed
    os.environ["SGLANG_PLUGINS"] = "none"
    run_on_card(run_export)
