"""Export the real model as compressed-tensors and have that library decompress it.

    python -m benchmarks.compressed_tensors.check

Exit code 0 where every weight is what the plan says, to the bit.
Last outcome: compressed-tensors 0.19.0 with transformers 5.17.0, 272 tensors, none differing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.third_party.environments import python_of
from benchmarks.third_party.recipes import LLMCOMPRESSOR
from demo.model import checkpoint
from mixedprec_plugin.cli.main import main as mixedprec

FOLDER = Path(__file__).resolve().parent
_PLAIN = "version: 1\nrules:\n  - {match: '*', method: unquantized}\n"


def main() -> int:
    """Return 0 where nothing differs."""
    with tempfile.TemporaryDirectory(prefix="mixedprec-") as name:
        folder = Path(name)
        plain = folder / "plain.yaml"
        plain.write_text(_PLAIN, encoding="utf-8")
        model, preset = checkpoint("widened"), FOLDER / "export.yaml"
        _convert(model, preset, folder / "export", "--format", "compressed-tensors")
        # the same plan as it is served, then dequantized by our own code
        _convert(model, preset, folder / "mixed")
        _convert(folder / "mixed", plain, folder / "plain")
        script = FOLDER / "decompress.py"
        command = [str(python_of(LLMCOMPRESSOR)), str(script)]
        done = subprocess.run(
            [*command, str(folder / "export"), str(folder / "plain")],
            stdout=subprocess.PIPE, check=True,
        )  # fmt: skip
    report = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(report, indent=1))
    return 1 if report["differing"] else 0


def _convert(model: Path, preset: Path, out: Path, *more: str) -> None:
    argv = ["convert", "--model", str(model), "--preset", str(preset), "--out", str(out)]
    if code := mixedprec([*argv, *more]):
        sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
