"""The method of a layer of experts that runs as its source stores it, by SGLang's own class."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase, QuantizationConfig
from sglang.srt.layers.quantization.compressed_tensors.schemes import CompressedTensorsWNA16MoE
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

from mixedprec_plugin.errors import LoadError, Problem
from mixedprec_plugin.methods.construct import repaired
from mixedprec_plugin.methods.registry import METHODS


def experts_method_under_auto(
    config: QuantizationConfig, layer: FusedMoE, prefix: str
) -> FusedMoEMethodBase:
    """Choose the method of experts while SGLang builds their layer.

    What SGLang's classes would compute wrongly of them the plan has refused, and it has made sure
    that all experts are alike.

    Args:
        config: SGLang's, of the source's `quantization_config`.
        layer: the layer that SGLang is building.
        prefix: its name.
    Returns:
        SGLang's method, its parameters repaired while they are created.
    Raises:
        LoadError: SGLang would leave the experts unquantized.
    """
    method = _method_of(config, layer, prefix)
    if method is None or isinstance(method, UnquantizedFusedMoEMethod):
        text = f"SGLang ({type(config).__name__}) would leave it unquantized, not as it is stored"
        raise LoadError(Problem(prefix, text, rule="left-unquantized"))
    assert isinstance(method, FusedMoEMethodBase)
    scheme = getattr(layer, "scheme", None)
    if isinstance(scheme, CompressedTensorsWNA16MoE):
        _repair_while_created(method, scheme)
    return method


def _method_of(config: QuantizationConfig, layer: FusedMoE, prefix: str) -> Any:
    """What a config gives, of the repaired config of its kind if there is one.

    auto-round's makes GPTQ's and AWQ's configs as it is asked (auto_round.py:400, 537).
    """
    method = repaired(config, METHODS).get_quant_method(layer, prefix)
    own: Any = getattr(method, "quant_config", None)
    cured: Any = own and repaired(own, METHODS)
    if cured is not own:
        layer.scheme = None
        method = cured.get_quant_method(layer, prefix)
    return method


def _repair_while_created(method: FusedMoEMethodBase, scheme: CompressedTensorsWNA16MoE) -> None:
    """Empty the indices that no checkpoint holds once they are created: they look unfilled.

    Where there is no act order SGLang empties the group's, too, and those that sort them it
    computes (`process_weights_after_loading`, compressed_tensors_wNa16_moe.py:310).
    """
    names = ["w13_g_idx_sort_indices", "w2_g_idx_sort_indices"]
    if scheme.actorder != "group":
        names += ["w13_weight_g_idx", "w2_weight_g_idx"]
    create: Any = method.create_weights

    def create_weights(layer: torch.nn.Module, *args: Any, **keywords: Any) -> None:
        create(layer, *args, **keywords)
        for name in names:
            parameter = getattr(layer, name)
            parameter.data = parameter.data[:, :0].clone()

    setattr(method, create_weights.__name__, create_weights)
