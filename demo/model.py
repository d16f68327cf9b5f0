"""SmolLM2-135M-Instruct as Hugging Face checkpoints, built once and cached.

python -m demo.model --shape widened              print the checkpoint's folder, building it
python -m demo.model --shape original --out DIR   write it to DIR instead
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from safetensors.torch import save_file

from demo.experts import experts_config, experts_tensors
from demo.gguf_model import DemoModelError, fetch_gguf, read_metadata, read_tensors
from demo.tokenizer import write_tokenizer
from demo.widen import widen_config, widen_tensors
from mixedprec_plugin.resources import cache_root

SHAPES = ("original", "widened", "experts")
WIDENED_HIDDEN_SIZE = 768
WIDENED_KV_HEADS = 4
_VERSION = 1  # part of a cached folder's name; raise it when what is written changes


def cache_dir() -> Path:
    """Return the cache folder."""
    return cache_root()


def checkpoint(shape: str) -> Path:
    """Return the folder of a shape's checkpoint, building it where it is missing.

    Args:
        shape: "original" (hidden 576, 9 and 3 heads), "widened" (768, 12 and 4) or "experts"
            (the widened one as a mixture); all the same function of the same tokens.
    Raises:
        DemoModelError: the model cannot be fetched.
    """
    folder = cache_dir() / f"smollm2-135m-instruct-{shape}-v{_VERSION}"
    if not folder.is_dir():
        build(shape, folder)
    return folder


def build(shape: str, folder: Path) -> None:
    """Write a shape's checkpoint to a folder that appears only when it is whole."""
    if shape not in SHAPES:
        raise ValueError(f"shape: {shape!r} (expected one of {', '.join(SHAPES)})")
    cache_dir().mkdir(parents=True, exist_ok=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    gguf_path = fetch_gguf(cache_dir())
    print(f"Writing {folder}, once", file=sys.stderr, flush=True)
    reader = GGUFReader(gguf_path)
    metadata = read_metadata(reader)
    config = _config(metadata)
    tensors = read_tensors(reader, config["num_attention_heads"], config["num_key_value_heads"])
    if shape != "original":
        wide = widen_config(config, WIDENED_HIDDEN_SIZE, WIDENED_KV_HEADS)
        tensors = widen_tensors(tensors, config, wide)
        config = wide
    if shape == "experts":
        tensors = experts_tensors(tensors, config)
        config = experts_config(config)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        staging.chmod(0o755)
        save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
        _write_json(staging / "config.json", config)
        _write_json(staging / "generation_config.json", _generation_config(config))
        write_tokenizer(metadata, staging)
        (staging / "model.safetensors").chmod(0o644)
        _publish(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, folder: Path) -> None:
    """Rename the finished folder into place; where another process was first, keep its."""
    try:
        staging.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise


def _config(metadata: dict[str, Any]) -> dict[str, Any]:
    hidden_size = metadata["llama.embedding_length"]
    num_heads = metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": hidden_size,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        # GGUF keeps the epsilon in float32; 7 digits give back the decimal that was meant.
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.7g}"),
        "rope_theta": metadata["llama.rope.freq_base"],
        "max_position_embeddings": metadata["llama.context_length"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def _generation_config(config: dict[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Print the folder of a checkpoint; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.model", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--shape", choices=SHAPES, default="widened")
    parser.add_argument("--out", type=Path, help="write to this new folder instead of the cache")
    options = parser.parse_args(arguments)
    if options.out is not None and options.out.exists():
        parser.error(f"--out: {options.out} exists; name a new folder")
    try:
        if options.out is not None:
            build(options.shape, options.out)
        print(options.out or checkpoint(options.shape))
    except DemoModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
