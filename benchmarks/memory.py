"""Measure how far loading a model with a preset raises the process's resident memory.

    python -m benchmarks.memory [--preset NAME ...] [--out docs/memory.md]

For each shipped preset a fresh process builds the engine's model runner. Its loader is called
twice: once to import and warm up everything, and again after that model was dropped and free memory
given back. Before the second call the kernel's high-water mark of resident memory is reset and the
resident memory noted: the baseline, an interpreter with SGLang and torch. What the peak adds to it
must stay below the final model plus one decoder layer in bf16.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from demo.model import checkpoint

ROOT = Path(__file__).resolve().parents[1]
PRESETS = ROOT / "configs" / "presets"
STOCK = "(bf16, stock SGLang)"
_MIB = 2**20
_MARK = "MEMORY "


class MeasurementError(Exception):
    """The measuring process failed."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One load's resident memory, all in bytes.

    Attributes:
        baseline: before the loader is called, everything imported.
        peak: the highest while it runs.
        model: parameters and buffers of the loaded model, each storage once.
        layer: one decoder layer in bf16.
        seconds: what the loader took.
    """

    preset: str
    baseline: int
    peak: int
    model: int
    layer: int
    seconds: float

    @property
    def is_within(self) -> bool:
        """Whether the peak keeps to the final model, one layer and the baseline."""
        return self.peak <= self.baseline + self.model + self.layer


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write the table; return 1 if a preset is over its limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("--preset", action="append", help="name of a shipped preset; repeatable")
    parser.add_argument("--out", type=Path, help="write the table here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        _load_and_report(options.child)
        return 0
    names = options.preset or [STOCK, *sorted(path.stem for path in PRESETS.glob("*.yaml"))]
    results = []
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results.append(measure(name))
    print(table(results))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        page = _PAGE.format(sglang=version("sglang"), table=table(results))
        options.out.write_text(page, encoding="utf-8")
    return 0 if all(x.is_within for x in results if x.preset != STOCK) else 1


def measure(name: str) -> Result:
    """Load the demo's model with one preset in a process of its own.

    Raises:
        MeasurementError: the process failed; with the end of what it printed.
    """
    checkpoint("widened")
    command = [sys.executable, "-m", "benchmarks.memory", "--child", name]
    with tempfile.TemporaryFile("w+") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, check=False)
        log.seek(0)
        text = log.read()
    match = re.search(f"^{_MARK}(.*)$", text, re.MULTILINE)
    if match is None:
        raise MeasurementError(f"{name}: exit code {done.returncode}\n{text[-3000:]}")
    return Result(preset=name, **json.loads(match[1]))


def _load_and_report(name: str) -> None:
    """Run SGLang's one-batch benchmark in this process, and print what its loader took."""
    from sglang.benchmark import one_batch
    from sglang.srt.model_loader.loader import DefaultModelLoader
    from sglang.srt.plugins import load_plugins

    from mixedprec_plugin.serving.loader import MixedPrecisionLoader

    load_plugins()
    model_path = checkpoint("widened")
    sys.argv = ["one_batch", "--model-path", str(model_path), "--max-total-tokens", "2048"]
    sys.argv += ["--batch-size", "1", "--input-len", "8", "--output-len", "2"]
    loader: Any = DefaultModelLoader
    if name != STOCK:
        loader = MixedPrecisionLoader
        sys.argv += ["--load-format", "mixedprec"]
        sys.argv += ["--mixedprec-config", str(PRESETS / f"{name}.yaml")]
    loader.load_model = _measured(loader.load_model, model_path)
    one_batch.cli_main()


def _measured(load_model: Any, model_path: Path) -> Any:
    """Wrap a loader's `load_model` so that it prints its memory and ends the process."""
    import ctypes
    import gc
    import time

    from mixedprec_plugin.serving import loader

    def load(self: Any, **arguments: Any) -> Any:
        load_model(self, **arguments)  # imports modules and warms kernels; its model is dropped
        loader._loaded = None
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        baseline, start = _resident("VmRSS"), time.perf_counter()
        model = load_model(self, **arguments)
        seconds, peak = time.perf_counter() - start, _resident("VmHWM")
        report = {
            "baseline": baseline,
            "peak": peak,
            "model": _model_bytes(model),
            "layer": _layer_bytes(model_path),
            "seconds": seconds,
        }
        print(f"\n{_MARK}{json.dumps(report)}", flush=True)
        os._exit(0)

    return load


def _resident(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert match is not None
    return int(match[1]) * 1024


def _model_bytes(model: Any) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def _layer_bytes(model_path: Path) -> int:
    """Bytes of the first decoder layer as the bf16 checkpoint stores it."""
    from mixedprec_plugin.checkpoint.source import open_source

    tensors = open_source(model_path).tensors
    return sum(x.num_bytes for name, x in tensors.items() if name.startswith("model.layers.0."))


def table(results: list[Result]) -> str:
    """Return the results as a markdown table, in MiB."""
    lines = [
        "| preset | model | + layer in bf16 | peak over baseline | baseline | seconds |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for x in results:
        mark = "" if x.is_within else " **over**"
        lines.append(
            f"| {x.preset} | {x.model / _MIB:.1f} | {(x.model + x.layer) / _MIB:.1f} "
            f"| {(x.peak - x.baseline) / _MIB:.1f}{mark} | {x.baseline / _MIB:.0f} "
            f"| {x.seconds:.1f} |"
        )
    return "\n".join(lines) + "\n"


_PAGE = """# Memory while loading

Written by `make memory`: the widened SmolLM2-135M-Instruct on the CPU platform, SGLang {sglang};
MiB of resident memory as the kernel counts it. For every preset the peak over the baseline (the
process just before the loader is called, everything imported, no model in memory) must stay below
the final model plus one decoder layer in bf16.

{table}"""


if __name__ == "__main__":
    raise SystemExit(main())
