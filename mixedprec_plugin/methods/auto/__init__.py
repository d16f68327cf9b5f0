"""Method `auto`: the layer runs as its source stores it, whatever that is.

On CUDA by SGLang's own class for the source's `quantization_config`, which takes every tensor as it
is stored: whatever SGLang reads can be mixed in. It has no arguments: the source decides. What a
layer becomes is in `plan.auto`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixedprec_plugin.methods.interface import Method, Rounding

# quant_method -> what SGLang 0.5.23's class for it on CUDA asks config.json for
# (layers/quantization/__init__.py:63). Of what is registered there bitsandbytes and GGUF need
# loaders of their own, and the rest stores nothing or is for other devices.
CLASSES: Mapping[str, tuple[str, ...]] = {
    "auto-round": ("bits", "group_size", "sym"),
    "auto-round-int8": (),
    "awq": ("bits", "group_size", "zero_point"),
    "awq_marlin": ("bits", "group_size", "zero_point"),
    "blockwise_int8": ("activation_scheme",),
    "compressed-tensors": (),
    "fp8": ("activation_scheme",),
    # Marlin's (gptq/gptq.py:459); plain GPTQ has no class on CUDA
    "gptq": ("bits", "group_size", "sym", "desc_act"),
    "gptq_marlin": ("bits", "group_size", "sym", "desc_act"),
    "humming": (),
    "minimax_m3_nvfp4": (),
    "modelopt": (),
    "modelopt_fp4": (),
    "modelopt_fp8": (),
    "modelopt_mixed": (),
    "mxfp4": (),
    "mxfp8": ("activation_scheme",),
    "quark": ("export",),
    "w4afp8": (),
    "w8a8_fp8": (),
    "w8a8_int8": (),
}
# AWQ's own name of a key (awq/awq.py:128)
_OTHER_NAMES = {"bits": "w_bit", "group_size": "q_group_size"}
# the group sizes of Marlin's kernels (marlin_utils.py:44)
_GROUP_SIZES = (-1, 32, 64, 128)
# ModelOpt's algorithms, spelled so (modelopt_quant.py:510, 885, 1673; modelopt_utils.py:23)
_FP4 = ("NVFP4", "NVFP4_AWQ", "W4A16_NVFP4")
_MODELOPT: Mapping[str, tuple[str, ...]] = {
    "modelopt": ("FP8", *_FP4),
    "modelopt_fp4": _FP4,
    "modelopt_fp8": ("FP8",),
    "modelopt_mixed": ("MIXED_PRECISION",),
}
# quark/quark.py:799, 830
_QUARK = ("fp8_e4m3", "fp4")


def why_no_class(config: Mapping[str, Any]) -> str:
    """Return why no class of SGLang reads what a `quantization_config` says; empty if one does.

    Source: `get_quantization_config`, and `override_quantization_method` and `from_config` of its
    classes.
    """
    name = str(config.get("quant_method") or "").lower()
    if not name:
        return "config.json names no quant_method that could read it"
    if name not in CLASSES:
        return f"SGLang has no class for quant_method {name!r}"
    is_awq = name == "awq"
    missing = [
        key
        for key in CLASSES[name]
        if config.get(key) is None and not (is_awq and _OTHER_NAMES.get(key) in config)
    ]
    if missing:
        return f"SGLang's class for {name!r} needs {' and '.join(missing)} in quantization_config"
    if name in _MODELOPT and (algorithm := _modelopt_algorithm(config)) not in _MODELOPT[name]:
        known = ", ".join(_MODELOPT[name])
        return f"SGLang's class for {name!r} reads only ModelOpt's {known}, not {algorithm}"
    bits = config.get("w_bit", config.get("bits"))
    if is_awq and bits != 4:
        return f"SGLang reads only 4-bit AWQ, not {bits}-bit"
    if name == "quark" and (dtype := _quark_dtype(config)) not in _QUARK:
        return f"SGLang reads only {' and '.join(_QUARK)} of Quark's types, not {dtype}"
    return _why_not_marlin(config) if name == "gptq" else ""


def _modelopt_algorithm(config: Mapping[str, Any]) -> Any:
    """As config.json says it, or within what once was hf_quant_config.json."""
    whole = config.get("quantization")
    inner = whole if isinstance(whole, Mapping) and config.get("quant_algo") is None else config
    return inner.get("quant_algo")


def _quark_dtype(config: Mapping[str, Any]) -> Any:
    whole = config.get("global_quant_config")
    weight = whole.get("weight") if isinstance(whole, Mapping) else None
    # others are of single layers
    return weight.get("dtype") if isinstance(weight, Mapping) else _QUARK[0]


def _why_not_marlin(config: Mapping[str, Any]) -> str:
    runs = "SGLang runs GPTQ only in Marlin's kernels"
    if config.get("checkpoint_format") == "marlin" or config.get("is_marlin_format"):
        return f"{runs}, and does not read weights that are packed for them already"
    if config["bits"] in (4, 8) and config["sym"] and config["group_size"] in _GROUP_SIZES:
        return ""
    said = ", ".join(f"{key} {config[key]}" for key in ("bits", "group_size", "sym"))
    takes = "4 or 8 bits, symmetric, group_size 32, 64, 128 or -1"
    return f"{runs}, which take {takes}; config.json says {said}"


METHOD = Method(
    name="auto",
    title="as the source stores it, by SGLang's own class for its quantization_config",
    description="The layer runs as its source stores it, by the source's own quantization_config; "
    "the source decides everything, so there are no arguments.",
    aliases={},
    schema={},
    stored=lambda _arguments, _N, _K, _dtype: {},
    declare=lambda _arguments: {},
    # SGLang's class says what it refuses when it builds the layer
    faults=lambda _arguments, _shape, _target: [],
    # never compared: shards under `auto` are of one format, or an error
    rounding=lambda _arguments: Rounding(rank=0.0, limit=0.05),
    searched=(),
)
