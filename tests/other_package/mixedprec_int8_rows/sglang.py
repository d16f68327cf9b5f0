"""SGLang's side of `int8_rows`: the weight is dequantized and multiplied, on any device."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.base_config import LinearMethodBase, QuantizationConfig
from sglang.srt.utils import set_weight_attrs


class RowsConfig(QuantizationConfig):
    """Hands out the method."""

    @classmethod
    def get_name(cls) -> str:
        """The method's name."""
        return "int8_rows"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What a model may run in."""
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RowsConfig:
        """Nothing to read."""
        return cls()

    def get_scaled_act_names(self) -> list[str]:
        """None."""
        return []

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> RowsLinearMethod | None:
        """The method of a linear layer."""
        return RowsLinearMethod() if isinstance(layer, LinearBase) else None


class RowsLinearMethod(LinearMethodBase):
    """Multiplies by the dequantized weight."""

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Create "row_codes" int8 [N, K] and "row_scale" float32 [N, 1]."""
        N = sum(output_partition_sizes)
        codes = torch.empty(N, input_size_per_partition, dtype=torch.int8)
        scale = torch.empty(N, 1, dtype=torch.float32)
        for name, tensor, dims in (
            ("row_codes", codes, {"input_dim": 1, "output_dim": 0}),
            ("row_scale", scale, {"output_dim": 0}),
        ):
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
            layer.register_parameter(name, parameter)
            set_weight_attrs(parameter, {**dims, **extra})

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        weight = (layer.row_codes.float() * layer.row_scale).to(x.dtype)
        return torch.nn.functional.linear(x, weight, bias)
