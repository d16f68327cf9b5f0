"""What the CPU configs hand out, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from tests.cpu.layers import Case, make_config, make_layer

CASES = [
    Case("fp8", {"weight_block_size": None}),
    Case("fp8_channel", {}),
    Case("blockwise_int8", {"weight_block_size": [128, 128]}),
    Case("int8_channel", {}),
    Case("awq", {"bits": 4, "group_size": 128}),
    Case("gptq", {"bits": 4, "group_size": 128}),
    Case("humming", {"bits": 3, "group_size": 64}),
    Case("nvfp4", {"keep_input_scale": False}),
]


def _empty(cls: type) -> torch.nn.Module:
    """A layer of a class that is expensive to construct, without its constructor."""
    layer = cls.__new__(cls)
    torch.nn.Module.__init__(layer)
    return layer


def test_constructor_of_nvfp4_is_that_of_its_config_on_cuda(linear_module):
    import inspect

    from mixedprec_plugin.methods.construct import load_class
    from mixedprec_plugin.methods.registry import METHODS

    ours = type(make_config(CASES[-1]))
    assert inspect.signature(ours) == inspect.signature(load_class(METHODS["nvfp4"], "cuda"))


@pytest.mark.parametrize("case", CASES[:-1], ids=str)
def test_constructor_is_the_parents(linear_module, case):
    import inspect

    cls = type(make_config(case))
    theirs = next(base for base in cls.__mro__ if base.__module__.startswith("sglang."))
    assert theirs.__name__.endswith("Config")
    parameters = [
        [(p.name, p.kind, p.default) for p in inspect.signature(one).parameters.values()]
        for one in (cls, theirs)
    ]
    assert parameters[0] == parameters[1]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_embeddings_and_attention_are_not_quantized_and_heads_where_cuda_serves_them(
    linear_module, case
):
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    for cls in (VocabParallelEmbedding, RadixAttention):
        assert make_config(case).get_quant_method(_empty(cls), "layer") is None
    method = make_config(case).get_quant_method(_empty(ParallelLMHead), "lm_head")
    assert (method is not None) == (case.method in ("awq", "gptq", "nvfp4"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_models_may_run_in_both_half_precisions(linear_module, case):
    assert {torch.float16, torch.bfloat16} <= set(make_config(case).get_supported_act_dtypes())


def test_ignored_layers_stay_unquantized(linear_module):
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    from mixedprec_plugin.methods.awq.sglang import CpuAWQConfig
    from mixedprec_plugin.methods.fp8.sglang import CpuFp8Config

    for config in (
        CpuFp8Config(is_checkpoint_fp8_serialized=True, ignored_layers=["layer"]),
        CpuAWQConfig(4, 128, True, ["layer"]),
    ):
        layer = make_layer(linear_module, "column", config, (64,), 128)
        assert type(layer.quant_method) is UnquantizedLinearMethod
