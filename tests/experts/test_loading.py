"""Tensors of experts that SGLang's loader would cut, pad or cast without a word."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixedprec_plugin.errors import LoadError
from tests.cpu.expert_layers import PROJECTIONS, make_case, stored_experts
from tests.cpu.layers import Case

AWQ = Case("awq", {"bits": 4, "group_size": 64, "zero_point": True})
GPTQ = Case("gptq", {"bits": 4, "group_size": 64, "sym": True, "desc_act": False})
BLOCK = Case("fp8", {"weight_block_size": [128, 128], "activation_scheme": "dynamic"})
TENSOR = Case("fp8", {"weight_block_size": None, "activation_scheme": "dynamic"})
INT8 = Case("blockwise_int8", {"weight_block_size": [128, 128]})


def check(layer: Any, shard: str, suffix: str, tensor: torch.Tensor) -> None:
    from mixedprec_plugin.experts.loading import check_expert_part

    check_expert_part(layer, "model.layers.0.mlp.experts.3.up_proj", shard, suffix, tensor)


@pytest.mark.parametrize("case", [AWQ, GPTQ, BLOCK, TENSOR, INT8], ids=str)
def test_what_is_stored_fits(expert_layer: type, case: Case) -> None:
    layer = make_case(expert_layer, case)
    for shard in PROJECTIONS:
        for suffix, tensor in stored_experts(case)[0][shard].items():
            check(layer, shard, suffix, tensor)


@pytest.mark.parametrize("shard", ["w1", "w2", "w3"])
@pytest.mark.parametrize(
    ("case", "suffix"), [(AWQ, "scales"), (GPTQ, "qweight"), (BLOCK, "weight_scale_inv")], ids=str
)
def test_tensor_that_is_cut_or_too_long_is_refused(
    expert_layer: type, case: Case, suffix: str, shard: str
) -> None:
    layer = make_case(expert_layer, case)
    tensor = stored_experts(case)[0][shard][suffix]
    for wrong in (tensor[:-1], torch.cat([tensor, tensor])):
        with pytest.raises(LoadError, match="which does not make up an expert's"):
            check(layer, shard, suffix, wrong)


def test_message_says_what_is_stored_and_what_is_kept(expert_layer: type) -> None:
    layer = make_case(expert_layer, BLOCK)
    with pytest.raises(LoadError) as raised:
        check(layer, "w3", "weight", torch.zeros(384, 128, dtype=torch.float8_e4m3fn))
    assert str(raised.value) == (
        "model.layers.0.mlp.experts.3.up_proj.weight: is stored as float8_e4m3fn [384, 128], which "
        "does not make up an expert's float8_e4m3fn [768, 256] in Fp8MoEMethod; name a method for "
        "the experts, or take them from another source"
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e5m2, torch.bfloat16])
def test_codes_of_another_kind_are_refused(expert_layer: type, dtype: torch.dtype) -> None:
    layer = make_case(expert_layer, BLOCK)
    with pytest.raises(LoadError, match="does not make up"):
        check(layer, "w2", "weight", torch.zeros(PROJECTIONS["w2"], dtype=dtype))


def test_scales_of_another_dtype_are_cast(expert_layer: type) -> None:
    layer = make_case(expert_layer, BLOCK)
    scale = stored_experts(BLOCK)[0]["w1"]["weight_scale_inv"]
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e8m0fnu):
        check(layer, "w1", "weight_scale_inv", scale.to(dtype))
