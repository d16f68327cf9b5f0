"""SGLang's model of a checkpoint, built: with its methods, or without weights."""

from __future__ import annotations

import contextlib
import functools
import pkgutil
from collections.abc import Iterator

import torch
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.model_loader.loader import _initialize_model
from sglang.srt.model_loader.utils import get_model_architecture, set_default_torch_dtype
from sglang.srt.runtime_context import get_exec, get_parallel

from mixedprec_plugin.families.table import family_of
from mixedprec_plugin.serving.config import MixedPrecisionConfig
from mixedprec_plugin.serving.kv_scales import add_kv_scales
from mixedprec_plugin.serving.stages import Stage


def build_model(
    model_config: ModelConfig,
    load_config: LoadConfig,
    config: MixedPrecisionConfig,
    device: torch.device,
) -> tuple[torch.nn.Module, Stage]:
    """Build the model of this rank; return it with the pipeline stage that it is.

    Raises:
        LoadError: `config` has none for a layer, or the stages do not go with the model.
    """
    _apply_name_mapper(config, model_config)
    if config.plan.source.config.get("tie_word_embeddings") is False:
        # a preset may untie what config.json ties
        for said in (model_config.hf_config, model_config.hf_text_config):
            said.tie_word_embeddings = False
    # can_fuse_shared_expert() of the config is not what every model asks (glm4_moe.py:1012)
    unfused = get_exec().moe.override(disable_shared_experts_fusion=True)
    asked = _asked_too(family_of(config.plan.source.config).unasked, config)
    with set_default_torch_dtype(model_config.dtype), device, unfused, asked:
        model: torch.nn.Module = _initialize_model(model_config, load_config, config)
        add_kv_scales(model, config)
    stages = get_parallel().pp_group
    return model, Stage(
        model, config.plan.tied, num_stages=stages.world_size, is_last=stages.is_last_rank
    )


@contextlib.contextmanager
def _asked_too(lazy: str, config: MixedPrecisionConfig) -> Iterator[None]:
    """Give a class of SGLang's (`Family.unasked`) the config that its model keeps from it."""
    if not lazy:
        yield
        return
    owner = pkgutil.resolve_name(lazy)
    original = owner.__init__
    owner.__init__ = functools.partialmethod(original, quant_config=config)
    try:
        yield
    finally:
        owner.__init__ = original


def _apply_name_mapper(config: MixedPrecisionConfig, model_config: ModelConfig) -> None:
    """As SGLang does for the config of a whole model (model_loader/loader.py:273)."""
    model_class, _ = get_model_architecture(model_config)
    get_mapper = getattr(model_class, "get_hf_to_sglang_mapper", None)
    mapper = (
        get_mapper(model_config.hf_config)
        if get_mapper is not None
        else getattr(model_class, "hf_to_sglang_mapper", None)
    )
    if mapper is not None:
        config.apply_weight_name_mapper(mapper)
