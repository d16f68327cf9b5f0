from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixedprec_plugin.checkpoint.headers import StoredTensor, read_header
from mixedprec_plugin.checkpoint.together import ranges, read_together


def _read(path: Path, stored: list[StoredTensor]) -> list[torch.Tensor] | None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return read_together(descriptor, stored)
    finally:
        os.close(descriptor)


def test_any_order_gaps_and_dtypes_are_what_the_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    generator = torch.Generator().manual_seed(0)
    made = {f"w{i}": torch.randn(3 + i, 5, generator=generator) for i in range(9)}
    made |= {f"s{i}": torch.randn(7, generator=generator).bfloat16() for i in range(9)}
    made |= {f"q{i}": torch.arange(i, i + 11) for i in range(3)}
    made["scalar"] = torch.tensor(0.5)
    save_file(made, path)
    stored, expected = read_header(path), load_file(path)
    wanted = [stored[name] for name in reversed(list(made)) if name not in ("w3", "s5")]
    assert len(list(ranges(wanted))) == 3
    read = _read(path, wanted)
    assert read is not None
    for tensor, value in zip(wanted, read, strict=True):
        assert torch.equal(value, expected[tensor.name])
        assert value.dtype == expected[tensor.name].dtype
    # what is followed by its storage must have one
    assert len({int(value.untyped_storage()._cdata) for value in read}) == len(read)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_numbers_that_are_not_finite_are_left_to_whom_can_name_them(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    path = tmp_path / "a.safetensors"
    values = torch.ones(64)
    save_file({"a": values.to(dtype), "b": (2 * values).to(dtype)}, path)
    assert _read(path, list(read_header(path).values())) is not None
    values[9] = float("nan")
    save_file({"a": torch.ones(64).to(dtype), "b": values.to(dtype)}, path)
    assert _read(path, list(read_header(path).values())) is None


def test_file_that_is_cut_short_is_left_to_whom_can_name_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(64), "b": torch.ones(64)}, path)
    stored = list(read_header(path).values())
    os.truncate(path, path.stat().st_size - 4)
    assert _read(path, stored) is None
