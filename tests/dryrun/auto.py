"""Layers under `method: auto`, stored as other tools store them, on a card that is played.

Names, dtypes and proportions of shapes are those of the tools' own files under tests/data/peers,
and so is `quantization_config`; the sizes are those that GPU kernels take.

python -m tests.dryrun.auto H100 FOLDER
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.dryrun.cards import Card
from tests.dryrun.journal import JOURNAL, outcome
from tests.dryrun.process import run_on_card

KINDS = ("column", "merged", "qkv", "row")
TP_SIZES = (1, 2)
# what stands for what in the shapes of the peers' k_proj, N = 192, K = 576, groups of 64
_N, _K = 192, 576
# what DeepSeek-V3's config.json says
_DEEPSEEK = {
    "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
    "weight_block_size": [128, 128],
}  # fmt: skip


def run_all(card: Card, shared: Path) -> dict[str, Any]:
    """Run every peer's format in every layer kind."""
    stand_in_for_zero_points()
    from tests.checkpoint.peers import FOLDERS

    found = {
        f"{peer} {kind} {tp_size}": run(card, peer, kind, tp_size, shared / "auto")
        for peer in FOLDERS
        for kind in KINDS
        for tp_size in TP_SIZES
    }
    w8a8 = "llmcompressor-w8a8-int8"
    for name, changes in (
        ("ignored by its config", {"ignore": ["re:block.*"]}),
        ("unknown quant_method", {"quant_method": "none_such"}),
        ("no quant_method", {"quant_method": None}),
        ("config_groups of another type", {"config_groups": 3, "format": "int-quantized"}),
    ):
        found[name] = run(card, w8a8, "column", 1, shared / name.replace(" ", "-"), **changes)
    found["deepseek's blocks"] = run(card, "deepseek", "merged", 1, shared / "deepseek")
    found["ragged blocks"] = run(card, "llmcompressor-fp8-block", "ragged_qkv", 1, shared / "cut")
    return found


def stand_in_for_zero_points() -> None:
    """compressed-tensors' zero points go through numpy by a name of the module's own."""
    from sglang.srt.layers.quantization import marlin_utils
    from sglang.srt.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_wNa16 as module,
    )

    module.unpack_cols = marlin_utils.unpack_cols


def run(
    card: Card, peer: str, kind_name: str, tp_size: int, folder: Path, **changes: Any
) -> dict[str, Any]:
    """Plan, build, load, process and run one layer.

    Args:
        changes: keys of `quantization_config` to overwrite.
    Returns:
        "runs_as", "kernels" and "parameters", or what it was "refused" with, or is "broken".
    """
    found: dict[str, Any] = {}
    with outcome(found.__setitem__):
        found |= _run(card, peer, kind_name, tp_size, folder / peer / kind_name, changes)
    return found


def _run(
    card: Card, peer: str, kind_name: str, tp_size: int, folder: Path, changes: Mapping[str, Any]
) -> dict[str, Any]:
    import torch

    from mixedprec_plugin.compose.stream import VirtualCheckpoint
    from mixedprec_plugin.methods.interface import Target
    from mixedprec_plugin.serving.config import MixedPrecisionConfig
    from mixedprec_plugin.serving.filling import load_weights
    from tests.dryrun import cells
    from tests.dryrun.fake_device import fake_card
    from tests.dryrun.layers import KINDS as LAYERS
    from tests.dryrun.rank import rank
    from tests.presets import plan

    kind = _ragged_qkv() if kind_name == "ragged_qkv" else LAYERS[kind_name]
    write(folder, peer, kind.weights, changes)
    target = Target("cuda", tp_size, "BF16")
    made = plan(folder, 'match: "*", method: auto', target=target).check()
    config = MixedPrecisionConfig(made)
    dtype = getattr(torch, card.dtype)
    torch.set_default_dtype(dtype)
    with rank(tp_size), fake_card():
        model = cells.OneLayer(kind, config)
        load_weights(model, config, VirtualCheckpoint(made))
        parameters = cells.describe_parameters(model.layer)
        _check_written(model)
        quant_method: Any = model.layer.quant_method
        quant_method.process_weights_after_loading(model.layer)
        JOURNAL.take_kernels()
        output = cells.forward(model.layer, kind.inputs(tp_size, dtype))
        assert output.shape[-1] == kind.num_outputs(tp_size)
    return {
        "runs_as": cells.class_name(model.layer),
        "kernels": JOURNAL.take_kernels(),
        "parameters": parameters,
    }


