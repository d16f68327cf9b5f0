"""humming's kernels for the least card, for one of warp groups, and for the newest."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dryrun.humming_compile import BITS
from tests.dryrun.matrix import prepare, run_module


@pytest.mark.parametrize(
    "title", ["RTX 2080 Ti", "H100", pytest.param("RTX 5090", marks=pytest.mark.every_card)]
)
def test_kernels_compile_for_the_card(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what is beside NVRTC is found without it
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    prepare(tmp_path)
    made = run_module("humming_compile", title, tmp_path)
    assert set(made) == {f"{kernel} {bits}" for kernel in ("humming", "weight_repack_nk")
                         for bits in BITS}  # fmt: skip
    assert len(set(made.values())) == len(made)
    # machine code of the card, as CUDA's ELF files have it
    assert all(Path(file).read_bytes().startswith(b"\x7fELF") for file in made.values())
