"""What every quantizer promises, whatever it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mixedprec_plugin.methods.registry import METHODS
from mixedprec_plugin.quantize import chunks
from tests.quantize.methods import CASES, MODULES, Case

SAFETENSORS_NAMES = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
}
methods = pytest.mark.parametrize("method", CASES, ids=str)


def bell(N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    values = torch.randn(N, K, generator=torch.Generator().manual_seed(N * K)) * 0.02
    return values.to(dtype)


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for suffix, tensor in ours.items():
        other = theirs[suffix]
        assert tensor.dtype == other.dtype
        assert torch.equal(tensor.float(), other.float()), suffix


@methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_tensors_are_those_of_the_registry(method: Case, dtype: torch.dtype) -> None:
    name = SAFETENSORS_NAMES[dtype]
    specs = METHODS[method.method].stored(method.arguments, 200, 576, name)
    tensors = method.quantize(bell(200, 576), dtype)
    assert {key: (SAFETENSORS_NAMES[t.dtype], tuple(t.shape)) for key, t in tensors.items()} == {
        key: (spec.dtype, spec.shape) for key, spec in specs.items()
    }


def test_the_registry_names_these_functions() -> None:
    for name, module in MODULES.items():
        assert METHODS[name].codec == module.__name__


@methods
def test_input_is_not_modified(method: Case) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        weight = bell(64, 128, dtype)
        before = weight.clone()
        tensors = method.quantize(weight)
        assert torch.equal(weight, before)
        kept = {suffix: tensor.clone() for suffix, tensor in tensors.items()}
        method.dequantize(tensors)
        assert_same(tensors, kept)


@methods
def test_stored_tensors_are_contiguous_and_their_own(method: Case) -> None:
    for tensor in method.quantize(bell(64, 128)).values():
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize


@methods
@pytest.mark.parametrize("chunk_bytes", [1, 40_000, 1 << 30])
def test_result_does_not_depend_on_the_chunks(
    method: Case, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = bell(328, 576)
    expected = method.quantize(weight)
    expected_weight = method.dequantize(expected)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", chunk_bytes)
    assert_same(method.quantize(weight), expected)
    assert torch.equal(method.dequantize(expected), expected_weight)


@methods
def test_strided_and_grad_weights_are_quantized_by_value(method: Case) -> None:
    weight = bell(64, 128)
    expected = method.quantize(weight)
    assert_same(method.quantize(weight.t().contiguous().t()), expected)
    parameter = torch.nn.Parameter(weight)
    with torch.no_grad():
        assert_same(method.quantize(parameter), expected)


class LargestTemporary(TorchDispatchMode):
    """Remember the size of every storage that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.sizes[storage.data_ptr()] = max(
                    storage.nbytes(), self.sizes.get(storage.data_ptr(), 0)
                )
        return result

    def beyond(self, *kept: torch.Tensor) -> int:
        """The largest storage that is not one of those."""
        own = {tensor.untyped_storage().data_ptr() for tensor in kept}
        return max(size for address, size in self.sizes.items() if address not in own)


@methods
def test_temporaries_do_not_grow_with_the_weight(method: Case) -> None:
    weight = bell(2048, 4096)
    with LargestTemporary() as quantizing:
        tensors = method.quantize(weight)
    limit = 2 * chunks.CHUNK_BYTES
    assert quantizing.beyond(weight, *tensors.values()) <= limit
    with LargestTemporary() as dequantizing:
        again = method.dequantize(tensors)
    assert dequantizing.beyond(again, *tensors.values()) <= limit
