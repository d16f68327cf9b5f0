"""SGLang's own faults that only show in CUDA mode, shown on SGLang's own configs."""

from __future__ import annotations

import traceback
from typing import Any

from tests.dryrun.fake_device import fake_card
from tests.dryrun.layers import KINDS
from tests.dryrun.rank import rank


def run() -> dict[str, str]:
    """Return what becomes of each: the traceback, or empty if nothing was raised."""
    from sglang.srt.layers.quantization.awq.awq import AWQConfig, AWQMarlinConfig
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
        "AWQ experts, plain": _experts(AWQConfig(4, 128, True)),
        "AWQ absorbed": _absorb_awq(),
        "DeepSeek's routing": _route(),
        "AWQ, new weights": _reload(AWQMarlinConfig(4, 128, True, False, None, full_config)),
        "GPTQ, new weights": _reload(GPTQMarlinConfig(4, 128, False, True, False, {}, {})),
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


def _experts(config: Any) -> str:
    """What runs a layer of experts under a config."""
    from tests.dryrun.experts import build

    with rank(1), fake_card():
        return type(build(config, 1024).layer.quant_method).__name__


def _absorb_awq() -> str:
    """Ask for what DeepSeek's `kv_b_proj` is dequantized with."""
    from sglang.srt.models.deepseek_common.utils import awq_dequantize_func

    try:
        awq_dequantize_func()
    # whatever SGLang raises is the result
    except Exception:  # noqa: BLE001
        return traceback.format_exc()
    return ""


def _route() -> str:
    """Route tokens as DeepSeek-V3 does: 256 experts in 8 groups, 8 experts of 4 groups a token."""
    import torch
    from sglang.srt.layers.moe.topk import biased_grouped_topk_gpu

    with rank(1), fake_card():
        hidden, logits = torch.empty(5, 7168), torch.empty(5, 256, dtype=torch.float32)
        bias = torch.empty(256, dtype=torch.float32)
        try:
            biased_grouped_topk_gpu(hidden, logits, bias, 8, True, 8, 4)
        # whatever SGLang or FlashInfer raise is the result
        except Exception:  # noqa: BLE001
            return traceback.format_exc()
    return ""


def _reload(config: Any) -> str:
    """What new weights would find of a layer that Marlin repacked."""
    with rank(1), fake_card():
        layer: Any = KINDS["row"].build(config, KINDS["row"].module)
        layer.quant_method.process_weights_after_loading(layer)
        restore = getattr(layer.quant_method, "restore_weights_before_loading", None)
        if restore is not None:
            restore(layer)
        return "" if hasattr(layer.qweight, "weight_loader") else "qweight has no weight_loader"
