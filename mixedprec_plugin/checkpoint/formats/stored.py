"""How one layer is stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mixedprec_plugin.checkpoint.headers import StoredTensor

FLOAT_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
UNQUANTIZED = "float"

Tensors = Mapping[str, StoredTensor]


@dataclasses.dataclass(frozen=True)
class StoredFormat:
    """How one layer is stored.

    Attributes:
        method: canonical key of the method that takes the tensors as they are, or an empty string
            where none of ours does.
        arguments: the method's arguments as far as the stored tensors fix them.
        N: output features; 0 where the tensors do not tell.
        K: input features; 0 where the tensors do not tell.
        description: for people, such as `gptq 4-bit group 128`.
        family: `float`, `awq`, `gptq`, `fp8`, `int8`, `pack-quantized`, `torchao`, or an empty
            string where we only know a name; what a config's promise is held against.
        facts: what the tensors tell of `bits`, `group_size`, `block`, `strategy`, `symmetric`.
        said: what config.json says of the layer, where it speaks of the same family: the same
            facts, and what tensors cannot tell: `desc_act`, and `inputs`, how the layer's
            activations are quantized (`dynamic`, `group_size`; None where they are not).
        suffixes: the tensors that make up the weight matrix; a bias is none of them.
        dequantizer: lazy `package.module:function` (tensors by suffix, arguments) -> [N, K]
            float32; empty for floats, and for what cannot be read.
        dequantizer_arguments: its second argument.
        filled: suffixes that the method needs, that are not stored and that follow from the rest.
        disagreements: where the tensors contradict config.json or each other.
    """

    method: str
    arguments: Mapping[str, Any]
    N: int
    K: int
    description: str
    family: str = ""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    said: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    suffixes: frozenset[str] = frozenset()
    dequantizer: str = ""
    dequantizer_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    filled: frozenset[str] = frozenset()
    disagreements: tuple[str, ...] = ()

    @property
    def is_readable(self) -> bool:
        """Whether the weight's values can be had, as they are stored or dequantized."""
        return bool(self.method or self.dequantizer)


def unusable(
    tensors: Tensors,
    description: str,
    N: int = 0,
    K: int = 0,
    *,
    family: str = "",
    disagreements: tuple[str, ...] = (),
) -> StoredFormat:
    """Name a format that is neither served nor dequantized."""
    suffixes = frozenset(tensors) - {"bias"}
    return StoredFormat(
        "", {}, N, K, description, family, suffixes=suffixes, disagreements=disagreements
    )


def incomplete(tensors: Tensors, what: str, missing: list[str], family: str = "") -> StoredFormat:
    """Name a layer that lacks tensors of its format."""
    names = " and ".join(missing)
    text = f"lacks {names} beside {', '.join(sorted(tensors))}"
    return unusable(tensors, f"{what} without {names}", family=family, disagreements=(text,))


def group_size_of(K: int, num_groups: int) -> int | None:
    """Return elements along K that share a scale, -1 for all of K; None where groups are ragged."""
    if num_groups == 1:
        return -1
    return K // num_groups if num_groups and K % num_groups == 0 else None
