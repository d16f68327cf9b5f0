"""humming's numbers: packed and read by humming-kernels' own code."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from mixedprec_plugin.errors import ShapeError
from mixedprec_plugin.methods.gptq import codec as gptq
from mixedprec_plugin.methods.humming import codec
from mixedprec_plugin.quantize.codec import NotTheSameNumbersError
from mixedprec_plugin.quantize.packing import pack, unpack
from tests.methods.humming.own_code import OwnCode
from tests.reference.dequantize import humming as reference

pytestmark = pytest.mark.filterwarnings("ignore")
every_bits = pytest.mark.parametrize("bits", range(2, 9))


def weight(N: int = 24, K: int = 192) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(N * K))


def arguments(bits: int, group_size: int = 64) -> dict[str, int]:
    return {"bits": bits, "group_size": group_size}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> OwnCode:
    return OwnCode(tmp_path_factory.mktemp("humming"))


@pytest.fixture
def schema(own: OwnCode, monkeypatch: pytest.MonkeyPatch) -> Any:
    """humming's own schema of weights, whose two calls of a GPU go to the same code on the CPU."""
    monkeypatch.setenv("HUMMING_DISABLE_PARALLEL_BUILD", "1")
    from humming import ops
    from humming.schema import HummingWeightSchema

    monkeypatch.setattr(ops, "unpack_weight", own.unpack)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    return HummingWeightSchema


@every_bits
def test_words_are_those_of_hummings_own_code(own: OwnCode, bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (3, 96), generator=generator).to(torch.uint8)
    codes[0, :2] = torch.tensor([0, (1 << bits) - 1])
    words = own.pack(codes, bits)
    assert torch.equal(pack(codes, bits), words)
    assert torch.equal(unpack(words, bits), codes)


@every_bits
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hummings_own_schema_reads_what_is_stored(schema: Any, bits: int, dtype: Any) -> None:
    made = codec.quantize(weight(), arguments(bits), dtype)
    said = schema(b_dtype=f"uint{bits}", weight_scale_group_size=64)
    said.validate_tensors(made, 24, 192, dtype)
    theirs = said.dequant_tensors(made)
    assert torch.equal(codec.read(made, arguments(bits)).dequantize(), theirs)
    arrays = {
        "weight": made["weight"].numpy(), "weight_scale": made["weight_scale"].float().numpy()
    }  # fmt: skip
    np.testing.assert_array_equal(reference(arrays, arguments(bits)), theirs.numpy())


@every_bits
def test_no_code_is_more_than_half_a_step_away(bits: int) -> None:
    original = weight()
    made = codec.quantize(original, arguments(bits, 32), torch.float16)
    steps = made["weight_scale"].float().abs().repeat_interleave(32, 1)
    error = (codec.read(made, arguments(bits, 32)).dequantize() - original).abs()
    # a scale is rounded to 11 bits, and the outermost code is 2**(bits - 1) scales away
    assert float((error / steps).max()) < 0.5 + 2 ** (bits - 1 - 11) + 1e-3


def test_bits_of_one_more_halve_the_error() -> None:
    original = weight(64, 512)
    errors = []
    for bits in range(3, 9):
        made = codec.quantize(original, arguments(bits), torch.float16)
        errors.append(float((codec.read(made, arguments(bits)).dequantize() - original).norm()))
    ratios = [more / fewer for fewer, more in itertools.pairwise(errors)]
    assert all(0.45 < ratio < 0.55 for ratio in ratios)


@pytest.mark.parametrize("bits", [4, 8])
def test_gptqs_numbers_are_taken_and_given_back(bits: int) -> None:
    given = {**arguments(bits), "sym": True, "desc_act": False}
    theirs = gptq.quantize(weight(), given, torch.bfloat16)
    made = codec.write(gptq.read(theirs, given), arguments(bits), torch.bfloat16)
    expected = codec.quantize(weight(), arguments(bits), torch.bfloat16)
    assert all(torch.equal(made[suffix], tensor) for suffix, tensor in expected.items())
    again = gptq.write(codec.read(made, arguments(bits)), given, torch.bfloat16)
    assert all(torch.equal(again[suffix], tensor) for suffix, tensor in theirs.items())


def test_numbers_that_it_cannot_hold_are_refused() -> None:
    made = codec.quantize(weight(), arguments(4), torch.bfloat16)
    numbers = codec.read(made, arguments(4))
    numbers.zeros[3, 1] = 7
    with pytest.raises(NotTheSameNumbersError, match=r"1 of its 72 zero points are not 8"):
        codec.write(numbers, arguments(4), torch.bfloat16)


@pytest.mark.parametrize(
    ("K", "bits", "message"),
    [
        (96, 3, "group size 64 does not divide K = 96"),
        (128, 3, ""),
    ],
)
def test_shapes_that_cannot_be_quantized(K: int, bits: int, message: str) -> None:
    if not message:
        assert codec.quantize(weight(8, K), arguments(bits), torch.bfloat16)
        return
    with pytest.raises(ShapeError, match=message):
        codec.quantize(weight(8, K), arguments(bits), torch.bfloat16)


def test_words_of_another_number_of_bits_are_refused() -> None:
    made = codec.quantize(weight(8, 128), arguments(3), torch.bfloat16)
    with pytest.raises(ShapeError, match="12 words a row are no whole codes of 5 bits"):
        codec.read(made, arguments(5))
    with pytest.raises(ShapeError, match="weight_scale: shape"):
        codec.read({**made, "weight_scale": made["weight_scale"][:, :1]}, arguments(3))
