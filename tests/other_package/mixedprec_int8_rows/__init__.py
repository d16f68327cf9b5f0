"""Method `int8_rows`, as a package of its own: 8-bit integers with a scale a row, weight-only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixedprec_plugin.methods.interface import (
    Alternative,
    Arguments,
    Fault,
    LayerShape,
    Method,
    Rounding,
    Target,
)
from mixedprec_plugin.methods.stored import Said, StoredFormat, Tensors, TensorSpec

NAME = "int8_rows"
CODEC = "mixedprec_int8_rows.codec"


def stored(arguments: Arguments, N: int, K: int, _dtype: str) -> dict[str, TensorSpec]:
    """Return "row_codes" int8 [N, K] and "row_scale" float32 [N, 1]; W = codes * scale."""
    return {"row_codes": TensorSpec("I8", (N, K)), "row_scale": TensorSpec("F32", (N, 1))}


def read_config(config: Mapping[str, Any], _name: str) -> Said:
    """Read what config.json says of a layer."""
    return Said(NAME, {"top": config.get("top")})


def recognize(tensors: Tensors, said: Said) -> StoredFormat | None:
    """Take `row_codes` beside a scale a row."""
    codes, scale = tensors.get("row_codes"), tensors.get("row_scale")
    if codes is None or scale is None or scale.shape != (codes.shape[0], 1):
        return None
    top = said.of(NAME).get("top", 127)
    return StoredFormat(
        NAME,
        {"top": top},
        *codes.shape,
        f"int8 rows up to {top}",
        encoding=NAME,
        suffixes=frozenset({"row_codes", "row_scale"}),
        codec=CODEC,
        how={},
        like=NAME,
        limit=0.05,
    )


def faults(_arguments: Arguments, shape: LayerShape, _target: Target) -> list[Fault]:
    """Return what its matmul does not take: experts, and rows that are no multiple of 16."""
    found = {
        "int8_rows does not serve experts": shape.is_expert,
        f"K = {shape.K} is not a multiple of 16": shape.K % 16 != 0,
    }
    return [Fault("shape", text) for text, is_so in found.items() if is_so]


METHOD = Method(
    name=NAME,
    title="8-bit integers, one scale a row, weight-only",
    description="8-bit integers with a scale a row; activations stay in 16 bits.",
    aliases={"int8_rows_narrow": {"top": 63}},
    schema={
        "top": {"description": "The largest code.", "enum": [127, 63], "default": 127},
    },
    stored=stored,
    recognize=recognize,
    read_config={NAME: read_config},
    declare=lambda arguments: {"quant_method": NAME, **arguments},
    faults=faults,
    rounding=lambda arguments: Rounding(rank=8.0, limit=0.05, error=lambda _N, _K: 0.01),
    alternatives=(Alternative("fp8"),),
    config_classes=dict.fromkeys(("cuda", "cpu"), "mixedprec_int8_rows.sglang:RowsConfig"),
    config_arguments=lambda _arguments, _platform: {},
    codec=CODEC,
)
