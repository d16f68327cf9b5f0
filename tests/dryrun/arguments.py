"""What SGLang makes of a server's arguments for models with experts, on a card that is played.

python -m tests.dryrun.arguments B200 FOLDER
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.dryrun.cards import Card
from tests.dryrun.process import run_on_card

_STORED = {
    "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]
}  # fmt: skip
UNQUANTIZED = ('match: "*", method: unquantized',)
# title -> what a preset says; None: SGLang by itself
CASES = {
    "SGLang by itself": None,
    "unquantized": UNQUANTIZED,
    "fp8": (*UNQUANTIZED, 'match: "*.experts.*", method: fp8'),
    "gptq": (*UNQUANTIZED, 'match: "*.experts.*", method: gptq_int4'),
    "awq": (*UNQUANTIZED, 'match: "*.experts.*", method: awq'),
    "int8": (*UNQUANTIZED, 'match: "*.experts.*", method: blockwise_int8'),
    "several": (*UNQUANTIZED, 'match: "*.experts.0.*", method: fp8'),
}


def run_all(card: Card, shared: Path) -> dict[str, Any]:
    """Resolve the arguments of each case."""
    from tests.dryrun import families

    found: dict[str, dict[str, Any]] = {}
    for name in ("Qwen3-MoE", "DeepSeek-V3"):
        model = families.write(name, shared)
        stored = _with_quantization(model, shared / f"{model.name}-fp8")
        for case, rules in CASES.items():
            found[f"{name}, {case}"] = resolve(model, rules, shared / "preset")
        # what its config.json says of the whole model, the preset does not
        found[f"{name} in FP8, gptq"] = resolve(stored, CASES["gptq"], shared / "preset")
    return found


def _with_quantization(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": _STORED}))
    return folder


def resolve(model: Path, rules: tuple[str, ...] | None, folder: Path) -> dict[str, Any]:
    """Return the backend of experts, and the quantization of the whole model."""
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import ServerArgs

    from tests.presets import write_preset

    asked: dict[str, Any] = {}
    if rules is not None:
        settings = {"mixedprec_config": str(write_preset(folder, *rules))}
        asked = {
            "load_format": "mixedprec", "model_loader_extra_config": json.dumps(settings)
        }  # fmt: skip
    args = ServerArgs(model_path=str(model), device="cuda", skip_tokenizer_init=True, **asked)
    args.resolve_once()
    return {
        "moe_runner_backend": resolving_view(args).moe_runner_backend,
        "quantization": ModelConfig.from_server_args(args).quantization,
    }


if __name__ == "__main__":
    run_on_card(run_all)
