"""Compiles the kernels that the tests of layers reach, at once, so that no test waits for one.

python -m tests.gpu.kernels [JOBS]

Needs CUDA_HOME. They go where SGLANG_JIT_CACHE_DIR says; without a GPU they are made for an H100,
and taken by one whose compiler and packages are the same.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

Compile = tuple[str, Callable[..., Any], tuple[Any, ...]]
_BF16, _FP16, _FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn


def reached() -> list[Compile]:
    """Name, function and arguments of each module, those that take longest first."""
    from sglang.kernels.ops.activation import activation
    from sglang.kernels.ops.gemm import gptq_marlin
    from sglang.kernels.ops.moe import moe_align, moe_align_single_token, moe_wna16_marlin
    from sglang.kernels.ops.quantization import (
        awq_dequantize,
        awq_marlin_repack,
        gptq_marlin_repack,
        per_tensor_quant_fp8,
        per_token_group_quant,
        per_token_quant_fp8,
    )

    experts = moe_wna16_marlin._jit_moe_wna16_marlin_module
    whole = per_tensor_quant_fp8.per_tensor_quant_fp8_module
    groups = per_token_group_quant._jit_module
    return [
        ("moe_wna16_marlin, w13", experts, (_BF16, False, False, True, False, True)),
        ("moe_wna16_marlin, w2", experts, (_BF16, False, False, True, True, True)),
        ("gptq_marlin", gptq_marlin._jit_gptq_marlin_module, (_BF16,)),
        ("gptq_marlin_repack", gptq_marlin_repack._jit_gptq_marlin_repack_module, ()),
        ("awq_marlin_repack", awq_marlin_repack._jit_awq_marlin_repack_module, ()),
        *(
            (f"per_token_group_quant, {dtype}, rows {rows}", groups,
             (_BF16, dtype, 128, False, rows, True, False, False, True))
            for dtype, rows in ((_FP8, False), (_FP8, True), (torch.int8, True))
        ),
        ("per_token_quant_fp8", per_token_quant_fp8._jit_per_token_quant_fp8_module, (_BF16,)),
        ("activation", activation.activation_module, (_BF16,)),
        # where SGLang rounds experts again at load, and of activations
        ("per_tensor_quant_fp8, static", whole, (True, _FP16)),
        ("per_tensor_quant_fp8", whole, (False, _BF16)),
        ("moe_align_block_size", moe_align._jit_moe_align_module, (torch.int32, True, False)),
        ("align_single_token", moe_align_single_token._jit_align_single_token_module, (True,)),
        *(
            (f"awq_dequantize, {dtype}", awq_dequantize._jit_awq_dequantize_module, (dtype,))
            for dtype in (_BF16, _FP16)
        ),
    ]  # fmt: skip


def _compile(what: Compile) -> str:
    name, function, arguments = what
    start = time.perf_counter()
    try:
        function(*arguments)
    # the others are compiled all the same
    except Exception as error:  # noqa: BLE001
        return f"{name}: {str(error)[-600:]}"
    return f"{name}: {time.perf_counter() - start:.0f} s"


@contextlib.contextmanager
def _for_an_h100() -> Any:
    """Stand in for a driver, and load nothing of what was compiled."""
    from tests.dryrun.driver import compile_stub, load_stub

    load_stub(compile_stub(Path(tempfile.mkdtemp())))
    from sglang.kernels.jit.utils.arch import override_jit_cuda_arch
    from sglang.kernels.jit.utils.compile import loader

    loader._load = lambda library: library
    with override_jit_cuda_arch(9, 0):
        yield


def main(num_jobs: str = "8") -> None:
    """Compile all, and print how long each took."""
    warnings.simplefilter("ignore")
    target = contextlib.nullcontext() if torch.cuda.is_available() else _for_an_h100()
    with target, ThreadPoolExecutor(int(num_jobs)) as pool:
        for line in pool.map(_compile, reached()):
            print(line, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
