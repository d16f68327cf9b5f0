"""Experts behind DeepEP: SGLang's layer for it asks the config of a whole model what they run in.

`DeepEPMoE` (layers/moe/ep_moe/layer.py:63) hands its experts to the runner of their method where
the model's config is an `Fp8Config`, and else to kernels of its own that are there no more. By a
preset the model's config is ours, and the one of the experts' method says the same.
"""

from __future__ import annotations

import torch
from sglang.srt.layers.moe.utils import get_moe_a2a_backend
from sglang.srt.layers.quantization.fp8 import Fp8Config

from mixedprec_plugin.errors import LoadError, Problem


def settle_deepep(model: torch.nn.Module) -> None:
    """Have every layer of experts behind DeepEP run as its method's own config has it.

    Raises:
        LoadError: there is no DeepGEMM here, or the experts are in another method.
    """
    if not get_moe_a2a_backend().is_deepep():
        return
    from sglang.srt.layers import deep_gemm_wrapper
    from sglang.srt.layers.moe.ep_moe.layer import DeepEPMoE

    for name, layer in model.named_modules():
        if not isinstance(layer, DeepEPMoE):
            continue
        config = getattr(layer.quant_method, "quant_config", None)
        what = ""
        if not deep_gemm_wrapper.ENABLE_JIT_DEEPGEMM:
            what = "DeepEP runs FP8 experts in DeepGEMM, which is not here"
        elif not isinstance(config, Fp8Config):
            what = f"{type(layer.quant_method).__name__} does not run behind DeepEP"
        if what:
            remedy = "start without --moe-a2a-backend"
            raise LoadError(Problem(name, what, remedy, "deepep"))
        layer.deprecate_flag = True
