"""SGLang's own faults with experts, shown as in `test_sglang_faults`."""

from __future__ import annotations

import ast
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.serving.stock import gptq_marlin, parsed

pytestmark = pytest.mark.usefixtures("sglang_context")


def gptq_experts(desc_act: bool = False) -> Any:
    """Parameters of SGLang's GPTQ experts on one of two ranks: 512 inputs, 1024 inner features."""
    from sglang.srt.layers.quantization.gptq.schemes import GPTQMarlinMoEScheme

    made: Any = torch.nn.Module()
    made.moe_tp_size = 2
    scheme = GPTQMarlinMoEScheme(gptq_marlin(desc_act))
    scheme.create_weights(made, 4, 512, 512, torch.bfloat16)
    return made


@pytest.mark.usefixtures("played_gpu")
def test_gptq_experts_have_float16_scales_in_a_bfloat16_model() -> None:
    """gptq/schemes/gptq_moe.py:239, 247; fused_marlin_moe.py:233 asserts the model's dtype."""
    made = gptq_experts()
    assert {made.w13_scales.dtype, made.w2_scales.dtype} == {torch.float16}


@pytest.mark.usefixtures("played_gpu")
def test_gptq_experts_hold_the_down_scales_of_all_ranks() -> None:
    """gptq/schemes/gptq_moe.py:198: a rank's 512 inner features are 4 groups of 128."""
    assert gptq_experts().w2_scales.shape == (4, 8, 512)


@pytest.mark.usefixtures("played_gpu")
def test_gptq_experts_with_act_order_hold_the_down_scales_of_one_rank() -> None:
    """gptq/schemes/gptq_moe.py:196: its columns may be of the other rank's groups."""
    assert gptq_experts(desc_act=True).w2_scales.shape == (4, 4, 512)


@pytest.mark.usefixtures("played_gpu")
def test_gptq_experts_have_parameters_that_no_checkpoint_fills() -> None:
    """gptq/schemes/gptq_moe.py:290, 300."""
    made = gptq_experts()
    assert made.w13_g_idx_sort_indices.shape == made.w2_g_idx_sort_indices.shape == (4, 512)


@pytest.mark.usefixtures("played_gpu")
def test_gptq_experts_hold_packed_zero_points_in_the_models_dtype() -> None:
    """gptq/schemes/gptq_moe.py:262, 274: no kernel is given them."""
    assert gptq_experts().w13_qzeros.dtype == torch.bfloat16


@pytest.mark.usefixtures("played_gpu")
@pytest.mark.parametrize("said", ["-:.*experts.*", "+:.*experts.*"])
def test_gptq_asks_dynamic_for_no_experts(said: str) -> None:
    """gptq/gptq.py:447: experts that `dynamic` leaves out, or gives 8 bits, get the 4 of all."""
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
    from sglang.srt.layers.quantization.gptq import GPTQMarlinConfig

    own = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False, "lm_head": False}
    config = GPTQMarlinConfig.from_config({**own, "dynamic": {said: {"bits": 8}}})
    experts = FusedMoE.__new__(FusedMoE)
    method = config.get_quant_method(experts, "model.layers.0.mlp.experts")
    assert type(method).__name__ == "GPTQMarlinMoEMethod"
    assert method.quant_config.weight_bits == 4


def test_compressed_tensors_looks_at_the_first_expert_only() -> None:
    """compressed_tensors/compressed_tensors.py:885: one ignored expert is not seen."""
    from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    tree = parsed(CompressedTensorsConfig.get_moe_scheme)
    asked = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert {".0.gate_proj", ".0.up_proj", ".0.down_proj"} <= asked
    assert not any(".1." in value for value in asked if isinstance(value, str))


def test_compressed_tensors_takes_experts_zero_points_for_awqs() -> None:
    """compressed_tensors_wNa16_moe.py:387: AWQ's are interleaved, and compressed-tensors' are not.

    fused_moe_triton/layer.py:1365: they stay as they are stored, [N / 8, K / G], unlike the codes.
    """
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.quantization.compressed_tensors.schemes import (
        CompressedTensorsWNA16MoE,
    )

    tree = parsed(CompressedTensorsWNA16MoE.process_weights_after_loading)
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert "moe_awq_to_marlin_zero_points" in called
    loader = ast.unparse(parsed(FusedMoE._weight_loader_impl))
    assert "and 'zero' not in weight_name" in loader


def test_compressed_tensors_experts_hold_the_down_scales_of_all_ranks() -> None:
    """compressed_tensors_wNa16_moe.py:148: the loader fills a rank's part, and zeros the rest."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.quantization.compressed_tensors.schemes import (
        CompressedTensorsWNA16MoE,
    )

    tree = ast.unparse(parsed(CompressedTensorsWNA16MoE.create_weights))
    assert "intermediate_size_per_partition * layer.moe_tp_size" in tree
    assert "load_full" not in ast.unparse(parsed(FusedMoE._load_w2))
    assert "load_full" not in ast.unparse(parsed(FusedMoE._weight_loader_impl))


def test_native_experts_take_masked_ids_for_an_index() -> None:
    """layers/moe/fused_moe_native.py:76."""
    from sglang.srt.layers.moe import MoeRunnerConfig
    from sglang.srt.layers.moe.fused_moe_native import moe_forward_native
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    chosen = StandardTopKOutput(torch.ones(1, 2), torch.tensor([[0, -1]]), torch.zeros(1, 2))
    layer: Any = SimpleNamespace(num_experts=2)
    with pytest.raises(RuntimeError, match="index -1 is out of bounds"):
        moe_forward_native(layer, torch.ones(1, 8), chosen, MoeRunnerConfig())


def test_gpt_oss_keeps_the_config_from_its_attention() -> None:
    """models/gpt_oss.py:545."""
    from sglang.srt.models.gpt_oss import GptOssDecoderLayer

    built = {
        ast.unparse(node.func): {keyword.arg for keyword in node.keywords}
        for node in ast.walk(parsed(GptOssDecoderLayer.__init__))
        if isinstance(node, ast.Call)
    }
    assert "quant_config" not in built["GptOssAttention"]
    assert "quant_config" in built["GptOssSparseMoeBlock"]


def test_gpt_oss_asks_for_the_loader_of_whole_layers() -> None:
    """models/gpt_oss.py:237: of any config but the one whose name is mxfp4."""
    from sglang.srt.models.gpt_oss import GptOssSparseMoeBlock

    (asked,) = (
        ast.unparse(value)
        for node in ast.walk(parsed(GptOssSparseMoeBlock.__init__))
        if isinstance(node, ast.Dict)
        for value in node.values
    )
    assert asked == "quant_config_name != 'mxfp4'"


def test_the_loader_takes_a_bias_for_a_matrix() -> None:
    """layers/moe/fused_moe_triton/layer.py:948: [H] has no second dimension to be split along."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    layer = FusedMoE(
        num_experts=2, hidden_size=64, intermediate_size=64, layer_id=0, top_k=1, with_bias=True
    )
    bias = layer.w2_weight_bias
    with pytest.raises(IndexError):
        layer.weight_loader(bias, torch.ones(64), "experts.w2_weight_bias", "w2", 0)


def test_native_experts_take_rows_of_gate_and_up_in_turn() -> None:
    """layers/moe/fused_moe_native.py:134: whatever `gate_up_interleaved` says."""
    from sglang.srt.layers.moe.fused_moe_native import moe_forward_native

    source = ast.unparse(parsed(moe_forward_native))
    assert "swiglu_gpt_oss_sigmoid_alpha" in source
    assert "gate_up_interleaved" not in source
