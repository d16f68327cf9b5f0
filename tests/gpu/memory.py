"""One load on the GPU in a process of its own: the bytes that stay there.

python -m tests.gpu.memory MODEL PRESET
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from mixedprec_plugin.cpu.heap import storage_bytes

_MARK = "MEMORY "
_ROOT = Path(__file__).resolve().parents[2]


def measure(model_path: Path, preset_path: Path) -> dict[str, int]:
    """Load a model with a preset in a process of its own.

    Returns:
        bytes: "parameters" of the model, "buffers" (such as tables of positions, which no plan
        knows), and "allocated", by how much torch's allocation on the GPU grew.
    Raises:
        RuntimeError: the process failed; with the end of what it said.
    """
    command = [sys.executable, "-m", "tests.gpu.memory", str(model_path), str(preset_path)]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    match = re.search(f"^{_MARK}(.*)$", done.stdout, re.MULTILINE)
    if match is None:
        raise RuntimeError(
            f"{preset_path.stem}: exit code {done.returncode}\n{done.stderr[-3000:]}"
        )
    found: dict[str, int] = json.loads(match[1])
    return found


def main(model_path: str, preset_path: str) -> None:
    """Run SGLang's one-batch benchmark in this process, as far as the end of the load."""
    from sglang.benchmark import one_batch
    from sglang.srt.plugins import load_plugins

    from mixedprec_plugin.serving.loader import MixedPrecisionLoader

    load_plugins()
    stock = MixedPrecisionLoader.load_model

    def load(self: Any, **arguments: Any) -> Any:
        before = torch.cuda.memory_allocated()
        model = stock(self, **arguments)
        torch.cuda.synchronize()
        report = {
            "parameters": storage_bytes(model.parameters()),
            "buffers": storage_bytes(model.buffers()),
            "allocated": torch.cuda.memory_allocated() - before,
        }
        print(f"\n{_MARK}{json.dumps(report)}", flush=True)
        raise SystemExit(0)

    MixedPrecisionLoader.load_model = load  # type: ignore[method-assign]
    sys.argv = ["one_batch", "--model-path", model_path, "--batch-size", "1"]
    sys.argv += ["--input-len", "8", "--output-len", "2", "--load-format", "mixedprec"]
    sys.argv += ["--mixedprec-config", preset_path]
    one_batch.cli_main()


if __name__ == "__main__":
    main(*sys.argv[1:])
