"""The method of a layer of experts that runs as its source stores it, by SGLang's own class."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization.awq.awq import AWQMoEMethod
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase, QuantizationConfig
from sglang.srt.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsWNA16MoE,
    CompressedTensorsWNA16TritonMoE,
)
from sglang.srt.layers.quantization.gptq.gptq import GPTQMarlinConfig, GPTQMarlinMoEMethod
from sglang.srt.layers.quantization.marlin_utils import check_moe_marlin_supports_layer
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

from mixedprec_plugin.errors import LoadError, Problem
from mixedprec_plugin.methods.construct import repaired
from mixedprec_plugin.methods.registry import METHODS
from mixedprec_plugin.plan.model import PlannedLayer

_REMEDY = "name a method for the experts, or take them from another source"


def experts_method_under_auto(
    config: QuantizationConfig, layer: FusedMoE, prefix: str, planned: PlannedLayer
) -> FusedMoEMethodBase:
    """Choose the method of experts while SGLang builds their layer.

    Args:
        config: SGLang's, of the source's `quantization_config`.
        layer: the layer that SGLang is building.
        prefix: its name.
        planned: one of its experts; the plan has made sure that all are alike.
    Returns:
        SGLang's method, its parameters repaired while they are created.
    Raises:
        LoadError: SGLang would leave the experts unquantized, or compute them wrongly.
    """
    method = _method_of(config, layer, prefix)
    if method is None or isinstance(method, UnquantizedFusedMoEMethod):
        text = f"SGLang ({type(config).__name__}) would leave it unquantized, not as it is stored"
        raise LoadError(Problem(prefix, text, rule="left-unquantized"))
    assert isinstance(method, FusedMoEMethodBase)
    scheme = getattr(layer, "scheme", None)
    faults: list[str] = []
    if isinstance(method, GPTQMarlinMoEMethod):
        faults = _gptq_faults(layer, method.quant_config, planned)
    elif isinstance(scheme, CompressedTensorsWNA16MoE):
        faults = _integer_faults(layer, scheme)
        _repair_while_created(method, scheme)
    if faults:
        raise LoadError(Problem(prefix, text, _REMEDY, "auto-experts") for text in faults)
    return method


def _method_of(config: QuantizationConfig, layer: FusedMoE, prefix: str) -> Any:
    """What a config gives, of the repaired config of its kind if it has a method of Marlin's.

    auto-round's makes GPTQ's and AWQ's configs as it is asked (auto_round.py:400, 537).
    """
    method = config.get_quant_method(layer, prefix)
    if not isinstance(method, GPTQMarlinMoEMethod | AWQMoEMethod):
        return method
    cured = repaired(method.quant_config, METHODS)
    if cured is not method.quant_config:
        layer.scheme = None
        method = cured.get_quant_method(layer, prefix)
    return method


def _gptq_faults(layer: FusedMoE, config: GPTQMarlinConfig, planned: PlannedLayer) -> list[str]:
    """What GPTQ's class does not ask for experts: `dynamic` (gptq.py:447), and their shape."""
    assert planned.stored is not None
    faults = _marlin_faults(layer, config.group_size)
    asked = {"bits": config.weight_bits, "group_size": config.group_size}
    if config.group_size != -1:
        # one group has no order
        asked["desc_act"] = config.desc_act
    for key, value in asked.items():
        said = planned.stored.said.get(key, value)
        if said != value:
            faults.append(
                f"config.json's dynamic says {key} {said} of its experts, and SGLang does not ask "
                f"it for experts: it would run them with {key} {value}"
            )
    return faults


def _integer_faults(layer: FusedMoE, scheme: CompressedTensorsWNA16MoE) -> list[str]:
    """What compressed-tensors' class for experts in integers takes and computes wrongly.

    Source: SGLang 0.5.23. Zero points are stored packed along N, [N / 8, K / G], and are neither
    turned (moe/fused_moe_triton/layer.py:1365) nor told from AWQ's, which are interleaved
    (compressed_tensors_wNa16_moe.py:387). With act order a rank has the scales of all groups, of
    which the loader fills its share (:148; layer.py:948).
    """
    faults = []
    if not scheme.sym:
        faults.append("SGLang reads the zero points of such experts as if they were AWQ's")
    if scheme.actorder and layer.moe_tp_size > 1:
        faults.append(
            f"SGLang gives each of {layer.moe_tp_size} ranks a part of the scales, of which act "
            "order (actorder) needs all"
        )
    if not isinstance(scheme, CompressedTensorsWNA16TritonMoE):
        group_size = -1 if scheme.strategy == "channel" else scheme.group_size
        faults += _marlin_faults(layer, group_size)
        if group_size == layer.hidden_size:
            # it takes the repacked gate and up codes' width for K (:370), see `ScalesInOrder`
            faults.append(f"SGLang turns the scales of one group of {group_size} inputs")
    return faults


def _marlin_faults(layer: FusedMoE, group_size: int) -> list[str]:
    """What Marlin's kernels do not take; SGLang asks for AWQ's experts alone (awq.py:383)."""
    if check_moe_marlin_supports_layer(layer, group_size):
        return []
    inner = layer.intermediate_size_per_partition
    return [
        f"Marlin does not run experts of {layer.hidden_size} and, on a rank, {inner} features in "
        f"groups of {group_size} (expected a multiple of 128, and one of the group and of 64)"
    ]


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
