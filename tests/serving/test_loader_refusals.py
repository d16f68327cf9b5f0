"""What the loader refuses: tensors that do not fit the model, or that are not numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixedprec_plugin.errors import CheckpointError, LoadError, PlanError
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint, write_llama
from tests.presets import write_preset

LoadModel = Callable[..., Any]
LoadTensors = Callable[..., Any]
FP8, GPTQ = (f'match: "*.mlp.*", method: {method}' for method in ("fp8", "gptq"))


@pytest.fixture
def load_tensors(load_model: LoadModel, tmp_path: Path) -> LoadTensors:
    """Load a Llama of such tensors, its MLPs in FP8 if nothing else is said."""

    def load(tensors: dict[str, Any], config: Any = None, rule: str = FP8, **more: Any) -> Any:
        model = write_checkpoint(tmp_path / "model", config or llama_config(), tensors)
        return load_model(model, write_preset(tmp_path, rule), **more)

    return load


def test_tensor_that_the_model_has_no_parameter_for_is_an_error(load_tensors: LoadTensors) -> None:
    tensors = llama_tensors(llama_config())
    tensors["model.layers.0.self_attn.sinks"] = torch.ones(4, dtype=torch.bfloat16)
    message = r"0\.self_attn\.sinks: is in the checkpoint, but LlamaForCausalLM has no parameter"
    with pytest.raises(PlanError, match=message):
        load_tensors(tensors)


def test_bias_that_the_model_does_not_have_is_an_error(load_tensors: LoadTensors) -> None:
    tensors = llama_tensors(llama_config())
    tensors["model.layers.0.self_attn.o_proj.bias"] = torch.ones(256, dtype=torch.bfloat16)
    with pytest.raises(PlanError, match="has no parameter 'bias'"):
        load_tensors(tensors)


def test_norm_that_the_checkpoint_lacks_is_an_error(load_tensors: LoadTensors) -> None:
    tensors = llama_tensors(llama_config())
    del tensors["model.layers.1.input_layernorm.weight"]
    with pytest.raises(PlanError, match=r"1\.input_layernorm: the checkpoint lacks it"):
        load_tensors(tensors)


def test_shard_that_the_checkpoint_lacks_is_an_error(load_tensors: LoadTensors) -> None:
    tensors = llama_tensors(llama_config())
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(PlanError, match=r"1\.self_attn\.k_proj: the checkpoint lacks it"):
        load_tensors(tensors)


def test_untied_head_that_the_checkpoint_lacks_is_an_error(load_tensors: LoadTensors) -> None:
    tensors = llama_tensors(llama_config())
    with pytest.raises(PlanError, match="lm_head: the checkpoint lacks it: tie_word_embeddings is"):
        load_tensors(tensors, llama_config(tie_word_embeddings=False))


def test_shape_that_the_model_denies_is_an_error_before_a_weight_is_read(
    load_tensors: LoadTensors,
) -> None:
    tensors = llama_tensors(llama_config())
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = torch.full((256, 640), torch.nan, dtype=torch.bfloat16)
    config = llama_config(architectures=["MistralForCausalLM"])
    rule = 'match: "*.self_attn.*", method: fp8'
    with pytest.raises(PlanError, match=r"its weight is \[256, 640\] .expected \[256, 512\]"):
        load_tensors(tensors, config, rule=rule)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("layer", ["mlp.up_proj", "self_attn.q_proj", "input_layernorm"])
def test_weight_that_is_not_finite_is_an_error(
    load_tensors: LoadTensors, layer: str, value: float
) -> None:
    tensors = llama_tensors(llama_config())
    name = f"model.layers.2.{layer}.weight"
    tensors[name].view(-1)[7] = value
    message = rf"model\.layers\.2\.{layer}\.weight: 1 of .* weights in model\.safetensors are NaN"
    with pytest.raises(CheckpointError, match=message):
        load_tensors(tensors, rule=GPTQ)


def test_bf16_weight_that_fp16_cannot_hold_is_an_error(load_tensors: LoadTensors) -> None:
    tensors = llama_tensors(llama_config())
    tensors["model.layers.0.self_attn.o_proj.weight"][0, 0] = 1e5
    with pytest.raises(CheckpointError, match="has values over 65504, which float16 cannot hold"):
        load_tensors(tensors, rule=GPTQ, dtype="float16")


def test_shards_with_act_orders_of_their_own_are_refused(
    load_model: LoadModel, tmp_path: Path
) -> None:
    # SGLang takes no GPTQ model for a base on a CPU, so that the layers are another source's
    base = write_llama(tmp_path / "base", num_hidden_layers=1)
    config = llama_config(
        num_hidden_layers=1,
        quantization_config={
            "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": True,
            "checkpoint_format": "gptq",
        },
    )  # fmt: skip
    tensors = llama_tensors(config)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors.pop(name)
        tensors |= act_ordered(name.removesuffix(".weight"), *weight.shape)
    name = "model.layers.0.self_attn.v_proj"
    ordered = write_checkpoint(tmp_path / "ordered", config, tensors)
    rule = 'match: "*_proj", method: gptq, desc_act: true, source: ordered'
    head = f"sources:\n  ordered: {{path: {ordered}}}\ntrust_sources: true\n"
    preset = write_preset(tmp_path, rule, head=head)
    load_model(base, preset)
    tensors[f"{name}.g_idx"] = tensors[f"{name}.g_idx"].flip(0).contiguous()
    write_checkpoint(ordered, config, tensors)
    message = (
        r"v_proj\.g_idx: has another order than model\.layers\.0\.self_attn\..*, and "
        r"model\.layers\.0\.self_attn\.qkv_proj has one for all its shards; write method: bf16"
    )
    with pytest.raises(LoadError, match=message):
        load_model(base, preset)


def act_ordered(name: str, N: int, K: int) -> dict[str, torch.Tensor]:
    """A GPTQ layer of zeros, in groups of 128 in an order that depends on K alone."""
    order = torch.randperm(K, generator=torch.Generator().manual_seed(K))
    return {
        f"{name}.qweight": torch.zeros(K // 8, N, dtype=torch.int32),
        f"{name}.qzeros": torch.full((K // 128, N // 8), 0x77777777, dtype=torch.int32),
        f"{name}.scales": torch.ones(K // 128, N, dtype=torch.float16),
        f"{name}.g_idx": (order // 128).to(torch.int32),
    }


def test_nan_among_fp8_codes_is_an_error(load_tensors: LoadTensors) -> None:
    tensors = llama_tensors(llama_config())
    name = "model.layers.0.self_attn.o_proj"
    codes = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
    codes.view(torch.uint8)[3, 4] = 0xFF
    tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": torch.tensor(1.0)}
    with pytest.raises(CheckpointError, match=r"o_proj\.weight: 1 of 65,536 weights .* are NaN"):
        load_tensors(tensors, rule=GPTQ)
