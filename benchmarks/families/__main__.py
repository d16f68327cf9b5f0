"""`make families`: which family runs in which method, on one rank and two.

python -m benchmarks.families [--out FILE] [--cell FAMILY/METHOD ...] [--newer FAMILY ...]

Single cells and families are written into the file beside those that are there.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.families import engine
from benchmarks.families.architectures import ARCHITECTURES, Architecture
from benchmarks.families.cells import Cell, Runner
from benchmarks.families.methods import COLUMNS, has_cell
from benchmarks.families.newer import NEWER, Newer
from benchmarks.families.outcomes import Outcome, outcome_of
from benchmarks.families.processes import forked
from benchmarks.families.report import as_markdown, entry_of
from benchmarks.families.served import entry_of as served_entry_of

_HOURS = 4 * 3600.0
Wanted = tuple[Architecture, str]


def main(arguments: list[str] | None = None) -> int:
    """Run the table; return 0 if every cell is green or refused with a reason."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--cell",
        action="append",
        default=[],
        metavar="FAMILY/METHOD",
        help="run this one, such as 'Phi-3/gptq' or 'OLMo*/*'; repeatable",
    )
    parser.add_argument(
        "--newer",
        action="append",
        default=[],
        metavar="FAMILY",
        help="run this one of the newer families, such as 'Qwen3.5*'; repeatable",
    )
    parser.add_argument("--jobs", type=int, default=2, help="families at a time (default 2)")
    options = parser.parse_args(arguments)
    # one thread: what has threads cannot be forked
    os.environ["OMP_NUM_THREADS"] = "1"
    engine.warm_up()
    is_whole = not options.cell and not options.newer
    wanted = [
        (architecture, column)
        for architecture, column in itertools.product(ARCHITECTURES, COLUMNS)
        if has_cell(architecture, column)
        and any(
            fnmatch.fnmatchcase(f"{architecture.name}/{column}", cell)
            for cell in options.cell or (["*"] if is_whole else [])
        )
    ]
    cells = run(wanted, options.jobs)
    newer = [
        newer
        for newer in NEWER
        if any(
            fnmatch.fnmatchcase(newer.architecture.name, name)
            for name in options.newer or (["*"] if is_whole else [])
        )
    ]
    outcomes = run_newer(newer)
    if options.out:
        numbers = _merged(options.out.with_suffix(".json"), cells, outcomes, is_whole=is_whole)
        options.out.write_text(as_markdown(*numbers), encoding="utf-8")
    is_right = all(cell.is_green for cell in cells) and not any(o.failures for o in outcomes)
    return 0 if is_right else 1


def _merged(
    path: Path, cells: Sequence[Cell], outcomes: Sequence[Outcome], *, is_whole: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Write all numbers; those of single cells and families into those that are there."""
    newer_path = path.with_name(f"{path.stem}_newer.json")
    order = [(architecture.name, column) for architecture in ARCHITECTURES for column in COLUMNS]
    known = [] if is_whole else _read(path)
    entries = (*known, *map(entry_of, cells))
    table = {(entry["family"], entry["method"]): entry for entry in entries}
    known = [] if is_whole else _read(newer_path)
    served = {entry["family"]: entry for entry in (*known, *map(served_entry_of, outcomes))}
    names = [newer.architecture.name for newer in NEWER]
    made = (
        [table[place] for place in order if place in table],
        [served[name] for name in names if name in served],
    )
    for file, numbers in zip((path, newer_path), made, strict=True):
        file.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return made


def _read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def run_newer(wanted: Sequence[Newer]) -> list[Outcome]:
    """Find out what becomes of newer families, one after the other."""
    outcomes = []
    with tempfile.TemporaryDirectory() as name:
        for newer in wanted:
            outcomes.append(outcome_of(newer, Path(name)))
            made = outcomes[-1]
            print(
                f"{made.family:18} {made.seconds:5.1f} s  {made.method} {made.status}", flush=True
            )
            for failure in made.failures:
                print(f"  FAILED: {failure[-1500:]}", flush=True)
    return outcomes


def run(wanted: Sequence[Wanted], num_jobs: int) -> list[Cell]:
    """Run cells, families side by side; return them in order."""
    families = list(dict.fromkeys(architecture.name for architecture, _ in wanted))
    with tempfile.TemporaryDirectory() as name:
        works = []
        for job in range(min(num_jobs, len(families))):
            folder = Path(name) / str(job)
            folder.mkdir()
            part = [cell for cell in wanted if families.index(cell[0].name) % num_jobs == job]
            works.append(functools.partial(_run_part, part, folder))
        parts = forked(works, Path(name), timeout_seconds=_HOURS, is_quiet=False)
    order = [(architecture.name, column) for architecture, column in wanted]
    cells = itertools.chain.from_iterable(parts)
    return sorted(cells, key=lambda cell: order.index((cell.architecture, cell.column)))


def _run_part(wanted: Sequence[Wanted], folder: Path) -> list[Cell]:
    runner, cells = Runner(folder), []
    for architecture, column in wanted:
        cells.append(runner.run(architecture, column))
        print(line(cells[-1]), flush=True)
    return cells


def line(cell: Cell) -> str:
    """One cell in a line."""
    parts = [f"{cell.architecture:18} {cell.column:10} {cell.seconds:5.1f} s"]
    for tp_size, held in cell.held.items():
        steps, logits = held.steps, held.logits
        parts.append(
            f"tp {tp_size}: logits {logits.worst:.4f}, inputs {steps.worst:.4f}, "
            f"experts {steps.tied}/{steps.elsewhere}, "
            f"tokens {logits.differing}/{logits.unexplained}"
        )
        if not held.is_within:
            parts.append(f"TOO FAR {max(steps.errors, key=steps.errors.__getitem__)}")
    if cell.alone and cell.routed:
        parts.append(f"alone {cell.alone.error:.4f}, routed {cell.routed.error:.4f}")
    parts.append(f"effect {cell.effect:.4f}")
    parts += [
        f"refused at tp {size}: {'; '.join(why)[:200]}" for size, why in cell.refusals.items()
    ]
    if cell.kept:
        parts.append(f"but for {cell.kept}")
    parts += [f"FAILED: {text[-1500:]}" for text in cell.failures]
    return "  ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
