"""Run the GPU tests and the speed benchmarks in order of worth, each in a process of its own.

    python -m tests.gpu.in_order --out DIR [--only NAME ...] [--minutes 28]

`DIR/results.jsonl` gets a line after each test and after each step: what is cut off anywhere leaves
what was measured before. `DIR/NAME.log` holds what a step printed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

RESULTS = "MIXEDPREC_GPU_RESULTS"
_ROOT = Path(__file__).resolve().parents[2]
_FACTS = """
import json, time
start = time.perf_counter()
import torch
torch_s, start = time.perf_counter() - start, time.perf_counter()
card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
cuda_s, start = time.perf_counter() - start, time.perf_counter()
import sglang.srt.entrypoints.engine, sglang
from mixedprec_plugin.serving import loader
print(json.dumps({"card": card, "torch": torch.__version__, "sglang": sglang.__version__,
    "torch_s": torch_s, "cuda_s": cuda_s, "sglang_s": time.perf_counter() - start}))
"""


class Step(NamedTuple):
    """One process.

    Attributes:
        arguments: of python.
        minutes: that it gets at most.
    """

    name: str
    arguments: tuple[str, ...]
    minutes: float


def _tests(name: str, minutes: float, *arguments: str) -> Step:
    return Step(name, ("-m", "pytest", "-q", *arguments), minutes)


STEPS = (
    Step("facts", ("-c", _FACTS), 5),
    _tests("start", 4, "tests/gpu/test_presets.py"),
    _tests("decode", 8, "tests/gpu/test_speed.py"),
    Step("composite", ("-m", "benchmarks.composite_experts", "--device", "cuda"), 3),
    _tests("quantize", 3, "tests/gpu/test_quantize_on_device.py"),
    Step("quantizers", ("-m", "benchmarks.quantize", "--device", "cuda"), 2),
    _tests("layers", 6, "tests/gpu/test_layers.py", "tests/gpu/test_experts.py"),
    _tests("kernels", 4, "tests/gpu/test_marlin.py", "tests/gpu/test_triton.py"),
    _tests("serving", 10, "tests/gpu/test_serving.py", "tests/gpu/test_serving_converted.py"),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the steps; 0 if all of them succeeded."""
    parser = argparse.ArgumentParser(description="The GPU tests and benchmarks, by worth.")
    parser.add_argument("--out", type=Path, required=True, help="folder of results and logs")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS])
    parser.add_argument("--minutes", type=float, default=28, help="for all of them")
    options = parser.parse_args(arguments)
    steps = [step for step in STEPS if not options.only or step.name in options.only]
    return run(steps, options.out, options.minutes)


def run(steps: Sequence[Step], out: Path, minutes: float) -> int:
    """Run steps one after the other, until the time is spent."""
    out.mkdir(parents=True, exist_ok=True)
    results, end = out.absolute() / "results.jsonl", time.monotonic() + 60 * minutes
    environment = {**os.environ, RESULTS: str(results)}
    codes = []
    for step in steps:
        left = min(60 * step.minutes, end - time.monotonic())
        start = time.monotonic()
        code = _run(step, out / f"{step.name}.log", environment, left) if left > 0 else None
        seconds = round(time.monotonic() - start, 1)
        note(results, {"step": step.name, "code": code, "seconds": seconds})
        print(f"{step.name}: {'no time left' if code is None else code}, {seconds} s", flush=True)
        codes.append(code)
    return int(any(code != 0 for code in codes))


def _run(step: Step, log: Path, environment: Mapping[str, str], seconds: float) -> int:
    """The exit code of a step; 124 where it took too long."""
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, *step.arguments]
        try:
            done = subprocess.run(
                command, cwd=_ROOT, env=environment, stdout=file, stderr=file, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return 124
    return done.returncode


def note(results: Path, line: Mapping[str, object]) -> None:
    """Add a line to the results, on disk when this returns."""
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    raise SystemExit(main())
