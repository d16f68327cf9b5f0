"""Tensors under `method: auto` and SGLang's own parameters, whose loaders cast what they get."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixedprec_plugin.errors import LoadError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sglang.srt.layers.parameter import BlockQuantScaleParameter, ModelWeightParameter

    from mixedprec_plugin.serving.placement import place

pytestmark = pytest.mark.sglang

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
KINDS: dict[str, Any] = {"weight": ModelWeightParameter, "weight_scale": BlockQuantScaleParameter}


def placed(suffix: str, held: torch.dtype, tensor: torch.Tensor) -> torch.Tensor:
    """What a parameter of a dtype holds after a layer under `auto` was given a tensor."""
    data = torch.zeros(tensor.shape).to(held)
    parameter = KINDS[suffix](
        data=data,
        input_dim=1,
        output_dim=0,
        weight_loader=lambda own, loaded: own.load_row_parallel_weight(loaded, tp_rank=0),
    )
    module = torch.nn.Module()
    module.register_parameter(suffix, parameter)
    module.quant_method = SimpleNamespace()
    layer: Any = SimpleNamespace(name="o_proj", module="o_proj", method="auto", shard=None)
    config: Any = SimpleNamespace(built={"o_proj": module})
    place(config, layer, suffix, tensor)
    return parameter.data


@pytest.mark.parametrize(
    ("suffix", "held", "stored", "text"),
    [
        ("weight", E4M3, E5M2, "float8_e5m2, which SimpleNamespace would cast to float8_e4m3fn"),
        ("weight_scale", torch.float32, torch.uint8, "uint8, which .* would cast to float32"),
        ("weight", torch.bfloat16, torch.uint8, "uint8, which .* would cast to bfloat16"),
    ],
)
def test_codes_that_sglang_would_cast_are_refused(
    suffix: str, held: torch.dtype, stored: torch.dtype, text: str
) -> None:
    with pytest.raises(LoadError, match=f"o_proj.{suffix}: is stored as {text}; name a method"):
        placed(suffix, held, torch.full((2, 4), 120).to(stored))


@pytest.mark.parametrize(
    ("suffix", "held", "stored"),
    [
        ("weight", E4M3, E4M3),
        ("weight_scale", torch.float32, torch.bfloat16),
        ("weight", torch.int8, torch.int8),
    ],
)
def test_others_are_taken(suffix: str, held: torch.dtype, stored: torch.dtype) -> None:
    tensor = torch.full((2, 4), 120).to(stored)
    assert torch.equal(placed(suffix, held, tensor).float(), tensor.float())
