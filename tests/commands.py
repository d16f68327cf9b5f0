"""The command line `mixedprec`, run in this process."""

from __future__ import annotations

import io
from pathlib import Path

from mixedprec_plugin.cli.main import main


def run(*argv: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    return main([str(a) for a in argv], out, err), out.getvalue(), err.getvalue()


def convert(model: Path, preset: Path, out: Path, *more: object) -> tuple[int, str, str]:
    return run("convert", "--model", model, "--preset", preset, "--device", "cpu", "--out", out,
               *more)  # fmt: skip
