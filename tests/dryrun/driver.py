"""The stub of the CUDA driver."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

_SOURCE = Path(__file__).with_name("libcuda.c")


def compile_stub(folder: Path) -> Path:
    """Compile libcuda.c with the system's C compiler.

    Returns:
        the path of libcuda.so.1.
    """
    library = folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run([*command, str(_SOURCE)], check=True)
    return library


def load_stub(library: Path) -> None:
    """Load the stub so that it stands before any real driver; call it before torch is imported."""
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
