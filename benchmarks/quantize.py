"""Speed of the quantizers, in seconds a GB of bf16 weight.

    python -m benchmarks.quantize [--rows 4096] [--columns 4096] [--threads 1] [--device cuda]
        [--case NAME ...]

Every method is timed beside the obvious torch implementation of the usual formula on whole tensors,
the peer. Where there is no usual one, and of the way back and of repacking (the same numbers stored
again), the peer is our own torch code, which runs where loops are not compiled. A copy of the
weight is the same bytes without arithmetic. `MiB beside` is the growth of a process's peak memory
beyond the returned tensors.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import Figure, keep
from mixedprec_plugin.methods.registry import METHODS, bind
from mixedprec_plugin.quantize import chunks
from mixedprec_plugin.quantize.codec import Codec, load_codec
from mixedprec_plugin.quantize.integers import Integers

Tensors = dict[str, torch.Tensor]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8": ("fp8", {}),
    "fp8 128x128": ("fp8_block", {}),
    "fp8_channel": ("fp8_channel", {}),
    "blockwise_int8 128x128": ("blockwise_int8", {}),
    "int8_channel": ("int8_channel", {}),
    "awq 4 bits, group 128": ("awq", {"group_size": 128}),
    "gptq 4 bits, group 128": ("gptq", {"bits": 4, "group_size": 128}),
    "gptq 8 bits, group 128": ("gptq", {"bits": 8, "group_size": 128}),
    "nvfp4": ("nvfp4", {}),
    "mxfp4": ("mxfp4", {}),
    "humming 6 bits, group 128": ("humming", {"bits": 6, "group_size": 128}),
}
# seconds that a GB of bf16 may take
LIMIT = 1.0


def case(name: str) -> tuple[Codec, dict[str, Any]]:
    """A method's codec, and its arguments."""
    method, arguments = bind(*CASES[name])
    return load_codec(METHODS[method].codec), arguments


def naive(name: str, weight: torch.Tensor, arguments: Mapping[str, Any]) -> Tensors | None:
    """Quantize by the formula, as one would write it first; None where there is no usual one."""
    if name.endswith("fp4") or name.startswith("humming"):
        return None
    values = weight.float()
    N, K = values.shape
    if "channel" in name:
        largest = 448 if name.startswith("fp8") else 127
        channels = values.abs().amax(1, keepdim=True) / largest
        scaled = values / channels
        codes = scaled.to(torch.float8_e4m3fn) if largest == 448 else scaled.round().to(torch.int8)
        return {"weight": codes, "weight_scale": channels}
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


def gigabytes(weight: torch.Tensor) -> float:
    """Bytes of a weight, in GB."""
    return weight.numel() * weight.itemsize / 1e9


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Least seconds of some calls, after one that is not counted.

    Of the processor where the process has one thread: another process's do not count.
    """
    on_device = torch.get_default_device().type == "cuda"
    wait = torch.cuda.synchronize if on_device else int
    alone = not on_device and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    function()
    wait()
    times = []
    for _ in range(repeats):
        start = clock()
        function()
        wait()
        times.append(clock() - start)
    return min(times)


@contextlib.contextmanager
def by_torch() -> Iterator[None]:
    """No weight is large enough for compiled loops."""
    least = chunks.LEAST_COMPILED
    chunks.LEAST_COMPILED = math.inf
    try:
        yield
    finally:
        chunks.LEAST_COMPILED = least


def measure(name: str, weight: torch.Tensor, repeats: int) -> list[Figure]:
    """Time one method on one weight, and compare what it makes with the formula's."""
    codec, arguments = case(name)
    dtype = torch.bfloat16
    tensors = codec.quantize(weight, arguments, dtype)
    by_formula = naive(name, weight, arguments)

    def speed(function: Callable[[], object]) -> float:
        return seconds(function, repeats) / gigabytes(weight)

    def beside(function: Callable[[], object]) -> tuple[float, float | None]:
        ours = speed(function)
        if weight.device.type != "cpu":
            return ours, None
        with by_torch():
            return ours, speed(function)

    def error(made: Tensors) -> float:
        again = codec.read(made, arguments).dequantize()
        return float((again - weight.float()).norm() / weight.float().norm())

    def quantize() -> Tensors:
        return codec.quantize(weight, arguments, dtype)

    if by_formula is None:
        there, usual = beside(quantize)
    else:
        there, usual = speed(quantize), speed(lambda: naive(name, weight, arguments))
    usual_error = error(by_formula) if by_formula else None
    back = beside(lambda: codec.read(tensors, arguments).dequantize())
    figures = [
        Figure(f"{name}, s a GB", there, usual, LIMIT),
        Figure(f"{name}, back, s a GB", *back, LIMIT),
        Figure(f"{name}, relative RMS", error(tensors), usual_error),
    ]
    numbers = codec.read(tensors, arguments)
    if isinstance(numbers, Integers):
        again = beside(lambda: codec.write(numbers, arguments, dtype))
        figures.insert(2, Figure(f"{name}, repacked, s a GB", *again, LIMIT))
    return figures


def temporary_bytes(name: str, N: int, K: int) -> int:
    """Peak growth of a fresh process while it quantizes, beyond the tensors that it returns."""
    command = [sys.executable, "-m", "benchmarks.quantize", "--peak", name]
    command += ["--rows", str(N), "--columns", str(K)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout)


def print_peak(name: str, weight: torch.Tensor) -> None:
    """Print the growth of this process's peak memory, beyond the result, in bytes."""
    codec, arguments = case(name)
    # Threads, code and allocator are there before the peak is read.
    codec.quantize(weight[:256].clone(), arguments, torch.bfloat16)
    # Importing torch peaks higher than what follows: start the high-water mark from here.
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_kib()
    tensors = codec.quantize(weight, arguments, torch.bfloat16)
    grown = (peak_kib() - before) * 1024
    print(max(0, grown - sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())))


def peak_kib() -> int:
    """The high-water mark of this process's resident memory, as Linux keeps it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise OSError("/proc/self/status has no VmHWM")


def main() -> None:
    """Measure every method, or some."""
    parser = argparse.ArgumentParser(description="Speed of the quantizers.")
    parser.add_argument("--rows", type=int, default=4096, help="N, a multiple of 128")
    parser.add_argument("--columns", type=int, default=4096, help="K, a multiple of 128")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", action="append", choices=CASES, help="repeatable")
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
    figures = [Figure("copy, s a GB", seconds(weight.clone, options.repeats) / gigabytes(weight))]
    for name in options.case or CASES:
        figures += measure(name, weight, options.repeats)
        if options.device == "cpu":
            peak = temporary_bytes(name, options.rows, options.columns) / 2**20
            figures.append(Figure(f"{name}, MiB beside", peak))
    keep("quantize", figures)


if __name__ == "__main__":
    main()
