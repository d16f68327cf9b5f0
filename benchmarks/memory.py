"""Measure how far loading a model with a preset raises the process's resident memory.

    python -m benchmarks.memory [--preset NAME ...] [--out docs/memory.md]

For each shipped preset two fresh processes build the engine's model runner. The first lists the
modules that loading imports. The second imports those, and has the kernel bring in the code of all
libraries; it has initialized the distributed state, and has loaded nothing: the baseline. Then its
loader is called, once, cold. What the kernel's high-water mark of resident memory (VmHWM, reset
just before) rises by must stay below the final model plus one decoder layer in bf16.

Library code is brought in beforehand because its pages come in when a function first runs: they are
the page cache's, not memory that loading takes, yet VmHWM counts them. Of the checkpoint's files
what is mapped counts, which is the tensor at hand.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, keep
from benchmarks.presets import PRESETS, fitting_presets
from demo.model import checkpoint

ROOT = Path(__file__).resolve().parents[1]
STOCK = "(bf16, stock SGLang)"
_MIB = 2**20
_MARK = "MEMORY "
_MADV_POPULATE_READ = 22  # linux/mman.h


class MeasurementError(Exception):
    """The measuring process failed."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One load's resident memory, all in bytes.

    Attributes:
        baseline: anonymous memory before the loader is called, everything imported.
        growth: how far the peak rose above what was resident before.
        kept: how much of that is still there at the end.
        model: all tensors that the loaded model keeps, each storage once.
        layer: one decoder layer in bf16.
        seconds: what the loader took.
    """

    preset: str
    baseline: int
    growth: int
    kept: int
    model: int
    layer: int
    seconds: float

    @property
    def is_within(self) -> bool:
        """Whether the peak keeps to the final model, one layer and the baseline."""
        return self.growth <= self.model + self.layer


def main(arguments: list[str] | None = None) -> int:
    """Measure, and write the table; return 1 if a preset is over its limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("--preset", action="append", help="name of a shipped preset; repeatable")
    parser.add_argument("--out", type=Path, help="write the table here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--modules", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        _load_and_report(options.child, options.modules)
        return 0
    names = options.preset or [STOCK, *fitting_presets(checkpoint("widened"))]
    results = []
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results.append(measure(name))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        page = _PAGE.format(sglang=version("sglang"), table=table(results))
        options.out.write_text(page, encoding="utf-8")
    return int(not keep("memory", figures_of(results)))


def figures_of(results: Sequence[Result]) -> list[Figure]:
    """The peak above the final model, in MiB; a layer in bf16 is the limit."""
    above = {x.preset: (x.growth - x.model) / _MIB for x in results}
    stock = above.get(STOCK)
    return [
        Figure(f"{x.preset}, peak above the model, MiB", above[x.preset], stock, x.layer / _MIB)
        for x in results
        if x.preset != STOCK
    ]


def measure(name: str) -> Result:
    """Load the demo's model with one preset in a process of its own, after one that lists modules.

    Raises:
        MeasurementError: a process failed; with the end of what it printed.
    """
    checkpoint("widened")
    modules = _run_child(name, [])["modules"]
    report = _run_child(name, modules)
    if report["modules"]:
        raise MeasurementError(f"{name}: loading imported {', '.join(report['modules'])}")
    del report["modules"]
    return Result(preset=name, **report)


def _run_child(name: str, modules: list[str]) -> dict[str, Any]:
    """What the process reports that imports the modules and then loads."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", name]
    command += ["--modules", json.dumps(modules)]
    with tempfile.TemporaryFile("w+") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, check=False)
        log.seek(0)
        text = log.read()
    match = re.search(f"^{_MARK}(.*)$", text, re.MULTILINE)
    if match is None:
        raise MeasurementError(f"{name}: exit code {done.returncode}\n{text[-3000:]}")
    report: dict[str, Any] = json.loads(match[1])
    return report


def _load_and_report(name: str, modules: list[str]) -> None:
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
    loader.load_model = _measured(loader.load_model, model_path, modules)
    one_batch.cli_main()


def _measured(load_model: Any, model_path: Path, modules: list[str]) -> Any:
    """Wrap a loader's `load_model` so that it prints its memory and ends the process."""

    def load(self: Any, **arguments: Any) -> Any:
        for module in modules:
            importlib.import_module(module)
        bring_in_code()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        imported = set(sys.modules)
        before = {field: resident(field) for field in ("RssAnon", "RssFile", "RssShmem")}
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        start = time.perf_counter()
        model = load_model(self, **arguments)
        seconds, peak = time.perf_counter() - start, resident("VmHWM")
        # where the kernel took code back meanwhile, its pages no longer count
        files = min(before["RssFile"], resident("RssFile"))
        report = {
            "baseline": before["RssAnon"],
            "growth": peak - before["RssAnon"] - before["RssShmem"] - files,
            "kept": resident("RssAnon") - before["RssAnon"],
            "model": _model_bytes(model),
            "layer": _layer_bytes(model_path),
            "seconds": seconds,
            "modules": sorted(set(sys.modules) - imported),
        }
        print(f"\n{_MARK}{json.dumps(report)}", flush=True)
        os._exit(0)

    return load


def bring_in_code() -> None:
    """Have the kernel map every page of every library's code.

    Raises:
        OSError: the kernel cannot; MADV_POPULATE_READ is Linux 5.14's.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in Path("/proc/self/maps").read_text().splitlines():
        match = re.match(r"(\w+)-(\w+) r-xp \S+ \S+ \S+\s+/", line)
        if match is None:
            continue
        start, end = (int(address, 16) for address in match.groups())
        if libc.madvise(start, end - start, _MADV_POPULATE_READ):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), line)


def resident(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert match is not None
    return int(match[1]) * 1024


def _model_bytes(model: Any) -> int:
    """Bytes of the tensors of all modules, their schemes and packed weights."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        scheme = getattr(module, "scheme", None)
        for owner in (module, scheme, getattr(scheme, "_weight", None)):
            members = vars(owner).values() if owner is not None else ()
            tensors += [member for member in members if hasattr(member, "untyped_storage")]
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
        "| preset | model | limit: + layer in bf16 | peak | of that kept | baseline | seconds |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for x in results:
        mark = "" if x.is_within else " **over**"
        lines.append(
            f"| {x.preset} | {x.model / _MIB:.1f} | {(x.model + x.layer) / _MIB:.1f} "
            f"| {x.growth / _MIB:.1f}{mark} | {x.kept / _MIB:.1f} | {x.baseline / _MIB:.0f} "
            f"| {x.seconds:.1f} |"
        )
    return "\n".join(lines) + "\n"


_PAGE = """# Memory while loading

Written by `make memory`: the widened SmolLM2-135M-Instruct on the CPU platform, SGLang {sglang};
MiB. For every shipped preset for dense models a fresh process loads once, cold; nothing is warmed
up by an earlier load.

- *baseline*: the anonymous memory of a process that has imported every module that loading imports,
  has initialized SGLang's distributed state, and has no model. Not in the table, because it
  does not change: the code of its libraries, all brought in beforehand (MADV_POPULATE_READ), which
  is the page cache's and not memory that loading takes.
- *peak*: how far the kernel's high-water mark of resident memory (VmHWM, reset before) rises above
  the baseline while the loader runs. It must stay below the limit, the final model plus one
  decoder layer in bf16. Large tensors are mapped while they are read, and counted.
- *model*: every tensor that the loaded model keeps. What is kept beyond it are Python's objects
  (the model's modules, the plan) and the ends of pages.

{table}"""


if __name__ == "__main__":
    raise SystemExit(main())
