"""What of SGLang's the plan's rules on experts stand on."""

from __future__ import annotations

import dataclasses
import inspect

import pytest


def test_defaults_of_the_server_go(expert_layer):
    from sglang.srt.server_args import ServerArgs

    from mixedprec_plugin.experts.launch import why_not_composite

    args = ServerArgs(model_path="model")
    assert why_not_composite(args, ["awq", "gptq", "fp8"]) == []


def test_every_option_is_one_of_the_servers(expert_layer):
    from sglang.srt.server_args import ServerArgs

    from mixedprec_plugin.experts import launch

    fields = {field for field, *_ in launch._OPTIONS}
    assert fields <= set(ServerArgs.__struct_fields__)


def test_a_layer_has_one_scheme_for_both_products(expert_layer):
    """Where this fails, gate and up projection may have got a scheme beside the down projection's.

    One method makes all parameters; one set of flags and one block shape tells the kernels of both
    products what the weights are; Marlin's have one number of bits.
    """
    from sglang.srt.layers.moe.moe_runner.marlin import MarlinMoeQuantInfo
    from sglang.srt.layers.moe.moe_runner.triton import TritonMoeQuantInfo

    assert "quant_method" in inspect.signature(expert_layer).parameters
    triton = {field.name for field in dataclasses.fields(TritonMoeQuantInfo)}
    formats = {name for name in triton if name.startswith("use_") or name == "block_shape"}
    assert formats == {
        "use_mxfp8", "use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16",
        "block_shape",
    }  # fmt: skip
    marlin = {field.name for field in dataclasses.fields(MarlinMoeQuantInfo)}
    assert "weight_bits" in marlin
    assert not {"w13_weight_bits", "w2_weight_bits"} & marlin


@pytest.mark.parametrize("name", ["no_combine", "inplace", "routed_scaling_factor"])
def test_runner_config_has_what_composites_set(expert_layer, name):
    from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig

    assert name in {field.name for field in dataclasses.fields(MoeRunnerConfig)}
