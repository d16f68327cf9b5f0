"""The dtype that a model runs in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixedprec_plugin.errors import Problem, UsageError

_NAMES = {"bfloat16": "BF16", "bf16": "BF16", "float16": "F16", "half": "F16", "fp16": "F16"}


def model_dtype(config: Mapping[str, Any], dtype: str = "auto") -> str:
    """Tell the dtype that SGLang runs a model in.

    Source: sglang/srt/configs/model_config.py, `_get_and_verify_dtype`.

    Args:
        config: the parsed config.json.
        dtype: SGLang's --dtype; `auto` takes the checkpoint's, and float16 for float32 ones.
    Returns:
        `BF16` or `F16`.
    Raises:
        UsageError: the dtype is none that quantized layers run in.
    """
    if dtype != "auto":
        if dtype not in _NAMES:
            raise UsageError(
                Problem(
                    "--dtype", f"{dtype!r} cannot hold mixed precision (expected bfloat16, float16)"
                )
            )
        return _NAMES[dtype]
    text_config = config.get("text_config") or {}
    declared = next(
        (
            str(value)
            for section in (config, text_config)
            for key in ("dtype", "torch_dtype")
            if (value := section.get(key))
        ),
        "float32",
    )
    if str(config.get("model_type", "")).startswith("gemma"):
        return _NAMES.get(declared.removeprefix("torch."), "BF16")
    return _NAMES.get(declared.removeprefix("torch."), "F16")
