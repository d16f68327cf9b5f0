from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mixedprec_plugin.checkpoint.headers import StoredTensor, read_header
from mixedprec_plugin.checkpoint.values import Values, are_equal
from mixedprec_plugin.errors import CheckpointError


def written(folder: Path, tensor: torch.Tensor) -> StoredTensor:
    path = folder / "model.safetensors"
    save_file({"before": torch.ones(3), "x": tensor}, path)
    return read_header(path)["x"]


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32, torch.uint8]
)
def test_values_are_those_that_torch_reads(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = (torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 9).abs().to(dtype)
    stored = written(tmp_path, tensor)
    values = Values()
    assert np.array_equal(values.of(stored), tensor.float().numpy())
    assert np.array_equal(values.rows(stored, [4, 1]), tensor.float().numpy()[[4, 1]])


def test_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    stored = written(tmp_path, torch.ones(100))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ends inside 'x'; it changed"):
        Values().of(stored)


def test_dtype_that_numpy_lacks_is_an_error(tmp_path: Path) -> None:
    stored = written(tmp_path, torch.ones(4).to(torch.float8_e4m3fn))
    assert not Values.can_read(stored)
    with pytest.raises(CheckpointError, match="'x' is F8_E4M3, whose values the plan cannot read"):
        Values().of(stored)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_copies_are_equal_and_others_are_not(dtype: torch.dtype) -> None:
    original = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    name = {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    rounded = original.to(dtype).float().numpy()
    assert are_equal(original.numpy(), rounded, ("F32", name))
    changed = rounded.copy()
    changed[7] *= 1.02
    assert not are_equal(original.numpy(), changed, ("F32", name))
    assert not are_equal(original.numpy(), rounded[:-1], ("F32", name))
    assert not are_equal(original.numpy(), rounded, ("F32", "F32"))
