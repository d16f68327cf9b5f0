from __future__ import annotations

import pytest
import torch

from mixedprec_plugin.methods.awq import codec as awq
from mixedprec_plugin.methods.gptq import codec as gptq

SYMMETRIC = {"bits": 4, "group_size": 64, "sym": True, "desc_act": False}
ZERO_POINTS = {"bits": 4, "group_size": 64, "zero_point": True}


# rows of the second and third are not cut at a multiple of 8 by their length alone
@pytest.mark.parametrize(("N", "K"), [(64, 128), (576, 1536), (200, 4096)])
def test_gptq_codes_are_the_same_after_a_way_through_awq(N: int, K: int) -> None:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    stored = gptq.quantize(weight, SYMMETRIC, torch.bfloat16)
    through = awq.write(gptq.read(stored, SYMMETRIC), ZERO_POINTS, torch.bfloat16)
    again = gptq.write(awq.read(through, ZERO_POINTS), SYMMETRIC, torch.bfloat16)
    assert again.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(again[name], tensor), name
