"""SGLang's own things, for tests of what they do."""

from __future__ import annotations

import ast
import contextlib
import inspect
import textwrap
from pathlib import Path
from typing import Any


def gptq_marlin(desc_act: bool = False) -> Any:
    """GPTQ for Marlin: 4 bits, groups of 128."""
    from sglang.srt.layers.quantization.gptq.gptq import GPTQMarlinConfig

    return GPTQMarlinConfig(4, 128, desc_act, True, False, {}, {})


def loader_of(
    path: Path, dtype: str = "bfloat16", *, is_draft: bool = False, **load_config: Any
) -> tuple[Any, Any]:
    """The loader that SGLang takes for a load config, and the model's own config."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader.loader import get_model_loader

    from mixedprec_plugin.serving.hooks import asked_for

    # as `ModelConfig.from_server_args` is hooked
    is_ours = load_config.get("load_format") == "mixedprec"
    with asked_for() if is_ours else contextlib.nullcontext():
        model_config = ModelConfig(str(path), dtype=dtype, is_draft_model=is_draft)
    return get_model_loader(LoadConfig(**load_config), model_config), model_config


def load(path: Path, dtype: str = "bfloat16", **how: Any) -> Any:
    """A model on the CPU, as SGLang loads it; `how` as for `loader_of`."""
    from sglang.srt.configs.device_config import DeviceConfig

    loader, model_config = loader_of(path, dtype, **how)
    return loader.load_model(model_config=model_config, device_config=DeviceConfig("cpu"))


def load_again(loader: Any, model_config: Any, model: Any) -> None:
    """New weights for a loaded model: what weight_updater.py of SGLang 0.5.21 and 0.5.22 does."""
    import torch
    from sglang.srt.model_loader.loader import DefaultModelLoader

    source = DefaultModelLoader.Source.init_new(model_config, model)
    weights = loader._get_weights_iterator(source)
    loader.load_weights_and_postprocess(model, weights, torch.device("cpu"))


def parsed(function: Any) -> ast.AST:
    """The syntax tree of a function or a method."""
    return ast.parse(textwrap.dedent(inspect.getsource(function)))
