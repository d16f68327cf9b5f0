"""An environment for each tool: their requirements contradict one another's and SGLang's."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.third_party.recipes import Tool
from demo.model import cache_dir

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = Path(__file__).resolve().parent / "requirements"


def is_installed(tool: Tool) -> bool:
    """Whether `python_of` has made a tool's environment, and what it needs is what it was."""
    return _is_as_wanted(_folder(tool), tool)


def _folder(tool: Tool) -> Path:
    return cache_dir() / "envs" / tool.name


def _wanted(tool: Tool) -> str:
    return hashlib.sha256((REQUIREMENTS / f"{tool.name}.txt").read_bytes()).hexdigest()


def _is_as_wanted(folder: Path, tool: Tool) -> bool:
    installed = folder / ".installed"
    return installed.is_file() and installed.read_text(encoding="utf-8").strip() == _wanted(tool)


def python_of(tool: Tool) -> Path:
    """Return the interpreter of a tool's environment, made or brought up to date where need be.

    Raises:
        subprocess.CalledProcessError: pip could not install the requirements.
    """
    folder = _folder(tool)
    requirements, python = REQUIREMENTS / f"{tool.name}.txt", folder / "bin" / "python"
    if _is_as_wanted(folder, tool):
        return python
    print(f"Installing {tool.name} into {folder}", file=sys.stderr, flush=True)
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", str(requirements)], check=True)
    (folder / ".installed").write_text(_wanted(tool) + "\n", encoding="utf-8")
    return python


def run_module(
    tool: Tool, module: str, arguments: Sequence[str], log: Path, seconds: float | None = None
) -> None:
    """Run one of this folder's modules in a tool's environment.

    Args:
        module: its name, such as "quantize_autoround".
        log: file that its output is written to.
        seconds: how long it may take; None for as long as it does.
    Raises:
        subprocess.CalledProcessError: it failed; the log tells why.
        subprocess.TimeoutExpired: it took longer, and was ended.
    """
    command = [str(python_of(tool)), "-m", f"benchmarks.third_party.{module}", *arguments]
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    with log.open("wb") as output:
        subprocess.run(
            command,
            # some write logs where they are started
            cwd=log.parent,
            env={**os.environ, **offline, **tool.variables},
            stdout=output,
            stderr=subprocess.STDOUT,
            check=True,
            timeout=seconds,
        )
