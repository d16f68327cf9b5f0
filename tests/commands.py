"""The command line `mixedprec`, run in a test."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

from mixedprec_plugin.cli.main import main

_WITHOUT_TORCH = """
import sys
from mixedprec_plugin.cli.main import main
code = main(sys.argv[1:])
found = {"torch", "sglang"} & set(sys.modules)
sys.exit(f"imported {found}" if found else code)
"""


def run(*argv: object) -> tuple[int, str, str]:
    """Run `mixedprec` in this process; its exit code, output and errors."""
    out, err = io.StringIO(), io.StringIO()
    return main([str(word) for word in argv], out, err), out.getvalue(), err.getvalue()


def run_without_torch(*argv: object) -> str:
    """Run `mixedprec` in a process that must import neither torch nor SGLang; its output."""
    command = [sys.executable, "-c", _WITHOUT_TORCH, *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def convert(
    model: Path, preset: Path, out: Path, *more: object, device: str = "cpu"
) -> tuple[int, str, str]:
    """Run `mixedprec convert`, as `run` does."""
    return run(
        "convert", "--model", model, "--preset", preset, "--device", device, "--out", out, *more
    )


def converted(model: Path, preset: Path, out: Path, *more: object, device: str = "cpu") -> Path:
    """The folder that `mixedprec convert` wrote, without an error."""
    code, _, err = convert(model, preset, out, *more, device=device)
    assert code == 0, err
    return out
