"""Composite layers inside of SGLang's models, loaded by the models' own `load_weights`."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.cpu.expert_layers import HIDDEN, INTERMEDIATE, process, route
from tests.experts.test_composite import MIXED, MixedConfig, inputs, loaded, make_groups, stored

SIZES = {
    "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "head_dim": 64,
    "num_experts_per_tok": 3,
}  # fmt: skip


class ModelConfig(MixedConfig):
    """The same for a whole model: linear layers stay unquantized."""

    weight_block_size = None

    def update_packed_modules_mapping(self, mapping: dict[str, list[str]]) -> None:
        pass

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        from sglang.srt.layers.linear import LinearBase
        from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
        from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

        if isinstance(layer, FusedMoE):
            return super().get_quant_method(layer, prefix)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def build(family: str, config: ModelConfig) -> tuple[torch.nn.Module, str, tuple[str, str, str]]:
    """A model of one layer, the names of its experts, and of their gate, down and up projection."""
    if family == "mixtral":
        from sglang.srt.models.mixtral import MixtralForCausalLM
        from transformers import MixtralConfig

        model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=8), config)
        return model, "model.layers.0.block_sparse_moe.experts", ("w1", "w2", "w3")
    from sglang.srt.models.qwen3_moe import Qwen3MoeForCausalLM
    from transformers import Qwen3MoeConfig

    sizes = {**SIZES, "moe_intermediate_size": INTERMEDIATE, "num_experts": 8}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes), config)
    return model, "model.layers.0.mlp.experts", ("gate_proj", "down_proj", "up_proj")


@pytest.fixture
def one_stage(expert_layer) -> Iterator[None]:
    """The context of a whole model: one stage of a pipeline, its default dtype."""
    from sglang.srt.runtime_context import get_parallel

    group = SimpleNamespace(
        rank_in_group=0, world_size=1, is_first_rank=True, is_last_rank=True, device_group=None
    )
    ranks = ("pp_rank", "attn_dp_rank", "attn_cp_rank", "moe_dp_rank", "attn_dcp_rank")
    get_parallel().override_permanently(**dict.fromkeys(ranks, 0), pp_group=group)
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_stock_load_weights_fills_every_group(expert_layer, one_stage, family):
    model, prefix, names = build(family, ModelConfig(make_groups(MIXED)))
    (layer,) = (module for module in model.modules() if hasattr(module, "expert_groups"))
    model.load_weights(
        (f"{prefix}.{expert}.{name}.{suffix}", tensor)
        for expert, projections in enumerate(stored(MIXED))
        for shard, name in zip(("w1", "w2", "w3"), names, strict=True)
        for suffix, tensor in projections[shard].items()
    )
    process(layer)
    x, topk = inputs(7), route(7, num_experts=8)
    assert torch.equal(layer(x, topk), loaded(expert_layer, MIXED)(x, topk))
