"""SGLang's own config for a source's `quantization_config`: what layers under `auto` run in.

Chosen as SGLang does for a whole model: its classes are asked whether they take the checkpoint over
(gptq by gptq_marlin, awq by awq_marlin), then `from_config` reads what the source says, its lists
of layers that are left alone included.
Source: `ModelConfig._verify_quantization` (configs/model_config.py:2093), `get_quant_config`
(model_loader/weight_utils.py:269).
"""

from __future__ import annotations

import contextlib
import copy
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from sglang.srt.layers.quantization.base_config import (
    FusedMoEMethodBase,
    QuantizationConfig,
    QuantizeMethodBase,
)
from sglang.srt.layers.quantization.compressed_tensors.schemes import CompressedTensorsWNA16MoE
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.errors import LoadError, Problem
from mixedprec_plugin.methods.construct import repaired, sglang_version
from mixedprec_plugin.methods.registry import METHODS

# what SGLang raises at configs, shapes and kernels that it does not have
REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
# one name for formats that each have a class
_MODELOPT = "modelopt"
_GUARDED = ("create_weights", "process_weights_after_loading")


def config_of_source(
    source: Source, layer: str, packed_modules: Mapping[str, list[str]], where: str
) -> QuantizationConfig:
    """Make SGLang's config of a source, as one of its layers is stored.

    Args:
        layer: a layer's name; of our own checkpoints each has a `quantization_config` of its own.
        packed_modules: last component of a fused module -> those of its shards.
        where: the layers that it is for, for the messages.
    Raises:
        LoadError: there is none, or SGLang has no class that reads it.
    """
    said = copy.deepcopy(dict(source.quantization_config_of(layer)))
    name = str(said.get("quant_method") or "").lower()
    if not name:
        what = f"config.json of source {source.name!r} names no quant_method"
        what += ", which method: auto goes by"
        raise LoadError(Problem(where, what, "name the layers' method", "auto-config"))
    said["packed_modules_mapping"] = {k: list(v) for k, v in packed_modules.items()}
    with refusals(where, f"{name!r} of source {source.name!r}"):
        config_class = get_quantization_config(_taken_over(said, name) or name)
        config = config_class.from_config(said)
        config.update_packed_modules_mapping(said["packed_modules_mapping"])
    return config


def _taken_over(said: Mapping[str, Any], name: str) -> str | None:
    """The name of the class that says it reads this checkpoint better, if one does.

    ModelOpt's are told apart by `quant_algo` where "modelopt" is asked for (base_config.py:242).
    """
    asked = name if name == _MODELOPT else None
    for config_class in QUANTIZATION_METHODS.values():
        found: str | None = config_class.override_quantization_method(said, asked)
        if found:
            return found
    return None


def experts_method_under_auto(
    config: QuantizationConfig, layer: FusedMoE, prefix: str
) -> FusedMoEMethodBase:
    """Choose the method of experts while SGLang builds their layer.

    What SGLang's classes would compute wrongly of them the plan has refused, and it has made sure
    that all experts are alike.

    Args:
        config: SGLang's, of the source's `quantization_config`.
    Returns:
        SGLang's method, its parameters repaired while they are created.
    Raises:
        LoadError: SGLang would leave the experts unquantized.
    """
    method = _method_of(config, layer, prefix)
    if method is None or isinstance(method, UnquantizedFusedMoEMethod):
        text = f"SGLang ({type(config).__name__}) would leave it unquantized, not as it is stored"
        raise LoadError(Problem(prefix, text, rule="left-unquantized"))
    assert isinstance(method, FusedMoEMethodBase)
    scheme = getattr(layer, "scheme", None)
    if isinstance(scheme, CompressedTensorsWNA16MoE):
        _repair_while_created(method, scheme)
    return method


def _method_of(config: QuantizationConfig, layer: FusedMoE, prefix: str) -> Any:
    """What a config gives, of the repaired config of its kind if there is one.

    auto-round's makes GPTQ's and AWQ's configs as it is asked (auto_round.py:400, 537).
    """
    method = repaired(config, METHODS).get_quant_method(layer, prefix)
    own: Any = getattr(method, "quant_config", None)
    cured: Any = own and repaired(own, METHODS)
    if cured is not own:
        layer.scheme = None
        method = cured.get_quant_method(layer, prefix)
    return method


def _repair_while_created(method: FusedMoEMethodBase, scheme: CompressedTensorsWNA16MoE) -> None:
    """Empty the indices that no checkpoint holds once they are created: they look unfilled.

    Where there is no act order SGLang empties the group's, too, and those that sort them it
    computes (`process_weights_after_loading`, compressed_tensors_wNa16_moe.py:310).
    """
    names = ["w13_g_idx_sort_indices", "w2_g_idx_sort_indices"]
    if scheme.actorder != "group":
        names += ["w13_weight_g_idx", "w2_weight_g_idx"]
    create: Any = method.create_weights

    def create_weights(layer: torch.nn.Module, *args: Any, **keywords: Any) -> None:
        create(layer, *args, **keywords)
        for name in names:
            parameter = getattr(layer, name)
            parameter.data = parameter.data[:, :0].clone()

    setattr(method, create_weights.__name__, create_weights)


def guard(method: QuantizeMethodBase, where: str) -> QuantizeMethodBase:
    """Let a method's refusals while it builds and repacks a layer name the layer and the class.

    Its `apply` is left alone.
    """
    owner = type(getattr(method, "scheme", None) or method).__name__
    for name in _GUARDED:
        setattr(method, name, _guarded(getattr(method, name), where, owner))
    return method


def _guarded(function: Callable[..., Any], where: str, owner: str) -> Callable[..., Any]:
    """The function within `refusals`; as a decorator it leaves a generator that is closed late."""

    def call(*args: Any, **keywords: Any) -> Any:
        with refusals(where, owner):
            return function(*args, **keywords)

    return call


@contextlib.contextmanager
def refusals(where: str, owner: str) -> Iterator[None]:
    """Turn what SGLang raises into an error of ours.

    Args:
        owner: whose code runs: a class of SGLang, for the message.
    Raises:
        LoadError: naming both, with SGLang's own words.
    """
    try:
        yield
    except REFUSALS as error:
        why = f"({owner}: {words_of(error)})"
        what = f"SGLang {sglang_version()} does not read it as it is stored {why}"
        remedy = "name a method for it, or take it from another source"
        raise LoadError(Problem(where, what, remedy, "auto-refused")) from error


def words_of(error: Exception) -> str:
    """What an exception of SGLang's says, in a line; where it says nothing, what raised it."""
    words = str(error).strip()
    if not words:
        words = traceback.extract_tb(error.__traceback__)[-1].line or "no reason given"
    return words.splitlines()[0]
