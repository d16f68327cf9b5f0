"""Speed of the quantizers, in GB of bf16 weight a second.

    python benchmarks/quantize.py [--rows 4096] [--columns 4096] [--threads 1] [--device cuda]
        [--json]

Every method is timed beside a copy of the weight (the same bytes, no arithmetic) and beside the
obvious torch implementation of the usual formula on whole tensors, whose relative RMS error is
printed too. `temporary` is the growth of a process's peak memory beyond the returned tensors.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mixedprec_plugin.methods.awq import codec as awq
from mixedprec_plugin.methods.blockwise_int8 import codec as blockwise_int8
from mixedprec_plugin.methods.fp8 import codec as fp8
from mixedprec_plugin.methods.gptq import codec as gptq

Tensors = dict[str, torch.Tensor]
CASES: dict[str, tuple[ModuleType, dict[str, Any]]] = {
    "fp8": (fp8, {"weight_block_size": None}),
    "fp8 128x128": (fp8, {"weight_block_size": [128, 128]}),
    "blockwise_int8 128x128": (blockwise_int8, {"weight_block_size": [128, 128]}),
    "awq 4 bits, group 128": (awq, {"group_size": 128}),
    "gptq 4 bits, group 128": (gptq, {"bits": 4, "group_size": 128}),
    "gptq 8 bits, group 128": (gptq, {"bits": 8, "group_size": 128}),
}


def naive(name: str, weight: torch.Tensor, arguments: Mapping[str, Any]) -> Tensors:
    """Quantize by the formula, as one would write it first."""
    values = weight.float()
    N, K = values.shape
    if name == "fp8":
        scale = values.abs().max() / 448
        return {"weight": (values / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
    if "128x128" in name:
        largest = 448 if name.startswith("fp8") else 127
        blocks = values.view(N // 128, 128, K // 128, 128)
        scales = blocks.abs().amax((1, 3)) / largest
        scaled = (blocks / scales[:, None, :, None]).view(N, K)
        codes = scaled.to(torch.float8_e4m3fn) if largest == 448 else scaled.round().to(torch.int8)
        return {"weight": codes, "weight_scale_inv": scales}
    groups = values.view(N, K // 128, 128)
    if name.startswith("gptq"):
        return _naive_gptq(groups, arguments["bits"])
    return _naive_awq(groups)


def _naive_gptq(groups: torch.Tensor, bits: int) -> Tensors:
    N, num_groups, group_size = groups.shape
    half, pack_factor = 1 << (bits - 1), 32 // bits
    scales = (groups.abs().amax(-1, keepdim=True) / (half - 0.5)).bfloat16()
    codes = (groups / scales.float()).round().add(half).clamp(0, 2 * half - 1).to(torch.int32)
    words = codes.view(N, -1, pack_factor).permute(2, 1, 0)
    zeros = torch.full((pack_factor, num_groups, N // pack_factor), half - 1, dtype=torch.int32)
    return {
        "qweight": _pack(words, range(pack_factor), bits),
        "qzeros": _pack(zeros, range(pack_factor), bits),
        "scales": scales.squeeze(-1).t().contiguous(),
        "g_idx": torch.arange(num_groups * group_size, dtype=torch.int32) // group_size,
    }


def _naive_awq(groups: torch.Tensor) -> Tensors:
    N = len(groups)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scales = ((high - low) / 15).bfloat16()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = ((groups / scales.float()).round() + zeros).clamp(0, 15).to(torch.int32)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    by_column = codes.view(N // 8, 8, -1).permute(1, 2, 0)
    zeros_by_column = zeros.to(torch.int32).view(N // 8, 8, -1).permute(1, 2, 0)
    return {
        "qweight": _pack(by_column, order, 4),
        "qzeros": _pack(zeros_by_column, order, 4),
        "scales": scales.squeeze(-1).t().contiguous(),
    }


def _pack(columns: torch.Tensor, order: Any, bits: int) -> torch.Tensor:
    words = torch.zeros(columns.shape[1:], dtype=torch.int32)
    for place, column in enumerate(order):
        words |= columns[column] << (bits * place)
    return words


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Least time of some calls, after one that is not counted."""
    wait = torch.cuda.synchronize if torch.get_default_device().type == "cuda" else int
    function()
    wait()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(name: str, weight: torch.Tensor, repeats: int) -> dict[str, Any]:
    """Time one method on one weight."""
    module, arguments = CASES[name]
    dtype = torch.bfloat16
    gigabytes = weight.numel() * weight.itemsize / 1e9
    tensors: Tensors = module.quantize(weight, arguments, dtype)
    again = module.read(tensors, arguments).dequantize()
    row: dict[str, Any] = {
        "method": name,
        "quantize_gb_s": gigabytes
        / seconds(lambda: module.quantize(weight, arguments, dtype), repeats),
        "dequantize_gb_s": gigabytes
        / seconds(lambda: module.read(tensors, arguments).dequantize(), repeats),
        "relative_rms": float((again - weight.float()).norm() / weight.float().norm()),
        "memcpy_gb_s": gigabytes / seconds(weight.clone, repeats),
        "naive_gb_s": None,
        "naive_relative_rms": None,
    }
    by_formula = naive(name, weight, arguments)
    if by_formula is not None:
        again = module.read(by_formula, arguments).dequantize()
        row["naive_relative_rms"] = float((again - weight.float()).norm() / weight.float().norm())
        row["naive_gb_s"] = gigabytes / seconds(lambda: naive(name, weight, arguments), repeats)
    return row


