"""`make families`: which family runs in which method, on one rank and two.

python -m benchmarks.families [--out FILE] [--family NAME ...] [--column NAME ...]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.families import engine
from benchmarks.families.architectures import ARCHITECTURES
from benchmarks.families.cells import Cell, Runner
from benchmarks.families.methods import COLUMNS, has_cell


def main(arguments: list[str] | None = None) -> int:
    """Run the table; return 0 if every cell is green or refused with a reason."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--family", action="append", default=[])
    parser.add_argument("--column", action="append", default=[])
    options = parser.parse_args(arguments)
    engine.warm_up()
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder))
        for architecture in ARCHITECTURES:
            if options.family and architecture.name not in options.family:
                continue
            for column in COLUMNS:
                if options.column and column not in options.column:
                    continue
                if has_cell(architecture, column):
                    cells.append(runner.run(architecture, column))
                    print(line(cells[-1]), flush=True)
    return 0 if all(cell.is_green for cell in cells) else 1


def line(cell: Cell) -> str:
    """One cell in a line."""
    parts = [f"{cell.architecture:18} {cell.column:10} {cell.seconds:5.1f} s"]
    for tp_size, near in cell.distances.items():
        parts.append(
            f"tp {tp_size}: {near.error:.4f} (worst {near.worst:.4f}), "
            f"{near.differing}/{near.unexplained} tokens" + ("" if near.is_within(cell.column) else " TOO FAR")
        )
    parts.append(f"effect {cell.effect:.4f}")
    parts += [f"refused at tp {size}: {'; '.join(why)[:200]}" for size, why in cell.refusals.items()]
    if cell.kept:
        parts.append(f"but for {cell.kept}")
    parts += [f"FAILED: {text[-1500:]}" for text in cell.failures]
    return "  ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
