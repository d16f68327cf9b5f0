"""humming-kernels' own packing, compiled for the CPU out of the installed package.

`common_pack_weight` and `common_unpack_weight` are plain C++; what a GPU alone knows of the file
that they are in stands for nothing here.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
from pathlib import Path

import numpy as np
import torch

_GPU_WORDS = """
#pragma once
#include <cstdint>
#define CUDA_INLINE inline
#define PRAGMA_UNROLL
#define PRAGMA_UNROLL_COUNT(n)
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define __global__
static struct { uint32_t x; } blockIdx, threadIdx;
"""
_DOORS = """
#include "humming/kernel/pack_weight.cuh"
#define DOORS(bits) \\
  extern "C" void pack_##bits(uint32_t *codes, uint32_t *words) \\
  { common_pack_weight<bits>(codes, words); } \\
  extern "C" void unpack_##bits(uint32_t *words, uint32_t *codes) \\
  { common_unpack_weight<bits>(words, codes); }
DOORS(2) DOORS(3) DOORS(4) DOORS(5) DOORS(6) DOORS(7) DOORS(8)
"""
_SOURCE = Path("include/humming/kernel/pack_weight.cuh")


def package() -> Path:
    """The folder of humming-kernels, which is not imported."""
    spec = importlib.util.find_spec("humming")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


class OwnCode:
    """humming's functions on 32 codes at a time.

    Args:
        folder: to compile in.
    """

    def __init__(self, folder: Path) -> None:
        kernel, words = folder / "humming" / "kernel", folder / "humming" / "utils"
        for made in (kernel, words):
            made.mkdir(parents=True)
        (words / "all.cuh").write_text(_GPU_WORDS)
        (kernel / "pack_weight.cuh").write_text((package() / _SOURCE).read_text())
        (folder / "doors.cpp").write_text(_DOORS)
        library = folder / "doors.so"
        command = ["g++", "-O1", "-shared", "-fPIC", f"-I{folder}", "-o", library]
        subprocess.run([*command, folder / "doors.cpp"], check=True)
        self._library = ctypes.CDLL(str(library))

    def pack(self, codes: torch.Tensor, bits: int) -> torch.Tensor:
        """[N, K] of any integers -> int32 [N, K*bits/32]."""
        return self._run(f"pack_{bits}", codes, 32, bits)

    def unpack(self, words: torch.Tensor, bits: int) -> torch.Tensor:
        """int32 [N, K*bits/32] -> int32 [N, K]."""
        return self._run(f"unpack_{bits}", words, bits, 32)

    def _run(self, name: str, given: torch.Tensor, taken: int, made: int) -> torch.Tensor:
        rows = np.ascontiguousarray(given.numpy().astype(np.int32)).reshape(-1, taken)
        out = np.zeros((len(rows), made), dtype=np.int32)
        for row, result in zip(rows, out, strict=True):
            getattr(self._library, name)(
                row.ctypes.data_as(ctypes.c_void_p), result.ctypes.data_as(ctypes.c_void_p)
            )
        return torch.from_numpy(out.reshape(len(given), -1))
