"""SGLang's own faults that only show in CUDA mode, shown on SGLang's own configs."""

from __future__ import annotations

import traceback
from typing import Any

from tests.dryrun.fake_device import fake_card
from tests.dryrun.layers import KINDS
from tests.dryrun.rank import rank


def run() -> dict[str, str]:
    """Return what becomes of each: the traceback, or empty if nothing was raised."""
    from sglang.srt.layers.quantization.awq.awq import AWQMarlinConfig
    from sglang.srt.layers.quantization.fp8 import Fp8Config
    from sglang.srt.layers.quantization.gptq.gptq import GPTQMarlinConfig

    full_config = {"bits": 4, "group_size": 128, "zero_point": True, "quant_method": "awq"}
    return {
        "FP8 in Marlin, ragged": _finish("ragged", 1, Fp8Config(True, "dynamic")),
        "GPTQ in Marlin, ragged": _finish(
            "ragged", 1, GPTQMarlinConfig(4, 128, False, True, False, {}, {})
        ),
        "AWQ, its share too narrow": _finish(
            "narrow", 8, AWQMarlinConfig(4, 128, True, False, None, full_config)
        ),
        "AWQ, too narrow as a whole": _finish(
            "ragged", 1, AWQMarlinConfig(4, 128, True, False, None, full_config)
        ),
    }


def _finish(kind: str, tp_size: int, config: Any) -> str:
    """Build a layer and repack what it was created with."""
    with rank(tp_size), fake_card():
        try:
            layer: Any = KINDS[kind].build(config, KINDS[kind].module)
            layer.quant_method.process_weights_after_loading(layer)
        # whatever SGLang raises is the result
        except Exception:  # noqa: BLE001
            return traceback.format_exc()
    return ""
