"""The layer kinds: what the checkpoint holds, and the module that SGLang builds for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead

from tests.checkpoints import write_checkpoint

NUM_TOKENS = 5
_HEAD = 128


@dataclasses.dataclass(frozen=True)
class Kind:
    """A layer kind.

    Attributes:
        module: name of the module that the model builds.
        weights: layer name -> its weight's shape [N, K].
        build: (config, module name) -> SGLang's module.
        splits_inputs: whether ranks split K.
    """

    module: str
    weights: Mapping[str, tuple[int, int]]
    build: Callable[[Any, str], torch.nn.Module]
    splits_inputs: bool = False

    def write(self, folder: Path) -> Path:
        """Write a checkpoint of random weights, in bfloat16, with biases where the kind has any."""
        generator = torch.Generator().manual_seed(0)
        tensors = {}
        for name, (N, K) in self.weights.items():
            weight = torch.randn(N, K, generator=generator) * K**-0.5
            tensors[f"{name}.weight"] = weight.bfloat16()
            if "qkv" in self.module:
                tensors[f"{name}.bias"] = torch.randn(N, generator=generator).bfloat16()
        config = {"architectures": ["OneLayer"], "model_type": "one", "torch_dtype": "bfloat16"}
        return write_checkpoint(folder, config, tensors)

    def inputs(self, tp_size: int, dtype: torch.dtype) -> torch.Tensor:
        """What one rank is given."""
        K = next(iter(self.weights.values()))[1]
        width = K // tp_size if self.splits_inputs else K
        return torch.empty(NUM_TOKENS, width, dtype=dtype)


def _column(config: Any, prefix: str) -> torch.nn.Module:
    return ColumnParallelLinear(1024, 2048, bias=False, quant_config=config, prefix=prefix)


def _narrow(config: Any, prefix: str) -> torch.nn.Module:
    return ColumnParallelLinear(1024, 256, bias=False, quant_config=config, prefix=prefix)


def _ragged(config: Any, prefix: str) -> torch.nn.Module:
    return ColumnParallelLinear(1024, 1056, bias=False, quant_config=config, prefix=prefix)


def _merged(config: Any, prefix: str) -> torch.nn.Module:
    return MergedColumnParallelLinear(
        1024, [2048, 2048], bias=False, quant_config=config, prefix=prefix
    )


def _qkv(config: Any, prefix: str) -> torch.nn.Module:
    return QKVParallelLinear(1024, _HEAD, 16, 8, bias=True, quant_config=config, prefix=prefix)


def _row(config: Any, prefix: str) -> torch.nn.Module:
    return RowParallelLinear(2048, 1024, bias=False, quant_config=config, prefix=prefix)


def _replicated(config: Any, prefix: str) -> torch.nn.Module:
    return ReplicatedLinear(1024, 256, bias=False, quant_config=config, prefix=prefix)


def _lm_head(config: Any, prefix: str) -> torch.nn.Module:
    return ParallelLMHead(2048, 1024, quant_config=config, prefix=prefix)


KINDS: Mapping[str, Kind] = {
    "column": Kind("block.fc1", {"block.fc1": (2048, 1024)}, _column),
    # fits blocks and Marlin's tiles as a whole, and at tensor parallel 8 no more
    "narrow": Kind("block.fc1", {"block.fc1": (256, 1024)}, _narrow),
    # fits neither, ever
    "ragged": Kind("block.fc1", {"block.fc1": (1056, 1024)}, _ragged),
    "merged": Kind(
        "block.gate_up_proj",
        {"block.gate_proj": (2048, 1024), "block.up_proj": (2048, 1024)},
        _merged,
    ),
    "qkv": Kind(
        "block.qkv_proj",
        {"block.q_proj": (2048, 1024), "block.k_proj": (1024, 1024), "block.v_proj": (1024, 1024)},
        _qkv,
    ),
    "row": Kind("block.o_proj", {"block.o_proj": (1024, 2048)}, _row, splits_inputs=True),
    "replicated": Kind("block.q_a_proj", {"block.q_a_proj": (256, 1024)}, _replicated),
    "lm_head": Kind("lm_head", {"lm_head": (2048, 1024)}, _lm_head),
}
