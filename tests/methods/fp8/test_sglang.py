"""What FP8 on the CPU platform does not run."""

from __future__ import annotations

import pytest

from mixedprec_plugin.errors import MethodError
from tests.cpu.expert_layers import make_case
from tests.cpu.layers import make_layer


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "weights that are not stored in FP8"),
        ({"is_checkpoint_fp8_serialized": True, "use_mxfp8": True}, "MXFP8"),
        ({"is_checkpoint_fp8_serialized": True, "scale_fmt": "ue8m0"}, "power-of-two"),
    ],
)
def test_other_forms_of_fp8_are_refused(linear_module, arguments, text):
    from mixedprec_plugin.methods.fp8.sglang import CpuFp8Config

    layer = make_layer(linear_module, "column", None, (64,), 128)
    with pytest.raises(MethodError, match=f"the CPU platform does not run fp8 with {text}"):
        CpuFp8Config(**arguments).get_quant_method(layer, "layer")


def test_fp4_experts_are_refused(expert_layer):
    from mixedprec_plugin.methods.fp8.sglang import CpuFp8Config

    config = CpuFp8Config(is_checkpoint_fp8_serialized=True, is_fp4_experts=True)
    layer = make_case(expert_layer, None)
    with pytest.raises(MethodError, match="the CPU platform does not run fp8 with FP4 experts"):
        config.get_quant_method(layer, "experts")
