"""Is a model that the plugin loaded what SGLang's own loader makes of the same checkpoint?

What stays in floats must be the same, bit for bit; a quantized layer must compute what the weight
of SGLang's unquantized one says, but for what rounding to FP8 does.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

# e4m3 has 3 bits of mantissa, and SGLang rounds shards of one module again, to the greatest scale
_ROUNDING = 2.0**-3
# what is smaller than the greatest weight by this much is rounded to a multiple of it
_SMALLEST = 2.0**-16
# weights and activations are rounded, at most by 2**-4 each: of the outputs' root mean square
_EXPERTS = 0.15
_NUM_TOKENS = 8


@dataclasses.dataclass
class Values:
    """What was compared.

    Attributes:
        same: parameters that are the same bit for bit.
        rounded: quantized layers that compute what they should; experts count as one.
        faults: the others, in words.
        unread: what SGLang's own loader says of the checkpoint, where it does not read it.
    """

    same: int = 0
    rounded: int = 0
    faults: list[str] = dataclasses.field(default_factory=list)
    unread: str = ""


def compare(path: Path, preset: Path) -> Values:
    """Load a checkpoint twice in this process, by SGLang's own loader and by the plugin's.

    Args:
        preset: gives layers fp8 or bf16.
    """
    from mixedprec_plugin.serving.alone import one_rank

    with one_rank(str(path)), _on_cpu():
        try:
            stock = _load(path, load_format="auto")
        except (AssertionError, KeyError, RuntimeError, ValueError) as error:
            return Values(unread=f"{type(error).__name__}: {error}")
        said = {"mixedprec_config": str(preset)}
        mixed = _load(path, load_format="mixedprec", model_loader_extra_config=said)
        return _compare(stock, mixed)


def _load(path: Path, **load_config: Any) -> Any:
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader.loader import get_model_loader

    model_config = ModelConfig(str(path), dtype="bfloat16")
    loader = get_model_loader(LoadConfig(**load_config), model_config)
    return loader.load_model(model_config=model_config, device_config=DeviceConfig("cpu"))


@contextlib.contextmanager
def _on_cpu() -> Iterator[None]:
    """For models that ask CUDA for the number of their device (models/qwen3_next.py:235)."""
    with mock.patch.object(torch.cuda, "current_device", return_value=torch.device("cpu")):
        yield


def _compare(stock: Any, mixed: Any) -> Values:
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.quantization.unquant import (
        UnquantizedFusedMoEMethod,
        UnquantizedLinearMethod,
    )

    values, theirs = Values(), dict(stock.named_modules())
    floats = UnquantizedLinearMethod | UnquantizedFusedMoEMethod
    for path, module in mixed.named_modules():
        is_layer = isinstance(module, LinearBase | FusedMoE)
        if is_layer and not isinstance(module.quant_method, floats):
            differ = _linear if isinstance(module, LinearBase) else _experts
            fault = differ(module, theirs[path])
            values.rounded += not fault
            values.faults += [f"{path}: {fault}"] if fault else []
            continue
        for name, parameter in module.named_parameters(recurse=False):
            own, other = parameter.data, getattr(theirs[path], name).data
            is_same = own.dtype == other.dtype and torch.equal(own, other)
            values.same += is_same
            if not is_same:
                values.faults.append(f"{path}.{name}: {own.dtype}, not SGLang's {other.dtype}")
    return values


def _linear(own: Any, stock: Any) -> str:
    """Compare the effective weights: what a layer makes of the rows of one."""
    identity = torch.eye(own.input_size_per_partition, dtype=torch.bfloat16)
    made = own.quant_method.apply(own, identity, None).float().T
    weight = stock.weight.data.float()
    if made.shape != weight.shape:
        return f"computes {list(made.shape)}, not {list(weight.shape)}"
    allowed = _ROUNDING * weight.abs() + _SMALLEST * weight.abs().max()
    wrong = int(((made - weight).abs() > allowed).sum())
    return f"{wrong} of {weight.numel()} weights are none that rounding makes" if wrong else ""


def _experts(own: Any, stock: Any) -> str:
    """Compare what each expert makes of the same tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(_NUM_TOKENS, own.hidden_size, generator=generator).bfloat16()
    wrong = []
    for expert in range(stock.num_experts):
        made, expected = (_run(layer, tokens, expert) for layer in (own, stock))
        error = (made - expected).norm() / expected.norm()
        if not error <= _EXPERTS:
            wrong.append(f"expert {expert} is off by {error:.2f}")
    return ", ".join(wrong)


def _run(layer: Any, tokens: torch.Tensor, expert: int) -> torch.Tensor:
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    ids = torch.full((len(tokens), 1), expert, dtype=torch.int32)
    logits = torch.zeros(len(tokens), layer.num_experts)
    topk = StandardTopKOutput(torch.ones(len(tokens), 1), ids, logits)
    out: torch.Tensor = layer.forward(tokens.clone(), topk)
    return out.float()
