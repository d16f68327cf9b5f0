"""SGLang's layers on a device: planned, built, loaded through SGLang's loaders, repacked.

The layers, methods and the rank without processes are those of `tests/dryrun`; here they hold
numbers. Importing this module imports SGLang.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.serving.config import MixedPrecisionConfig
from mixedprec_plugin.serving.filling import load_weights
from mixedprec_plugin.serving.late import check_built
from tests.dryrun import experts
from tests.dryrun.cells import OneLayer
from tests.dryrun.layers import KINDS
from tests.dryrun.methods import METHODS, Method
from tests.dryrun.rank import OneStage, rank
from tests.presets import plan
from tests.reference.dequantize import dequantize_method

BY_TITLE: Mapping[str, Method] = {method.title: method for method in METHODS}


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a plan stores of one layer, on the CPU.

    Attributes:
        method: canonical name of the method that it runs in.
        arguments: the method's.
        tensors: suffix -> tensor of the virtual checkpoint.
    """

    method: str
    arguments: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]

    @functools.cached_property
    def weight(self) -> torch.Tensor:
        """The weight that the tensors stand for, by independent code, float64 [N, K]."""
        plain = self.tensors.get("weight")
        if plain is not None and plain.dtype == torch.bfloat16:
            return plain.double()
        arrays = {name: as_array(t) for name, t in self.tensors.items() if name != "bias"}
        found = dequantize_method(self.method, arrays, self.arguments)
        return torch.from_numpy(found.astype(np.float64))


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A layer that is ready to run, and what was stored of it.

    Attributes:
        layer: SGLang's module.
        stored: layer name -> what the virtual checkpoint has of it, of all ranks.
    """

    layer: Any
    stored: Mapping[str, Stored]


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """Integers as they are, floating dtypes as float32."""
    found: np.ndarray = (tensor if not tensor.is_floating_point() else tensor.float()).numpy()
    return found


@functools.cache
def _folder() -> Path:
    """Of this process's checkpoints, which go with it."""
    folder = Path(tempfile.mkdtemp(prefix="mixedprec-gpu-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _checkpoint(kind: str, stored: str) -> Path:
    return KINDS[kind].write(_folder() / f"{kind}-{stored}" / "model", stored)


@functools.cache
def _experts_checkpoint(kind: str) -> Path:
    return experts.write(_folder() / kind / "model", experts.KINDS[kind])


def plan_linear(method: str, kind: str, tp_size: int, device: str = "cuda") -> Plan:
    """Plan a method in a layer kind; it may hold errors."""
    given = BY_TITLE[method]
    target = Target(device, tp_size, "BF16")  # type: ignore[arg-type]
    return plan(_checkpoint(kind, given.stored), f'match: "*", {given.rule}', target=target)


def plan_experts(method: str, kind: str, tp_size: int, device: str = "cuda") -> Plan:
    """Plan a layer of experts; it may hold errors."""
    target = Target(device, tp_size, "BF16")  # type: ignore[arg-type]
    return plan(_experts_checkpoint(kind), *experts.RULES[method], target=target)


def read_stored(made: Plan) -> dict[str, Stored]:
    """Every tensor of a plan's virtual checkpoint, by layer."""
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in VirtualCheckpoint(made):
        layer, _, suffix = name.rpartition(".")
        tensors.setdefault(layer, {})[suffix] = tensor
    found = {}
    for name, own in tensors.items():
        scheme = made.by_name[name].scheme
        method, arguments = ("bf16", {}) if scheme is None else (scheme.method, scheme.arguments)
        found[name] = Stored(method, dict(arguments), own)
    return found


@contextlib.contextmanager
def linear(made: Plan, kind: str, tp_size: int, device: str = "cuda") -> Iterator[Loaded]:
    """The last rank's part of a linear layer, as SGLang's loader leaves it, in bfloat16."""
    config = MixedPrecisionConfig(made.check())
    with rank(tp_size), torch.no_grad():
        with _in_bfloat16():
            with torch.device(device):
                model = OneLayer(KINDS[kind], config)
            stored = _fill(model, config, made)
        yield Loaded(model.layer, stored)


@contextlib.contextmanager
def expert_layer(made: Plan, kind: str, tp_size: int, device: str = "cuda") -> Iterator[Loaded]:
    """The last rank's part of a layer of experts, as SGLang's loader leaves it, in bfloat16."""
    config = MixedPrecisionConfig(made.check())
    with rank(tp_size), torch.no_grad():
        with _in_bfloat16():
            with torch.device(device):
                model = experts.build(config, experts.KINDS[kind])
            stored = _fill(model, config, made)
        yield Loaded(model.layer, stored)


def _fill(model: Any, config: MixedPrecisionConfig, made: Plan) -> dict[str, Stored]:
    check_built(config.plan, config.built, OneStage())  # type: ignore[arg-type]
    stored = read_stored(made)
    flat = (
        (f"{name}.{suffix}", tensor)
        for name, own in stored.items()
        for suffix, tensor in own.tensors.items()
    )
    load_weights(model, config, flat)
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(module)
    return stored


@contextlib.contextmanager
def _in_bfloat16() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def run_linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """[T, K of the rank] -> [T, N of the rank]."""
    if type(layer).__name__ == "ParallelLMHead":
        out: torch.Tensor = layer.quant_method.apply(layer, x)
    else:
        out = layer(x)[0]
    return out


def class_of(layer: Any) -> str:
    """The quantization method's class, with the scheme that it works by, as docs name them."""
    scheme = getattr(layer, "scheme", None)
    name = type(layer.quant_method).__name__
    return name if scheme is None else f"{name}/{type(scheme).__name__}"