def temporary_bytes(name: str, N: int, K: int) -> int:
    """Peak growth of a fresh process while it quantizes, beyond the tensors that it returns."""
    command = [sys.executable, __file__, "--rows", str(N), "--columns", str(K), "--peak", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout)


def print_peak(name: str, weight: torch.Tensor) -> None:
    """Print the growth of this process's peak memory, beyond the result, in bytes."""
    module, arguments = CASES[name]
    # Threads, code and allocator are there before the peak is read.
    module.quantize(weight[:256].clone(), arguments, torch.bfloat16)
    # Importing torch peaks higher than what follows: start the high-water mark from here.
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_kib()
    tensors: Tensors = module.quantize(weight, arguments, torch.bfloat16)
    grown = (peak_kib() - before) * 1024
    print(max(0, grown - sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())))


def peak_kib() -> int:
    """The high-water mark of this process's resident memory, as Linux keeps it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise OSError("/proc/self/status has no VmHWM")


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the measurements for people."""
    print(
        f"{'method':26}{'quantize':>9}{'of memcpy':>11}{'x naive':>9}{'dequantize':>12}"
        f"{'rel. RMS':>10}{'naive':>8}{'temporary':>11}"
    )
    for row in rows:
        speed, by_formula = row["quantize_gb_s"], row["naive_gb_s"]
        faster = f"{speed / by_formula:.1f}" if by_formula else "-"
        rms = f"{row['naive_relative_rms']:.4f}" if by_formula else "-"
        print(
            f"{row['method']:26}{speed:9.2f}{speed / row['memcpy_gb_s']:11.2f}{faster:>9}"
            f"{row['dequantize_gb_s']:12.2f}{row['relative_rms']:10.4f}{rms:>8}"
            f"{row['temporary_bytes'] / 2**20:7.1f} MiB"
        )
    print(f"GB of bf16 a second; memcpy {rows[0]['memcpy_gb_s']:.2f}; bell-shaped random weight")


def main() -> None:
    """Measure every method and print a table or JSON."""
    parser = argparse.ArgumentParser(description="Speed of the quantizers.")
    parser.add_argument("--rows", type=int, default=4096, help="N, a multiple of 128")
    parser.add_argument("--columns", type=int, default=4096, help="K, a multiple of 128")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(options.rows, options.columns, dtype=torch.bfloat16)
    weight.normal_(std=0.02, generator=generator)
    if options.peak:
        print_peak(options.peak, weight)
        return
    torch.set_default_device(options.device)
    weight = weight.to(options.device)
    rows = []
    for name in CASES:
        row = measure(name, weight, options.repeats)
        row["temporary_bytes"] = temporary_bytes(name, options.rows, options.columns)
        rows.append(row)
    if options.json:
        print(json.dumps({"shape": [options.rows, options.columns], "methods": rows}, indent=1))
    else:
        print_table(rows)


if __name__ == "__main__":
    main()