def _ragged_qkv() -> Any:
    """192 rows of k and of v, which end inside a block of 128."""
    from sglang.srt.layers.linear import QKVParallelLinear

    from tests.dryrun.layers import Kind

    weights = {f"block.{name}_proj": (N, 1024) for name, N in (("q", 576), ("k", 192), ("v", 192))}
    return Kind(
        "block.qkv_proj",
        weights,
        lambda config, prefix: QKVParallelLinear(
            1024, 64, 9, 3, bias=True, quant_config=config, prefix=prefix
        ),
        num_kv_heads=3,
    )


def _check_written(model: Any) -> None:
    """Assert that every parameter was written wholly, and its shapes kept; scales may be cast."""

    for name, parameter in model.named_parameters():
        storage = parameter.data.untyped_storage()._cdata
        assert storage in JOURNAL.written, f"{name}: nothing was written"
        elements, _ = JOURNAL.written[storage]
        assert elements.all(), f"{name}: {elements.sum()} of {elements.size} elements written"
        for text in JOURNAL.misfits.get(storage, []):
            before, after = (side.partition(" ") for side in text.split(" into "))
            assert before[2].replace(", 1]", "]") == after[2].replace(", 1]", "]"), (
                f"{name}: {text}"
            )
            assert "float" in before[0], f"{name}: {text}"
            assert "float" in after[0], f"{name}: {text}"


def write(
    folder: Path,
    peer: str,
    weights: Mapping[str, tuple[int, int]],
    changes: Mapping[str, Any],
) -> None:
    """Write a checkpoint of random codes in a peer's format, with biases where k has siblings."""
    import torch

    from tests.checkpoint.peers import quantization_config
    from tests.checkpoints import write_checkpoint
    from tests.quantize.peers import LAYERS, torch_layer

    if peer == "deepseek":
        peer, quantization = "llmcompressor-fp8-block", dict(_DEEPSEEK)
        renamed = {"weight_scale": "weight_scale_inv"}
    else:
        quantization, renamed = {**quantization_config(peer), **changes}, {}
    tensors: dict[str, torch.Tensor] = {}
    for name, (N, K) in weights.items():
        for suffix, like in torch_layer(peer, LAYERS[0]).items():
            tensors[f"{name}.{renamed.get(suffix, suffix)}"] = alike(suffix, like, N, K)
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            tensors[f"{name}.bias"] = torch.zeros(N, dtype=torch.bfloat16)
    config: dict[str, Any] = {"torch_dtype": "bfloat16", "num_key_value_heads": 8}
    # auto-round names the blocks that it quantized; the layer here is none of a Llama's
    quantization = {k: "block" if v == "model.layers" else v for k, v in quantization.items()}
    if quantization:
        config["quantization_config"] = quantization
    write_checkpoint(folder, config, tensors)


def alike(suffix: str, like: Any, N: int, K: int) -> Any:
    """A tensor of the same kind for an [N, K] weight."""
    import torch

    sizes = {
        _N: N, _K: K, _N // 8: N // 8, _K // 8: K // 8, _K // 64: K // 64, 1: 1,
        _K // 2: K // 2, _K // 16: K // 16,
        2: math.ceil(N / 128), 5: math.ceil(K / 128),
    }  # fmt: skip
    if suffix == "weight_shape":
        return torch.tensor([N, K])
    if suffix == "g_idx":
        return (torch.arange(K) // 64).to(like.dtype)
    shape = [sizes[size] for size in like.shape]
    if suffix == "qzeros" and bool((like == like[0, 0]).all()):
        return like[0, 0].expand(shape).contiguous()
    if like.is_floating_point() and like.numel() == 1:
        # shards of a fused module share it
        return like.clone()
    if like.is_floating_point():
        return (torch.rand(shape) + 0.5).to(like.dtype)
    limits = torch.iinfo(like.dtype)
    codes = torch.randint(limits.min, limits.max, shape, dtype=like.dtype)
    # GPTQ's zero points of 0 are none that SGLang reads
    return codes & 0x77777777 if suffix == "qzeros" else codes


if __name__ == "__main__":
    run_on_card(run_all)
