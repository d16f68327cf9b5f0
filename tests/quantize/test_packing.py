from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp

from mixedprec_plugin.quantize.packing import pack, pack_awq, unpack, unpack_awq
from tests.reference import dequantize as reference

SIDES = st.integers(1, 9)


@st.composite
def codes(
    draw: st.DrawFn, bits: int, column_multiple: int = 1, row_multiple: int = 1
) -> np.ndarray:
    shape = (draw(SIDES) * row_multiple, draw(SIDES) * column_multiple)
    array: np.ndarray = draw(stnp.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))
    return array


def test_low_nibble_comes_first() -> None:
    packed = pack(torch.arange(8, dtype=torch.uint8), 4)
    assert packed.dtype == torch.int32
    assert packed.tolist() == [0x76543210]


def test_high_nibble_makes_the_word_negative() -> None:
    assert pack(torch.tensor([0] * 7 + [15], dtype=torch.uint8), 4).tolist() == [-0x10000000]


def test_low_byte_comes_first() -> None:
    assert pack(torch.tensor([1, 2, 3, 4], dtype=torch.uint8), 8).tolist() == [0x04030201]


def test_awq_interleaves_columns() -> None:
    # Column n holds n, so the word read from its low nibble is the published order 0 2 4 6 1 3 5 7.
    packed = pack_awq(torch.arange(8, dtype=torch.uint8)[:, None])
    assert packed.shape == (1, 1)
    assert packed.tolist() == [[0x75316420]]


def test_awq_words_of_a_row_follow_n() -> None:
    columns = torch.arange(16, dtype=torch.uint8)[:, None].expand(16, 3) % 16
    assert pack_awq(columns.contiguous()).shape == (3, 2)
    assert unpack_awq(pack_awq(columns.contiguous())).equal(columns)


@given(codes(4, column_multiple=8))
def test_pack_4_bits_is_undone_and_agrees_with_the_reference(array: np.ndarray) -> None:
    words = pack(torch.from_numpy(array), 4)
    assert words.shape == (array.shape[0], array.shape[1] // 8)
    assert np.array_equal(unpack(words, 4).numpy(), array)
    assert np.array_equal(reference.unpack(words.numpy(), 4), array)


@given(codes(8, column_multiple=4))
def test_pack_8_bits_is_undone_and_agrees_with_the_reference(array: np.ndarray) -> None:
    words = pack(torch.from_numpy(array), 8)
    assert words.shape == (array.shape[0], array.shape[1] // 4)
    assert np.array_equal(unpack(words, 8).numpy(), array)
    assert np.array_equal(reference.unpack(words.numpy(), 8), array)


@given(codes(4, row_multiple=8))
def test_pack_awq_is_undone(array: np.ndarray) -> None:
    words = pack_awq(torch.from_numpy(array))
    assert words.shape == (array.shape[1], array.shape[0] // 8)
    assert np.array_equal(unpack_awq(words).numpy(), array)


@given(stnp.arrays(np.int32, st.tuples(SIDES, SIDES)))
def test_unpack_is_undone_for_any_words(words: np.ndarray) -> None:
    tensor = torch.from_numpy(words)
    assert torch.equal(pack(unpack(tensor, 4), 4), tensor)
    assert torch.equal(pack(unpack(tensor, 8), 8), tensor)
    assert torch.equal(pack_awq(unpack_awq(tensor)), tensor)


@pytest.mark.parametrize("bits", [4, 8])
def test_strided_input_is_packed_by_value(bits: int) -> None:
    array = torch.arange(64, dtype=torch.uint8).view(8, 8) & ((1 << bits) - 1)
    assert torch.equal(pack(array.t(), bits), pack(array.t().contiguous(), bits))
    words = pack(array, bits)
    assert torch.equal(unpack(words.t(), bits), unpack(words.t().contiguous(), bits))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_single_row_or_column_is_packed_however_it_lies(bits: int) -> None:
    codes = (torch.arange(32) % (1 << bits)).to(torch.uint8)
    number = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    expected = torch.frombuffer(bytearray(number.to_bytes(4 * bits, "little")), dtype=torch.int32)
    # strides of dimensions of one are anything
    row = torch.empty_strided((1, 32), (1, 1), dtype=torch.uint8).copy_(codes)
    assert torch.equal(pack(row, bits), expected[None])
    words = torch.empty_strided((bits, 1), (1, 7), dtype=torch.int32).copy_(expected[:, None])
    assert torch.equal(unpack(words.t(), bits), codes[None])
    if bits != 3:
        assert torch.equal(unpack(words, bits), codes.view(bits, -1))
