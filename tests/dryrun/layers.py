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
from tests.dryrun.stored import FORMATS, QUANTIZATION_CONFIGS

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
        splits_outputs: whether ranks split N.
        num_kv_heads: of a module with key and value shards, which are repeated where there are
            fewer of them than ranks; 0 for the others.
    """

    module: str
    weights: Mapping[str, tuple[int, int]]
    build: Callable[[Any, str], torch.nn.Module]
    splits_inputs: bool = False
    splits_outputs: bool = True
    num_kv_heads: int = 0

    @property
    def pattern(self) -> str:
        """What a rule says for the layers to be quantized: `*` leaves a head alone."""
        return self.module if self.module == "lm_head" else "*"

    def write(self, folder: Path, stored: str = "bf16") -> Path:
        """Write a checkpoint of random weights, with biases where the kind has any.

        Args:
            stored: key of `FORMATS`; where it is FP8, lm_head is stored in bfloat16.
        """
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        tensors: dict[str, torch.Tensor] = {}
        for name, (N, K) in self.weights.items():
            weight = torch.randn(N, K, generator=generator) * K**-0.5
            is_plain = name == "lm_head" and stored.startswith("fp8")
            tensors |= FORMATS["bf16" if is_plain else stored](name, weight)
            if self.num_kv_heads:
                tensors[f"{name}.bias"] = torch.randn(N, generator=generator).bfloat16()
        config: dict[str, Any] = {
            "architectures": ["OneLayer"],
            "model_type": "one",
            "torch_dtype": "bfloat16",
        }
        if self.num_kv_heads:
            config["num_key_value_heads"] = self.num_kv_heads
        if QUANTIZATION_CONFIGS[stored]:
            config["quantization_config"] = QUANTIZATION_CONFIGS[stored]
        return write_checkpoint(folder, config, tensors)

    def num_ranks(self, name: str, tp_size: int) -> int:
        """Over how many ranks a layer's outputs are split."""
        if self.num_kv_heads and not name.endswith("q_proj"):
            return min(tp_size, self.num_kv_heads)
        return tp_size if self.splits_outputs else 1

    def num_outputs(self, tp_size: int) -> int:
        """Output features of one rank."""
        return sum(N // self.num_ranks(name, tp_size) for name, (N, _) in self.weights.items())

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


def _few_kv_heads(config: Any, prefix: str) -> torch.nn.Module:
    return QKVParallelLinear(1024, _HEAD, 16, 4, bias=True, quant_config=config, prefix=prefix)


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
        num_kv_heads=8,
    ),
    # at tensor parallel 8 two ranks hold the same key and value heads
    "few_kv_heads": Kind(
        "block.qkv_proj",
        {"block.q_proj": (2048, 1024), "block.k_proj": (512, 1024), "block.v_proj": (512, 1024)},
        _few_kv_heads,
        num_kv_heads=4,
    ),
    "row": Kind(
        "block.o_proj",
        {"block.o_proj": (1024, 2048)},
        _row,
        splits_inputs=True,
        splits_outputs=False,
    ),
    "replicated": Kind(
        "block.q_a_proj", {"block.q_a_proj": (256, 1024)}, _replicated, splits_outputs=False
    ),
    "lm_head": Kind("lm_head", {"lm_head": (2048, 1024)}, _lm_head),
}
