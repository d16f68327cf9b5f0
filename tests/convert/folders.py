"""Output folders, compared byte by byte."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file

from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.errors import CheckpointError


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder -> its SHA-256."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def passes_for_whole(folder: Path) -> bool:
    """Whether anyone would take a folder, or one inside it, for a checkpoint."""
    if not folder.exists():
        return False
    inside = [path for path in folder.rglob("*") if path.is_dir()]
    for candidate in (folder, *inside):
        try:
            open_source(candidate)
        except CheckpointError:
            continue
        return True
    return False


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, read by the safetensors library."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found
