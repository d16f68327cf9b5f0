"""Measure loading with a preset beside SGLang's own loader.

python -m benchmarks.loading [--repetitions N] [--case TEXT] [--out docs/loading.md]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.figures import keep
from benchmarks.loading.loads import MARK, Load
from benchmarks.loading.models import CASES, Case, write_sources
from benchmarks.loading.report import figures_of, page

ROOT = Path(__file__).resolve().parents[2]


class MeasurementError(Exception):
    """The measuring process failed."""


def main(arguments: list[str] | None = None) -> int:
    """Measure, and write the page; return 1 where a large model takes more than it may."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--case", default="", help="only cases whose name has this in it")
    parser.add_argument("--out", type=Path, help="write the page here")
    options = parser.parse_args(arguments)
    results = {}
    for case in CASES:
        if options.case in case.name:
            print(f"{case.name} ...", file=sys.stderr, flush=True)
            results[case.name] = measure(case, options.repetitions)
    if options.out is not None:
        options.out.write_text(page(results), encoding="utf-8")
    large = {case.name for case in CASES if case.is_large}
    figures = [one for name in results for one in figures_of(name, results[name], name in large)]
    return int(not keep("loading", figures))


def measure(case: Case, repetitions: int) -> list[Load]:
    """Make a case's checkpoints, load them in a process of its own, and remove them.

    Raises:
        MeasurementError: the process failed; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="mixedprec-loading-") as folder:
        model, preset = write_sources(case, Path(folder))
        command = [sys.executable, "-m", "benchmarks.loading.loads"]
        done = subprocess.run(
            [*command, str(model), str(preset), str(repetitions)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            check=False,
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    loads = [Load(**json.loads(line.removeprefix(MARK))) for line in lines]
    if len(loads) != 4 * repetitions:
        raise MeasurementError(f"{case.name}: exit code {done.returncode}\n{done.stdout[-3000:]}")
    # the first of each loader imports the model's classes
    return loads


if __name__ == "__main__":
    raise SystemExit(main())
