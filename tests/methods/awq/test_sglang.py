"""What AWQ on the CPU platform does not run, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch

from mixedprec_plugin.errors import ShapeError
from tests.cpu.expert_layers import make_case
from tests.cpu.layers import Case, make_config, make_layer


def test_awq_with_one_group_over_split_columns_is_refused(linear_module):
    config = make_config(Case("awq", {"bits": 4, "group_size": -1}))
    layer = make_layer(linear_module, "column", config, (64,), 256)
    with pytest.raises(ShapeError, match="AWQ group size -1 with K = 512 split over ranks"):
        config.get_linear_scheme(layer).create_weights(
            layer, 256, [64], torch.bfloat16, None, input_size=512, output_size=64
        )


def test_awq_experts_with_one_group_a_column_are_refused(expert_layer):
    with pytest.raises(ShapeError, match=r"hidden size 256 in awq \(expected a multiple of -1"):
        make_case(expert_layer, Case("awq", {"bits": 4, "group_size": -1}))


def test_ignored_experts_stay_unquantized(expert_layer):
    from mixedprec_plugin.methods.awq.sglang import CpuAWQConfig

    layer = make_case(expert_layer, None)
    assert CpuAWQConfig(4, 128, True, ["experts"]).get_quant_method(layer, "experts") is None
