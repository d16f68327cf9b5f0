"""The method of a layer of experts: SGLang's own where they share a scheme, else a composite."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

from mixedprec_plugin.errors import LoadError, Problem
from mixedprec_plugin.experts.composite import CompositeMoEMethod
from mixedprec_plugin.experts.groups import ExpertGroup, check_groups
from mixedprec_plugin.methods.construct import repaired


def experts_method(
    layer: FusedMoE, prefix: str, groups: Sequence[ExpertGroup]
) -> FusedMoEMethodBase | None:
    """Choose the method of a layer of experts while SGLang builds it.

    Args:
        layer: the layer that SGLang is building.
        prefix: its name.
        groups: one for each scheme; together they hold every expert once.
    Returns:
        for one group what its config gives, repaired where its method knows a cure, None where it
        is unquantized; for several a composite.
    Raises:
        LoadError: the groups do not hold every expert once, or SGLang would leave a quantized
            group unquantized.
    """
    check_groups(prefix, groups, layer.num_experts)
    groups = [dataclasses.replace(g, config=repaired(g.config, [g.method])) for g in groups]
    if len(groups) > 1:
        return CompositeMoEMethod(groups)
    config = groups[0].config
    if config is None:
        return None
    method: FusedMoEMethodBase | None = config.get_quant_method(layer, prefix)
    if method is None or isinstance(method, UnquantizedFusedMoEMethod):
        what = f"SGLang would leave the experts unquantized, not in {groups[0].label}"
        raise LoadError(Problem(prefix, what, rule="left-unquantized"))
    return method
