"""gpt-oss with its experts as they are stored, and attention in several methods.

python -m tests.dryrun.gpt_oss "H100" FOLDER
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.dryrun.cards import Card
from tests.dryrun.process import run_on_card

TP_SIZES = (1, 2)
_AWQ, _FP8 = (
    f'match: "*.layers.{layer}.self_attn.*", method: {method}'
    for layer, method in enumerate(("awq, group_size: 64", "fp8"))
)
MIXES: Mapping[str, tuple[str, ...]] = {
    "mxfp4": ('match: "*.experts.*", method: mxfp4', _AWQ, _FP8),
    "auto": ('match: "*.experts.*", method: auto', _AWQ, _FP8),
    "bf16": ('match: "*.experts.*", method: bf16', _AWQ, _FP8),
    "several": (
        'match: "*.experts.*", method: mxfp4',
        'match: "*.experts.{0,3}.*", method: bf16',
        _AWQ,
        _FP8,
    ),
}


def run_all(card: Card, folder: Path) -> list[dict[str, Any]]:
    """Load and run the model in every mix."""
    from mixedprec_plugin.serving.hooks import asked_for
    from tests.checkpoints import write_gpt_oss
    from tests.dryrun import attention, whole
    from tests.presets import write_preset

    attention.install()
    # gpt-oss's 2880 are a multiple of Marlin's 64, and two ranks' inner features are not
    sizes = {"hidden_size": 320, "intermediate_size": 320, "num_attention_heads": 8}
    model = write_gpt_oss(folder / "gpt_oss", **sizes)
    found = []
    for mix, rules in MIXES.items():
        preset = write_preset(folder / mix, *rules)
        for tp_size in TP_SIZES:
            made = whole.WholeModel("gpt-oss", mix, tp_size)
            with asked_for():
                found.append(vars(whole.run(made, card, model, preset, _inspect)))
    return found


def _inspect(model: Any) -> dict[str, list[str]]:
    from tests.dryrun.cells import class_name
    from tests.dryrun.experts import class_names

    found = {}
    for layer in range(2):
        block = f"model.layers.{layer}"
        for module in ("self_attn.qkv_proj", "self_attn.o_proj"):
            found[f"{block}.{module}"] = [class_name(model.get_submodule(f"{block}.{module}"))]
        experts = model.get_submodule(f"{block}.mlp.experts")
        found[f"{block}.mlp.experts"] = class_names(experts)
    return found


if __name__ == "__main__":
    run_on_card(run_all)
