"""Runs SGLang's own Triton kernels in Triton's interpreter and stores what they return.

    TRITON_INTERPRET=1 python -m tests.cpu.triton_kernels OUT.pt

A process of its own: the variable must be set before Triton is imported. The file holds, for every
call, its inputs and its output.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from unittest import mock

import torch

from tests.cpu.triton_interpreter import install

# (tokens, N, K) of SmolLM2-135M's layers, as it is and widened; 576, 192 and 640 are ragged in
# blocks of 128.
SHAPES = [(1, 640, 768), (5, 576, 768), (3, 192, 1536), (17, 1536, 768)]
BLOCK = (128, 128)


def spread(num_rows: int, num_columns: int, generator: torch.Generator) -> torch.Tensor:
    """Normal numbers of magnitudes from 2**-12 to 2**6, in bfloat16; the first row is zero."""
    exponents = torch.randint(-12, 7, (num_rows, 1), generator=generator).float()
    values = torch.randn(num_rows, num_columns, generator=generator) * exponents.exp2()
    values[0] = 0
    return values.bfloat16()


def quantizers(generator: torch.Generator) -> dict[str, list[tuple[torch.Tensor, ...]]]:
    """Calls of the quantizers of activations: input, codes, scales."""
    from sglang.kernels.ops.quantization import fp8_kernel, int8_kernel

    names = ("fp8", "int8", "int8 tokens", "static")
    found: dict[str, list[tuple[torch.Tensor, ...]]] = {name: [] for name in names}
    for num_columns in (576 + 64, 768, 1536):
        x = spread(33, num_columns, generator)
        found["fp8"].append((x, *fp8_kernel._per_token_group_quant_8bit_raw(x, 128)))
        found["int8"].append((x, *int8_kernel.per_token_group_quant_int8(x, 128)))
        found["int8 tokens"].append((x, *int8_kernel.per_token_quant_int8(x)))
        scale = torch.tensor([0.0123])
        found["static"].append((x, *fp8_kernel.static_quant_fp8(x, scale)))
    return found


def block_matmuls(
    generator: torch.Generator, only: str = ""
) -> dict[str, list[tuple[torch.Tensor, ...]]]:
    """Calls of the block matmuls: codes, scales, weight, weight scales, output."""
    from sglang.kernels.ops.gemm import fp8_kernel, int8_kernel

    for module in (fp8_kernel, int8_kernel):
        module.get_device_name = lambda *_: "interpreter"
    kernels = {
        "fp8": (fp8_kernel.w8a8_block_fp8_matmul_triton, torch.float8_e4m3fn),
        "int8": (int8_kernel.w8a8_block_int8_matmul, torch.int8),
    }
    found: dict[str, list[tuple[torch.Tensor, ...]]] = {}
    for name, (kernel, dtype) in kernels.items():
        if only not in ("", name):
            continue
        for num_tokens, N, K in SHAPES:
            left = torch.randn(num_tokens, K, generator=generator).mul_(40).to(dtype)
            right = torch.randn(N, K, generator=generator).mul_(40).to(dtype)
            scales = torch.rand(num_tokens, K // 128, generator=generator).add_(0.01)
            grid = torch.rand(-(-N // 128), K // 128, generator=generator).add_(0.01)
            out = kernel(left, right, scales, grid, list(BLOCK), torch.bfloat16)
            found.setdefault(name, []).append((left, scales, right, grid, out))
    return found


def hopper_matmuls(generator: torch.Generator) -> list[tuple[torch.Tensor, ...]]:
    """Calls of the block FP8 matmul as tuned for Hopper: sides exchanged, K in two parts, both."""
    from sglang.kernels.ops.gemm import fp8_kernel

    found: list[tuple[torch.Tensor, ...]] = []
    for changes in ({"SWAP_AB": True}, {"SPLIT_K": 2}, {"SWAP_AB": True, "SPLIT_K": 2}):
        tiles = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1}
        config = {**tiles, "num_warps": 4, "num_stages": 3, **changes}
        with (
            mock.patch.object(
                fp8_kernel, "get_platform", return_value=SimpleNamespace(is_sm90=True)
            ),
            mock.patch.object(
                fp8_kernel, "get_w8a8_block_fp8_configs", lambda *_, held=config: {1: held}
            ),
        ):
            found += block_matmuls(generator, only="fp8")["fp8"]
    return found


def channel_matmuls(generator: torch.Generator) -> list[tuple[torch.Tensor, ...]]:
    """Calls of triton_scaled_mm: codes, scales, weight, channel scales, output."""
    from sglang.kernels.ops.gemm.fp8_kernel import triton_scaled_mm

    found = []
    for num_tokens, N, K in SHAPES:
        left = torch.randn(num_tokens, K, generator=generator).to(torch.float8_e4m3fn)
        right = torch.randn(N, K, generator=generator).to(torch.float8_e4m3fn)
        scales = torch.rand(num_tokens, 1, generator=generator).add_(0.01)
        channels = torch.rand(N, 1, generator=generator).add_(0.01)
        out = triton_scaled_mm(left, right.t(), scales, channels, torch.bfloat16)
        found.append((left, scales, right, channels, out))
    return found


def awq_weights(generator: torch.Generator) -> list[tuple[torch.Tensor, ...]]:
    """Calls of awq_dequantize_triton: qweight, qzeros, scales, weight [K, N]."""
    from sglang.kernels.ops.quantization.awq_triton import awq_dequantize_triton

    found = []
    words = torch.iinfo(torch.int32)
    for N, K, group_size in ((576, 576, 64), (640, 768, 128), (1536, 768, 32)):
        num_groups = K // group_size
        qweight = torch.randint(words.min, words.max, (K, N // 8), generator=generator).int()
        qzeros = torch.randint(words.min, words.max, (num_groups, N // 8), generator=generator)
        for dtype in (torch.bfloat16, torch.float16):
            scales = torch.rand(num_groups, N, generator=generator).to(dtype)
            out = awq_dequantize_triton(qweight, scales, qzeros.int())
            found.append((qweight, qzeros.int(), scales, out))
    return found


def main(path: str) -> None:
    """Run every kernel and write the file."""
    install()
    generator = torch.Generator().manual_seed(0)
    results = {
        "quantizers": quantizers(generator),
        "block_matmuls": block_matmuls(generator),
        "hopper_matmuls": hopper_matmuls(generator),
        "channel_matmuls": channel_matmuls(generator),
        "awq_weights": awq_weights(generator),
    }
    torch.save(results, path)


if __name__ == "__main__":
    main(sys.argv[1])
