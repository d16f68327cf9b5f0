"""`quantize.compiled_decoding`, and loops that unpack: the bits of torch's arithmetic."""

from __future__ import annotations

import pytest
import torch

from mixedprec_plugin.quantize.fp4 import E4M3, E8M0, Fp4
from mixedprec_plugin.quantize.packing import pack, pack_awq, unpack_along_k, unpack_awq_rows
from mixedprec_plugin.quantize.scaled import Scaled
from tests.quantize.methods import CASES, Case, case
from tests.quantize.test_compiled import SHAPES, bell, both, methods

ODD = (Case("gptq", {"bits": 4, "group_size": 96, "desc_act": False}),
       case("humming", bits=2, group_size=32), case("humming", bits=5, group_size=32),
       case("humming", bits=7, group_size=96))  # fmt: skip
WORDS = [x for x in CASES if x.method in ("awq", "gptq", "humming")]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@methods
def test_what_was_quantized(method: Case, shape: tuple[int, int]) -> None:
    tensors = method.quantize(bell(*shape))
    both(lambda: {"weight": method.dequantize(tensors)})


@pytest.mark.parametrize("method", ODD, ids=str)
def test_other_bits_and_groups(method: Case) -> None:
    weight = bell(200, 576)
    both(lambda: method.quantize(weight))
    tensors = method.quantize(weight)
    both(lambda: {"weight": method.dequantize(tensors)})


@pytest.mark.parametrize("bits", [4, 8])
def test_any_zero_points(bits: int) -> None:
    word = torch.iinfo(torch.int32)
    generator = torch.Generator().manual_seed(bits)
    words = (torch.randint(word.min, word.max, shape, dtype=torch.int32, generator=generator)
             for shape in ((576 * bits // 32, 200), (9, 200 * bits // 32)))  # fmt: skip
    tensors = dict(zip(("qweight", "qzeros"), words, strict=True))
    tensors["scales"] = torch.randn(9, 200, generator=generator).half()
    method = Case("gptq", {"bits": bits, "group_size": 64, "checkpoint_format": "gptq_v2"})
    both(lambda: {"weight": method.dequantize(tensors)})
    groups = torch.arange(576, dtype=torch.int32) // 64
    tensors["g_idx"] = groups[torch.randperm(576, generator=generator)]
    both(lambda: {"weight": method.dequantize(tensors)})


@pytest.mark.parametrize("block", [(1, 576), (200, 576), (128, 128), (7, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, E4M3])
@pytest.mark.parametrize("has_zeros", [False, True])
def test_every_code(dtype: torch.dtype, block: tuple[int, int], has_zeros: bool) -> None:
    codes = torch.arange(200 * 576).remainder(251 if dtype == E4M3 else 256).to(torch.uint8)
    if dtype == E4M3:
        codes[codes.bitwise_and(0x7F) == 0x7F] = 0x80
    codes = codes.view(200, 576).view(dtype)
    scales = bell(-(-200 // block[0]), -(-576 // block[1])).float()
    scales[0, 0], zeros = 1e-39, torch.arange(scales.numel()).remainder(300).view(scales.shape)
    numbers = Scaled(codes, scales, block, zeros.float() if has_zeros else None)
    both(lambda: {"weight": numbers.dequantize()})
    strided = Scaled(codes.t().contiguous().t(), scales, block, numbers.zeros)
    assert torch.equal(strided.dequantize(), numbers.dequantize())


def test_nan_of_e4m3_is_none_of_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixedprec_plugin.quantize.chunks.LEAST_COMPILED", 1)
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256).view(E4M3)
    made = Scaled(codes, torch.ones(1, 1), (1, 256)).dequantize()
    assert made.isnan().nonzero()[:, 1].tolist() == [0x7F, 0xFF]
    assert torch.equal(made.nan_to_num(), codes.float().nan_to_num())


@pytest.mark.parametrize("dtype", [E4M3, E8M0])
@pytest.mark.parametrize("whole", [1.0, 2.0**-7, 0.3e-3])
def test_every_fp4_code_with_every_scale(dtype: torch.dtype, whole: float) -> None:
    # the last one is NaN
    scales = torch.arange(127 if dtype == E4M3 else 255, dtype=torch.uint8).view(dtype)[:, None]
    packed = torch.arange(256, dtype=torch.uint8).expand(len(scales), 256).contiguous()
    numbers = Fp4(packed, scales.view(dtype), torch.tensor(whole))
    both(lambda: {"weight": numbers.dequantize()})


@methods
def test_threads(method: Case) -> None:
    tensors, before = method.quantize(bell(1000, 576)), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        both(lambda: {"weight": method.dequantize(tensors)})
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("method", WORDS, ids=str)
def test_the_same_numbers_are_written(method: Case) -> None:
    tensors = method.quantize(bell(200, 576))
    numbers = method.module.read(tensors, method.arguments)
    both(lambda: method.module.write(numbers, method.arguments, torch.bfloat16))
    for suffix, tensor in method.module.write(numbers, method.arguments, torch.bfloat16).items():
        assert torch.equal(tensor, tensors[suffix])


def test_some_rows_of_words_along_k_and_of_awq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixedprec_plugin.quantize.chunks.LEAST_COMPILED", 1)
    codes = torch.randint(0, 16, (200, 72), dtype=torch.uint8)
    rows = slice(24, 160)
    for bits in (4, 8):
        words = pack(codes, bits).t().contiguous()
        assert torch.equal(unpack_along_k(words, rows, bits), codes[rows])
        assert torch.equal(unpack_along_k(pack(codes, bits).t(), rows, bits), codes[rows])
    assert torch.equal(unpack_awq_rows(pack_awq(codes).contiguous(), rows), codes[rows])
