"""The checkpoints under tests/data/peers as folders that a plan can read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mixedprec_plugin.checkpoint.source import open_source
from tests.quantize.peers import FILE, PEERS

FOLDERS = tuple(sorted(path.name for path in PEERS.iterdir() if path.is_dir()))


def quantization_config(folder: str) -> dict[str, Any]:
    """What the tool wrote; empty for bf16."""
    path = PEERS / folder / "quantization_config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def peer_checkpoint(path: Path, folder: str, **changes: Any) -> Path:
    """Make a checkpoint folder of a peer's slices.

    Args:
        path: the folder to make.
        folder: the peer.
        changes: keys of `quantization_config` to overwrite; None removes one.
    """
    path.mkdir(parents=True)
    shutil.copy(PEERS / folder / FILE, path / "model.safetensors")
    config: dict[str, Any] = {"architectures": ["SliceOfALlama"], "torch_dtype": "bfloat16"}
    quantization = {**quantization_config(folder), **changes}
    quantization = {key: value for key, value in quantization.items() if value is not None}
    if quantization:
        config["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(config))
    open_source(path)
    return path
