"""The matrix of methods, layer kinds, tensor-parallel sizes and cards.

python -m tests.dryrun.matrix [--out docs/cuda.md] [--results FOLDER] [--jobs 2]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.checkpoints import write_llama
from tests.dryrun.cards import CARDS
from tests.dryrun.driver import compile_stub
from tests.dryrun.methods import METHODS
from tests.dryrun.tables import SECTIONS, Result, render, write

_ROOT = Path(__file__).resolve().parents[2]


def run_cards(
    folder: Path, titles: Iterable[str] = tuple(CARDS), num_processes: int = 2
) -> dict[str, Result]:
    """Run cards, each in a process of its own, a few at a time.

    Args:
        folder: for all that is written; the results lie there as TITLE.json.
    Raises:
        RuntimeError: a process failed; with the end of what it said.
    """
    prepare(folder)
    _prepare_models(folder)
    wanted = list(titles)
    with ThreadPoolExecutor(num_processes) as pool:
        results = pool.map(lambda title: run_module("process", title, folder), wanted)
        return dict(zip(wanted, results, strict=True))


def prepare(folder: Path) -> None:
    """Write what every process needs: the driver's stub."""
    folder.mkdir(parents=True, exist_ok=True)
    compile_stub(folder)


def _prepare_models(folder: Path) -> None:
    """Write the whole models, which are the same for every card."""
    from tests.dryrun import families

    write_llama(
        folder / "llama",
        hidden_size=1024,
        intermediate_size=1024,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        num_hidden_layers=len(METHODS),
        vocab_size=512,
        tie_word_embeddings=False,
    )
    for name in families.FAMILIES:
        families.write(name, folder)


def run_module(name: str, title: str, folder: Path) -> Result:
    """Run a module of this package for a card, and read the TITLE.json that it writes."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.dryrun.{name}", title, str(folder)],
        cwd=_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{title}: {done.stderr[-3000:]}")
    return read_result(folder, title)


def read_result(folder: Path, title: str) -> Result:
    """What a process wrote."""
    result: Result = json.loads((folder / f"{title}.json").read_text(encoding="utf-8"))
    return result


def main() -> None:
    """Print the matrix, and write it into a page if one is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="Markdown page with marks for the tables")
    parser.add_argument("--results", type=Path, help="folder to leave the results in")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default 2)")
    arguments = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        results = run_cards(Path(folder), num_processes=arguments.jobs)
    if arguments.results:
        arguments.results.mkdir(parents=True, exist_ok=True)
        for title, result in results.items():
            (arguments.results / f"{title}.json").write_text(json.dumps(result, indent=1))
    for section in (*SECTIONS, "models"):
        text = render(results, section)
        print(text)
        if arguments.out:
            write(arguments.out, section, text)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{time.perf_counter() - start:.0f} s, "
        f"{used.ru_utime + used.ru_stime:.0f} s of processor time"
    )


if __name__ == "__main__":
    main()
