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

from sglang.srt.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.errors import LoadError, Problem
from mixedprec_plugin.methods.construct import sglang_version

# what SGLang raises at configs, shapes and kernels that it does not have
REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
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
        source: the checkpoint, whose config.json has a `quantization_config`.
        layer: a layer's name; of our own checkpoints each has a `quantization_config` of its own.
        packed_modules: last component of a fused module -> those of its shards.
        where: the layers that it is for, for the messages.
    Raises:
        LoadError: there is none, or SGLang has no class that reads it.
    """
    said = copy.deepcopy(dict(source.quantization_config_of(layer)))
    name = str(said.get("quant_method") or "").lower()
    if not name:
        raise LoadError(
            Problem(
                where,
                f"config.json of source {source.name!r} names no quant_method, which method: auto "
                "goes by",
                "name the layers' method",
                "auto-config",
            )
        )
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


def guard(method: QuantizeMethodBase, where: str) -> QuantizeMethodBase:
    """Let a method's refusals while it builds and repacks a layer name the layer and the class.

    Its `apply` is left alone.
    """
    owner = type(getattr(method, "scheme", None) or method).__name__
    for name in _GUARDED:
        setattr(method, name, _guarded(getattr(method, name), where, owner))
    return method


def _guarded(function: Callable[..., Any], where: str, owner: str) -> Callable[..., Any]:
    def call(*args: Any, **keywords: Any) -> Any:
        with refusals(where, owner):
            return function(*args, **keywords)

    return call


@contextlib.contextmanager
def refusals(where: str, owner: str) -> Iterator[None]:
    """Turn what SGLang raises into an error of ours.

    Args:
        where: the layer.
        owner: whose code runs: a class of SGLang, for the message.
    Raises:
        LoadError: naming both, with SGLang's own words.
    """
    try:
        yield
    except REFUSALS as error:
        raise LoadError(
            Problem(
                where,
                f"SGLang {sglang_version()} does not read it as it is stored "
                f"({owner}: {words_of(error)})",
                "name a method for it, or take it from another source",
                "auto-refused",
            )
        ) from error


def words_of(error: Exception) -> str:
    """What an exception of SGLang's says, in a line; where it says nothing, what raised it."""
    words = str(error).strip()
    if not words:
        words = traceback.extract_tb(error.__traceback__)[-1].line or "no reason given"
    return words.splitlines()[0]
