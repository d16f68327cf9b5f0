"""The matrix of methods, layer kinds, tensor-parallel sizes and cards.

python -m tests.dryrun.matrix [--out docs/cuda.md]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.checkpoints import write_llama
from tests.dryrun.cards import CARDS
from tests.dryrun.driver import compile_stub
from tests.dryrun.methods import METHODS

Result = Mapping[str, Any]
_ROOT = Path(__file__).resolve().parents[2]
_BEGIN, _END = "<!-- matrix -->\n", "<!-- end of matrix -->\n"
_KINDS = (
    "column",
    "merged",
    "qkv",
    "few_kv_heads",
    "row",
    "replicated",
    "narrow",
    "ragged",
    "lm_head",
)
_WORDS = {
    "aten:mm": "mm",
    "aten:addmm": "mm",
    "jit:gptq_marlin_gemm": "Marlin",
    "jit:awq_dequantize": "awq_dequantize",
    "aten:_scaled_mm": "torch._scaled_mm",
    "sgl_kernel:fp8_scaled_mm": "fp8_scaled_mm",
    "deep_gemm:fp8_fp4_gemm_nt": "DeepGEMM",
    "triton:_w8a8_block_fp8_matmul": "Triton block matmul",
    "triton:_w8a8_block_int8_matmul": "Triton block matmul",
}


def run_cards(folder: Path, num_processes: int = 2) -> dict[str, Result]:
    """Run every card in a process of its own, a few at a time.

    Raises:
        RuntimeError: a process failed; with the end of what it said.
    """
    prepare(folder)
    with ThreadPoolExecutor(num_processes) as pool:
        results = pool.map(lambda title: run_module("process", title, folder), CARDS)
        return dict(zip(CARDS, results, strict=True))


def prepare(folder: Path) -> None:
    """Write what every process needs: the stub, and the whole model."""
    compile_stub(folder)
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
    result: Result = json.loads((folder / f"{title}.json").read_text())
    return result


def render(results: Mapping[str, Result]) -> str:
    """The matrix as Markdown: layer kinds that fare alike on every card share a row."""
    rows: dict[tuple[str, tuple[str, ...]], list[tuple[str, int]]] = {}
    cells = {
        title: {
            (cell["method"], cell["kind"], cell["tp_size"]): _outcome(cell)
            for cell in reversed(result["cells"])
        }
        for title, result in results.items()
    }
    for method in METHODS:
        for kind in _KINDS:
            for tp_size in (1, 2, 8):
                outcomes = tuple(cells[title][method.title, kind, tp_size] for title in results)
                rows.setdefault((method.title, outcomes), []).append((kind, tp_size))
    lines = [
        f"| method | layers (tensor parallel) | {' | '.join(map(_heading, results))} |",
        f"|---|---|{'---|' * len(results)}",
    ]
    lines += [
        f"| {method} | {_where(where)} | {' | '.join(outcomes)} |"
        for (method, outcomes), where in rows.items()
    ]
    return "\n".join(lines) + "\n"


def _heading(title: str) -> str:
    major, minor = CARDS[title].capability
    return f"{title} ({major}.{minor})"


def _where(places: Iterable[tuple[str, int]]) -> str:
    sizes: dict[str, list[int]] = {}
    for kind, tp_size in places:
        sizes.setdefault(kind, []).append(tp_size)
    groups: dict[tuple[int, ...], list[str]] = {}
    for kind, held in sizes.items():
        groups.setdefault(tuple(held), []).append(kind)
    return "; ".join(
        f"{', '.join(kinds)} ({', '.join(map(str, held))})" for held, kinds in groups.items()
    )


def _outcome(cell: Mapping[str, Any]) -> str:
    if cell["broken"]:
        return "BROKEN"
    if cell["refused"]:
        return _reason(cell["refused"])
    kernels = [_WORDS[kernel] for kernel in cell["kernels"] if kernel in _WORDS]
    return " + ".join(dict.fromkeys(kernels))


def _reason(text: str) -> str:
    if "compute capability" in text:
        return "refused: GPU"
    return "refused: lm_head" if "lm_head" in text else "refused: shape"


def write(path: Path, matrix: str) -> None:
    """Put the matrix between the marks of a page."""
    page = path.read_text(encoding="utf-8")
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    path.write_text(before + _BEGIN + matrix + _END + after, encoding="utf-8")


def main() -> None:
    """Print the matrix, and write it into a page if one is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="Markdown page with marks for the matrix")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        matrix = render(run_cards(Path(folder)))
    print(matrix, end="")
    if arguments.out:
        write(arguments.out, matrix)


if __name__ == "__main__":
    main()
