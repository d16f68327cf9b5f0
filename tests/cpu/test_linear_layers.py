"""Every method in SGLang's own linear layers, loaded through SGLang's own loaders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mixedprec_plugin.errors import ShapeError
from tests.cpu.expert_layers import relative_error
from tests.cpu.layers import QUANTIZERS, SIZES, Case, K, dequantize, fill, make_config, make_layer

CASES = [
    Case("fp8", {"weight_block_size": None}),
    Case("fp8", {"weight_block_size": [128, 128]}),
    Case("fp8_channel", {}),
    Case("blockwise_int8", {"weight_block_size": [128, 128]}),
    Case("blockwise_int8", {"weight_block_size": [64, 64]}),
    Case("int8_channel", {}),
    Case("awq", {"bits": 4, "group_size": 128}),
    Case("awq", {"bits": 4, "group_size": 32}),
    Case("awq", {"bits": 4, "group_size": -1}),
    Case("gptq", {"bits": 4, "group_size": 128}),
    Case("gptq", {"bits": 4, "group_size": -1}),
    Case("gptq", {"bits": 8, "group_size": 64}),
    Case("gptq", {"bits": 8, "group_size": -1}),
    Case("humming", {"bits": 3, "group_size": 64}),
    Case("nvfp4", {"keep_input_scale": False}),
]
# Greatest relative error of a token's outputs that the method may cost, as a root mean square.
# FP8 rounds activations by up to 2**-4 of a value, 0.026 in the mean square. INT8 truncates them by
# up to amax / 127, 0.023 in the mean square for an amax of five standard deviations; with a scale a
# token it rounds, by half of that. Weight-only
# methods round weights and outputs to bfloat16, by up to 2**-9.
TOLERANCE = {
    "fp8": 0.035, "fp8_channel": 0.035, "blockwise_int8": 0.035, "int8_channel": 0.015,
    "awq": 0.004, "gptq": 0.004, "humming": 0.004, "nvfp4": 0.004,
}  # fmt: skip


def _stored(case: Case, sizes: tuple[int, ...], seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """A random weight a shard, each on a scale of its own, as the quantizer stores it."""
    generator = torch.Generator().manual_seed(seed)
    weights = [
        torch.randn(size, K, generator=generator).mul_(0.02 * 4**index).bfloat16()
        for index, size in enumerate(sizes)
    ]
    quantize = QUANTIZERS[case.method].quantize
    arguments = {"zero_point": True, "sym": True, "desc_act": None, "rounding": "nearest"}
    return [quantize(weight, {**arguments, **case.arguments}, torch.bfloat16) for weight in weights]


@pytest.mark.parametrize("num_tokens", [1, 7, 70])
@pytest.mark.parametrize("kind", ["column", "merged", "qkv", "row"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_is_near_the_dequantized_matmul(linear_module, case, kind, num_tokens):
    layer = make_layer(linear_module, kind, make_config(case), SIZES[kind], K)
    stored = _stored(case, SIZES[kind])
    fill(layer, kind, stored)
    x = torch.randn(num_tokens, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    out = layer(x)[0]
    assert out.dtype == torch.bfloat16
    exact = x.double().numpy() @ dequantize(case, stored).astype(np.float64).T
    start = 0
    for size in SIZES[kind]:
        shard = slice(start, start := start + size)
        assert relative_error(out[:, shard], exact[:, shard]) < TOLERANCE[case.method]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_second_load_replaces_the_first(linear_module, case):
    layer = make_layer(linear_module, "qkv", make_config(case), SIZES["qkv"], K)
    fill(layer, "qkv", _stored(case, SIZES["qkv"], seed=0))
    layer.quant_method.restore_weights_before_loading(layer)
    fill(layer, "qkv", _stored(case, SIZES["qkv"], seed=5))
    fresh = make_layer(linear_module, "qkv", make_config(case), SIZES["qkv"], K)
    fill(fresh, "qkv", _stored(case, SIZES["qkv"], seed=5))
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(layer(x)[0], fresh(x)[0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_partial_load_keeps_the_other_shards(linear_module, case):
    layer = make_layer(linear_module, "merged", make_config(case), SIZES["merged"], K)
    first, second = _stored(case, SIZES["merged"], 0), _stored(case, SIZES["merged"], 5)
    fill(layer, "merged", first)
    layer.quant_method.restore_weights_before_loading(layer)
    for suffix, tensor in second[1].items():
        parameter = getattr(layer, suffix)
        parameter.weight_loader(parameter, tensor, 1)
    layer.quant_method.process_weights_after_loading(layer)
    fresh = make_layer(linear_module, "merged", make_config(case), SIZES["merged"], K)
    fill(fresh, "merged", [first[0], second[1]])
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(layer(x)[0], fresh(x)[0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_class_names_are_sglangs_own(linear_module, case):
    """Linear layers choose their weight loader by the name (layers/linear.py:140)."""
    layer = make_layer(linear_module, "column", make_config(case), (256,), K)
    ours, *bases = type(layer.quant_method).__mro__
    theirs = next(base for base in bases if base.__module__.startswith("sglang."))
    assert ours.__name__ == theirs.__name__
    with_v1 = ("W8A8Fp8LinearMethod", "W8A8Int8LinearMethod", "ModelOptNvFp4A16LinearMethod")
    has_v1 = ours.__name__ in with_v1
    assert (ours.__name__ in linear_module.WEIGHT_LOADER_V2_SUPPORTED) is not has_v1


def _kept_bytes(layer: Any) -> int:
    """Bytes of all tensors of a layer, of its scheme and of the scheme's packed weight."""
    weights = layer.scheme._packed[""] if layer.scheme is not None else []
    members = [member for owner in (layer, *weights) for member in vars(owner).values()]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in [*members, *layer.parameters()]
        if isinstance(tensor, torch.Tensor)
    }
    return sum(storages.values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_stay_packed_in_memory(linear_module, case):
    layer = make_layer(linear_module, "column", make_config(case), (1536,), K)
    stored = _stored(case, (1536,))
    fill(layer, "column", stored)
    # The kernel for int4 wants an offset beside every scale: a fifth more for groups of 32.
    assert _kept_bytes(layer) <= 1.2 * sum(t.numel() * t.element_size() for t in stored[0].values())


@pytest.mark.parametrize("order", ["even", "uneven"])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_rows_take_the_scale_that_g_idx_names(linear_module, bits, order):
    case = Case("gptq", {"bits": bits, "group_size": 128, "desc_act": True})
    tensors = dict(_stored(Case("gptq", {"bits": bits, "group_size": 128}), (256,))[0])
    generator = torch.Generator().manual_seed(3)
    if order == "even":
        tensors["g_idx"] = tensors["g_idx"][torch.randperm(K, generator=generator)]
    else:
        tensors["g_idx"] = torch.randint(0, K // 128, (K,), generator=generator).int()
    layer = make_layer(linear_module, "column", make_config(case), (256,), K)
    fill(layer, "column", [tensors])
    layer.quant_method.restore_weights_before_loading(layer)
    assert torch.equal(layer.qweight.data, tensors["qweight"])
    layer.quant_method.process_weights_after_loading(layer)
    for num_tokens in (1, 70):
        x = torch.randn(num_tokens, K, generator=generator).bfloat16()
        exact = x.double().numpy() @ dequantize(case, [tensors]).astype(np.float64).T
        assert relative_error(layer(x)[0], exact) < TOLERANCE["gptq"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bias_is_added_after_rounding(linear_module, case):
    layer = make_layer(linear_module, "column", make_config(case), (256,), K)
    fill(layer, "column", _stored(case, (256,)))
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    bias = torch.randn(256).bfloat16()
    without = layer.quant_method.apply(layer, x)
    added = layer.quant_method.apply(layer, x, bias)
    if case.method == "int8_channel":
        # CUTLASS's int8_scaled_mm adds it before it rounds: at most one rounding away
        assert torch.allclose(added.float(), (without + bias).float(), rtol=2**-7, atol=2**-7)
        assert not torch.equal(added, without + bias)
        return
    assert torch.equal(added, without + bias)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_leading_dimensions_are_kept(linear_module, case):
    layer = make_layer(linear_module, "column", make_config(case), (256,), K)
    fill(layer, "column", _stored(case, (256,)))
    x = torch.randn(6, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    flat = layer.quant_method.apply(layer, x)
    assert torch.equal(layer.quant_method.apply(layer, x.view(2, 3, K)), flat.view(2, 3, 256))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_tokens_give_no_rows(linear_module, case):
    layer = make_layer(linear_module, "column", make_config(case), (256,), K)
    fill(layer, "column", _stored(case, (256,)))
    assert layer(torch.empty(0, K, dtype=torch.bfloat16))[0].shape == (0, 256)


@pytest.mark.parametrize("block_size", [None, [128, 128]])
def test_static_and_dynamic_fp8_take_the_dtype_of_the_input(linear_module, block_size):
    case = Case("fp8", {"weight_block_size": block_size})
    layer = make_layer(linear_module, "column", make_config(case), (256,), K)
    fill(layer, "column", _stored(case, (256,)))
    assert layer(torch.randn(2, K).half())[0].dtype == torch.float16


@pytest.mark.parametrize("method", ["fp8_channel", "int8_channel"])
@pytest.mark.parametrize("kind", ["merged", "qkv"])
def test_channels_that_are_stored_fused_load_as_their_shards_do(linear_module, kind, method):
    """As Phi-3 stores it: one tensor, which SGLang's loader of old takes apart."""
    case = Case(method, {})
    stored = _stored(case, SIZES[kind])
    apart = make_layer(linear_module, kind, make_config(case), SIZES[kind], K)
    fill(apart, kind, stored)
    whole = make_layer(linear_module, kind, make_config(case), SIZES[kind], K)
    for suffix in ("weight", "weight_scale"):
        parameter = getattr(whole, suffix)
        parameter.weight_loader(parameter, torch.cat([tensors[suffix] for tensors in stored]))
        assert torch.equal(parameter.data.float(), getattr(apart, suffix).data.float())


def test_static_scale_of_a_fused_module_is_the_greatest(linear_module):
    case = Case("fp8", {"weight_block_size": None, "activation_scheme": "static"})
    layer = make_layer(linear_module, "merged", make_config(case), SIZES["merged"], K)
    plain = Case("fp8", {"weight_block_size": None})
    stored = [dict(tensors) for tensors in _stored(plain, SIZES["merged"])]
    for tensors, scale in zip(stored, (0.01, 0.02), strict=True):
        tensors["input_scale"] = torch.tensor(scale)
    fill(layer, "merged", stored)
    x = torch.randn(5, K).bfloat16()
    codes = (x.float() / 0.02).clamp(-448, 448).to(torch.float8_e4m3fn)
    exact = (codes.double().numpy() * 0.02) @ dequantize(plain, stored).astype(np.float64).T
    assert relative_error(layer(x)[0], exact) < 0.005


def test_ragged_k_is_refused(linear_module):
    case = Case("blockwise_int8", {"weight_block_size": [128, 128]})
    layer = make_layer(linear_module, "column", make_config(case), (256,), 192)
    with pytest.raises(ShapeError, match=r"K = 192 \(expected a multiple of 128, the block size\)"):
        layer(torch.randn(2, 192).bfloat16())


@pytest.mark.parametrize(
    "case",
    [Case("awq", {"bits": 4, "group_size": 128}), Case("gptq", {"bits": 4, "group_size": 128})],
    ids=str,
)
def test_an_unknown_int4_layout_leaves_the_checkpoints_and_the_product(
    linear_module, case, monkeypatch
):
    from mixedprec_plugin.cpu import packed

    monkeypatch.setattr(packed, "block_rows", lambda: None)
    stored = _stored(case, SIZES["column"])
    layer = make_layer(linear_module, "column", make_config(case), SIZES["column"], K)
    fill(layer, "column", stored)
    x = torch.randn(70, K).bfloat16()
    out = layer.quant_method.apply(layer, x)
    assert layer.qweight.dtype == torch.int32
    assert (
        relative_error(out, x.double().numpy() @ dequantize(case, stored).T)
        < TOLERANCE[case.method]
    )
