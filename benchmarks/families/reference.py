"""transformers on dequantized weights: what an engine's logits are held against."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.families.architectures import Architecture
from benchmarks.families.stepwise import Follower, Steps
from benchmarks.families.trace import Trace
from benchmarks.reference_experts import ReferenceExperts, split_experts
from benchmarks.reference_layers import (
    QUANTIZED,
    ReferenceError,
    Tensors,
    by_layer,
    reference_linear,
    replace_layer,
)
from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.families.names import ExpertShard


@dataclasses.dataclass(frozen=True)
class Run:
    """What a reference gave.

    Attributes:
        logits: float32 [T + len(forced), V], of every position.
        steps: how it and the engine's modules differed.
    """

    logits: torch.Tensor
    steps: Steps


def run_reference(
    architecture: Architecture,
    model_path: Path,
    stream: VirtualCheckpoint,
    tokens: tuple[list[int], list[int]],
    trace: Trace | None = None,
    *,
    takes_inputs: bool = False,
    num_ranks: int = 1,
) -> Run:
    """Run a prompt at once and then token after token, with the weights of a virtual checkpoint.

    Args:
        tokens: the prompt, and those to go on with.
        trace: an engine's: its choices of experts are taken where they differ.
        takes_inputs: take the inputs of the engine's layers, too.
        num_ranks: the engine's.
    Raises:
        ReferenceError: a layer that transformers does not have, or one of another shape.
    """
    model = _load(architecture, model_path)
    _put_weights(model, stream, num_ranks)
    follower = Follower(trace or Trace(), takes_inputs=takes_inputs)
    if trace is not None:
        _follow(model, stream, trace, follower)
    prompt, forced = tokens
    logits, cache = [], None
    with torch.inference_mode():
        for part in (prompt, *([token] for token in forced)):
            out = model(torch.tensor([part]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits[0].float())
            follower.advance()
    return Run(torch.cat(logits), follower.steps)


def _load(architecture: Architecture, path: Path) -> Any:
    model_class: Any = getattr(transformers, architecture.model_class)
    model = model_class.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="eager")
    return model.eval()


def _put_weights(model: Any, stream: VirtualCheckpoint, num_ranks: int) -> None:
    """Put every quantized layer in its place; the rest is there as it is stored."""
    experts: dict[str, ReferenceExperts] = {}
    mixtures = {
        module
        for module, layers in stream.plan.modules.items()
        if any(isinstance(x.shard, ExpertShard) and x.method in QUANTIZED for x in layers)
    }
    for name, tensors in by_layer(stream):
        layer = stream.plan.by_name[name]
        if layer.module in mixtures:
            if layer.module not in experts:
                block = _block(model, layer.module)
                experts[layer.module] = split_experts(model, block, num_ranks)
            experts[layer.module].put(layer, tensors)
        elif layer.method in QUANTIZED:
            replace_layer(model, _spelled(model, name), reference_linear(layer, tensors))
        else:
            _check_same(model, _spelled(model, name), tensors)


def _follow(model: Any, stream: VirtualCheckpoint, trace: Trace, follower: Follower) -> None:
    for module, layers in stream.plan.modules.items():
        if layers[0].kind == "linear":
            for layer in layers:
                follower.follow_input(model.get_submodule(_spelled(model, layer.name)), module)
        elif isinstance(layers[0].shard, ExpertShard):
            block = model.get_submodule(_block(model, module))
            follower.follow_input(block, module)
            follower.follow_choices(block.gate, module)


def _block(model: Any, module: str) -> str:
    """The module of transformers whose `experts` a module of experts is."""
    return _spelled(model, module).rpartition(".")[0]


def _spelled(model: Any, name: str) -> str:
    """The module that transformers makes of a layer of the checkpoint."""
    name = name.replace(".block_sparse_moe.", ".mlp.")
    if hasattr(model.model, "language_model"):
        name = name.replace("visual.", "model.visual.", 1) if name.startswith("visual.") else name
        name = name.replace("model.", "model.language_model.", 1) if _is_text(name) else name
    return name


def _is_text(name: str) -> bool:
    return name.startswith(("model.layers.", "model.embed_tokens", "model.norm"))


def _check_same(model: Any, name: str, tensors: Tensors) -> None:
    """What is not quantized is served as it is stored."""
    for suffix, tensor in tensors.items():
        full = f"{name}.{suffix}"
        held = {**dict(model.named_parameters()), **dict(model.named_buffers())}.get(full)
        if held is None and ".experts." in full:
            continue
        if held is None or not torch.equal(held.float(), tensor.float()):
            raise ReferenceError(f"{full}: transformers holds another tensor (expected the same)")
