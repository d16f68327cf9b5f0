"""`dequantize` of what compressed-tensors stores, against that library's own decompression."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from mixedprec_plugin.methods.foreign.compressed_tensors import codec as pack_quantized
from mixedprec_plugin.methods.foreign.compressed_tensors import read_config
from mixedprec_plugin.methods.foreign.compressed_tensors.fp4 import codec as fp4_packed
from mixedprec_plugin.methods.nvfp4 import codec as nvfp4
from mixedprec_plugin.quantize import scaled

# the library imports all of transformers
pytestmark = pytest.mark.slow
N, K = 72, 192


def scheme(**weights: Any) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


def compressor(format_name: str) -> Any:
    """The library's own; imported late, as it imports all of transformers."""
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.get_value_from_registry(format_name)


def quantized(format_name: str, made: Any, **more: torch.Tensor) -> dict[str, Any]:
    """Compress a random weight with the library."""
    generator = torch.Generator().manual_seed(0)
    assert made.weights is not None
    groups = {"group": K // (made.weights.group_size or K), "channel": 1}[made.weights.strategy]
    state = {
        "weight": torch.randn(N, K, generator=generator),
        "weight_scale": torch.rand(N, groups, generator=generator) * 0.05 + 0.05,
        "weight_zero_point": torch.zeros(N, groups, dtype=torch.int8),
        **more,
    }
    if not made.weights.symmetric:
        state["weight_zero_point"] = torch.randint(
            -7, 7, (N, groups), generator=generator, dtype=torch.int8
        )
    compressed: dict[str, Any] = compressor(format_name).compress(state, made)
    return compressed


def theirs(format_name: str, stored: dict[str, Any], made: Any) -> torch.Tensor:
    weight: torch.Tensor = compressor(format_name).decompress(stored, made)["weight"]
    return weight


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"), list(itertools.product([4, 8], [32, -1], [True, False]))
)
def test_pack_quantized_is_what_the_library_unpacks(
    bits: int, group_size: int, symmetric: bool
) -> None:
    strategy = "channel" if group_size == -1 else "group"
    made = scheme(
        num_bits=bits, type="int", symmetric=symmetric, strategy=strategy,
        group_size=None if group_size == -1 else group_size,
    )  # fmt: skip
    stored = quantized("pack-quantized", made)
    assert ("weight_zero_point" in stored) is not symmetric
    ours = pack_quantized.read(stored, {"bits": bits, "group_size": group_size}).dequantize()
    assert torch.equal(ours, theirs("pack-quantized", stored, made))
    assert float(ours.abs().amax()) > 0.1


def test_pack_quantized_in_activation_order_is_what_the_library_unpacks() -> None:
    made = scheme(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32,
                  actorder="group")  # fmt: skip
    shuffled = torch.randperm(K, generator=torch.Generator().manual_seed(1))
    g_idx = (torch.arange(K, dtype=torch.int32) // 32)[shuffled]
    stored = quantized("pack-quantized", made, weight_g_idx=g_idx)
    arguments = {"bits": 4, "group_size": 32}
    ours = pack_quantized.read(stored, arguments).dequantize()
    assert torch.equal(ours, theirs("pack-quantized", stored, made))
    in_order = {k: v for k, v in stored.items() if k != "weight_g_idx"}
    assert not torch.equal(ours, pack_quantized.read(in_order, arguments).dequantize())


@pytest.mark.parametrize("order", ["group", "dynamic", "weight", "static", True, False, None])
def test_order_of_groups_is_told_as_the_library_reads_it(order: Any) -> None:
    from compressed_tensors.quantization import ActivationOrdering

    weights = {"num_bits": 4, "strategy": "group", "group_size": 32, "actorder": order}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    told = read_config({"format": "pack-quantized", "config_groups": groups}, "").facts
    theirs = scheme(**weights).weights.actorder
    assert bool(told.get("desc_act")) is (theirs == ActivationOrdering.GROUP)


@pytest.mark.parametrize(
    ("strategy", "symmetric"), list(itertools.product(["channel", "group"], [True, False]))
)
def test_int_quantized_is_what_the_library_dequantizes(strategy: str, symmetric: bool) -> None:
    group_size = 64 if strategy == "group" else None
    made = scheme(num_bits=8, type="int", symmetric=symmetric, strategy=strategy,
                  group_size=group_size)  # fmt: skip
    stored = quantized("int-quantized", made)
    ours = scaled.read(
        stored,
        {
            "codes": "weight", "scale": "weight_scale", "zero_point": "weight_zero_point",
            "block": [1, group_size or K], "reciprocal": False,
        },
    ).dequantize()  # fmt: skip
    assert torch.equal(ours, theirs("int-quantized", stored, made))


def test_older_unpacked_zero_points_read_as_packed_ones() -> None:
    made = scheme(num_bits=4, type="int", symmetric=False, strategy="group", group_size=32)
    stored = quantized("pack-quantized", made)
    unpacked = torch.randint(
        -7, 7, (N, K // 32), dtype=torch.int8,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    arguments = {"bits": 4, "group_size": 32}
    codes = pack_quantized.read(
        {**stored, "weight_zero_point": torch.zeros_like(unpacked),
         "weight_scale": torch.ones(N, K // 32)}, arguments,
    ).dequantize()  # fmt: skip
    spread = unpacked.float().repeat_interleave(32, dim=1)
    ours = pack_quantized.read({**stored, "weight_zero_point": unpacked}, arguments).dequantize()
    scales = stored["weight_scale"].repeat_interleave(32, dim=1)
    assert torch.equal(ours, (codes - spread) * scales)


def test_what_nvfp4_exports_is_what_the_library_dequantizes() -> None:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    numbers = nvfp4.read(nvfp4.quantize(weight, {}, torch.bfloat16), {})
    stored = fp4_packed.write(numbers, {}, torch.bfloat16)
    made = scheme(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    # the library multiplies in bfloat16, which holds these products: the global scale is 2**-7
    weight = theirs("nvfp4-pack-quantized", stored, made)
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight.float(), numbers.dequantize())
