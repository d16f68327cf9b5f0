"""The quantizers with the arguments that the tests go through."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch

from mixedprec_plugin.methods.awq import codec as awq
from mixedprec_plugin.methods.blockwise_int8 import codec as blockwise_int8
from mixedprec_plugin.methods.fp8 import codec as fp8
from mixedprec_plugin.methods.fp8_channel import codec as fp8_channel
from mixedprec_plugin.methods.gptq import codec as gptq
from mixedprec_plugin.methods.humming import codec as humming
from mixedprec_plugin.methods.int8_channel import codec as int8_channel
from mixedprec_plugin.methods.mxfp4 import codec as mxfp4
from mixedprec_plugin.methods.nvfp4 import codec as nvfp4
from mixedprec_plugin.methods.registry import bind

MODULES = {
    "fp8": fp8, "fp8_channel": fp8_channel, "blockwise_int8": blockwise_int8,
    "int8_channel": int8_channel, "awq": awq, "gptq": gptq,
    "humming": humming, "nvfp4": nvfp4, "mxfp4": mxfp4,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A method with complete arguments."""

    method: str
    arguments: Mapping[str, Any]

    @property
    def module(self) -> ModuleType:
        """The quantizer's module."""
        return MODULES[self.method]

    def quantize(
        self, weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16
    ) -> dict[str, torch.Tensor]:
        """The stored tensors."""
        tensors: dict[str, torch.Tensor] = self.module.quantize(weight, self.arguments, dtype)
        return tensors

    def dequantize(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weight again, float32."""
        weight: torch.Tensor = self.module.read(tensors, self.arguments).dequantize()
        return weight

    def __str__(self) -> str:
        given = "-".join(f"{key}={value}" for key, value in self.arguments.items())
        return f"{self.method}-{given}".replace(" ", "")


def case(name: str, **arguments: Any) -> Case:
    """Bind a method's name, as a preset does."""
    return Case(*bind(name, arguments))


CASES = (
    case("fp8"),
    case("fp8", weight_block_size=[128, 128]),
    case("fp8_channel"),
    case("blockwise_int8"),
    case("int8_channel"),
    case("awq", group_size=32),
    case("awq", group_size=-1),
    case("gptq", bits=4, group_size=32),
    case("gptq", bits=4, group_size=-1),
    case("gptq", bits=8, group_size=32),
    case("humming", bits=3, group_size=32),
    case("humming", bits=6, group_size=64),
    case("nvfp4"),
    case("mxfp4"),
)
