"""The config whose experts SGLang's Marlin methods compute rightly."""

from __future__ import annotations

from sglang.srt.layers.quantization.awq import AWQMarlinConfig
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.quantization.gptq import GPTQMarlinConfig

from mixedprec_plugin.experts.awq import AWQExpertsConfig
from mixedprec_plugin.experts.gptq import GPTQExpertsConfig


def repaired(config: QuantizationConfig | None) -> QuantizationConfig | None:
    """The config whose experts are repaired; others, ours among them, are returned as they are."""
    if isinstance(config, GPTQMarlinConfig) and type(config) is GPTQMarlinConfig:
        return GPTQExpertsConfig(
            weight_bits=config.weight_bits,
            group_size=config.group_size,
            desc_act=config.desc_act,
            is_sym=config.is_sym,
            lm_head_quantized=config.lm_head_quantized,
            dynamic=config.dynamic,
            full_config=config.full_config,
        )
    if isinstance(config, AWQMarlinConfig) and type(config) is AWQMarlinConfig:
        return AWQExpertsConfig(
            weight_bits=config.weight_bits,
            group_size=config.group_size,
            zero_point=config.zero_point,
            lm_head_quantized=config.lm_head_quantized,
            modules_to_not_convert=config.modules_to_not_convert,
            full_config=config.full_config,
        )
    return config
