"""The model without weights: what is wrong with a plan is known before a weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mixedprec_plugin.errors import PlanError, Problem
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.model import Plan
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint, write_mixtral
from tests.presets import plan, write_preset

pytestmark = pytest.mark.usefixtures("sglang_context")

LoadModel = Callable[..., Any]
FP8 = 'match: "*.{layers,h}.*", method: fp8'
_SIZES = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 320,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip


def planned(path: Path, *rules: str) -> Plan:
    return plan(path, *rules, target=Target("cpu", 1, "BF16")).check()


def outline(made: Plan, **options: Any) -> Any:
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig

    from mixedprec_plugin.serving.outline import outline_of

    model_config = ModelConfig(str(made.source.path), dtype="bfloat16")
    return outline_of(made, model_config, LoadConfig(), **options)


def saved(name: str, folder: Path, **settings: Any) -> Path:
    """A tiny model of a family, as transformers writes it."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**_SIZES, **settings})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def test_head_that_the_class_cannot_untie_is_told_of(tmp_path: Path) -> None:
    """models/gemma.py:364 takes the embedding, whatever config.json says."""
    path = saved("Gemma", tmp_path / "model", tie_word_embeddings=True)
    rule = 'match: "lm_head", method: awq, group_size: 64'
    made = plan(path, rule, head="untie_lm_head: true\n", target=Target("cpu", 1, "BF16")).check()
    (problem,) = outline(made).problems
    assert "GemmaForCausalLM has no parameter for it; take untie_lm_head and" in str(problem)
    assert not outline(planned(path, rule.replace("lm_head", "*.mlp.*"))).problems


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SGLang's class builds every layer under the same names (models/hunyuan.py:506)."""
    path = saved("HunYuanDenseV1", tmp_path_factory.mktemp("hunyuan") / "model")
    said = (path / "config.json").read_text().rstrip().removesuffix("}")
    (path / "config.json").write_text(f'{said}, "use_qk_norm": true}}')
    return path


@pytest.fixture(scope="module")
def exaone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SGLang's class joins `c_fc_0` and `c_fc_1` (models/exaone.py), and no record says so."""
    config = llama_config(
        architectures=["ExaoneForCausalLM"], model_type="exaone", num_layers=2,
        num_hidden_layers=2, layer_norm_epsilon=1e-5, activation_function="silu",
        tie_word_embeddings=False, rope_theta=10000.0, pad_token_id=0,
    )  # fmt: skip
    spelled = {
        "model.embed_tokens": "transformer.wte", "model.layers": "transformer.h",
        "model.norm": "transformer.ln_f", "self_attn.o_proj": "attn.attention.out_proj",
        "self_attn": "attn.attention", "mlp.gate_proj": "mlp.c_fc_0", "mlp.up_proj": "mlp.c_fc_1",
        "mlp.down_proj": "mlp.c_proj", "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
    }  # fmt: skip
    tensors = {}
    for name, tensor in llama_tensors(config).items():
        for old, new in spelled.items():
            name = name.replace(old, new)
        tensors[name] = tensor
    return write_checkpoint(tmp_path_factory.mktemp("exaone") / "model", config, tensors)


def classes(model: Any) -> dict[str, str]:
    return {
        name: type(module.quant_method).__name__
        for name, module in model.named_modules()
        if getattr(module, "quant_method", None) is not None
    }


def test_plan_that_fits_has_no_problem_and_needs_no_other_names(llama: Path) -> None:
    found = outline(planned(llama, FP8))
    assert (found.problems, dict(found.others), found.unchecked) == ((), {}, "")


def test_rotary_embeddings_without_memory_are_shared_with_no_other_model(llama: Path) -> None:
    from sglang.srt.layers.rotary_embedding import factory

    factory._ROPE_DICT.clear()
    outline(planned(llama, FP8))
    assert factory._ROPE_DICT == {}


def test_layers_that_sglang_builds_under_one_name_are_told_by_their_places(
    load_model: LoadModel, hunyuan: Path, tmp_path: Path
) -> None:
    model = load_model(hunyuan, write_preset(tmp_path, 'match: "*.1.mlp.*", method: fp8'))
    found = classes(model)
    assert found["model.layers.0.mlp.down_proj"] == "UnquantizedLinearMethod"
    assert found["model.layers.1.mlp.gate_up_proj"] == "Fp8LinearMethod"
    assert found["model.layers.1.mlp.down_proj"] == "Fp8LinearMethod"
    stored = load_file(hunyuan / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(model.get_submodule("model.layers.0.mlp.down_proj").weight, stored)


def test_layers_that_only_sglang_joins_are_refused_and_the_remedy_works(
    load_model: LoadModel, exaone: Path, tmp_path: Path
) -> None:
    what = (
        "SGLang runs it and c_fc_1 as one module that the plan does not know, gate_up_proj "
        "(MergedColumnParallelLinear)"
    )
    where = "transformer.h.0-1.mlp.c_fc_0"
    expected = Problem(where, what, "give them the method bf16", "built-otherwise")
    assert expected in outline(planned(exaone, FP8)).problems
    preset = write_preset(tmp_path, FP8, 'match: "*.{c_fc_?,attn.*}", method: bf16')
    model = load_model(exaone, preset)
    assert classes(model)["transformer.h.0.mlp.c_proj"] == "Fp8LinearMethod"
    stored = load_file(exaone / "model.safetensors")
    parts = [stored[f"transformer.h.0.mlp.c_fc_{n}.weight"] for n in (0, 1)]
    assert torch.equal(model.get_submodule("transformer.h.0.mlp.gate_up_proj").weight,
                       torch.cat(parts))  # fmt: skip


def test_linear_layer_that_sglang_builds_without_asking_is_refused_a_method(
    tmp_path: Path,
) -> None:
    path = saved(
        "FalconH1", tmp_path / "model", mamba_d_ssm=256, mamba_n_heads=4, mamba_d_head=64,
        mamba_n_groups=1, mamba_d_state=64,
    )  # fmt: skip
    problems = {problem.where: problem for problem in outline(planned(path, FP8)).problems}
    found = problems["model.layers.0-1.mamba.out_proj"]
    assert found.what == (
        "SGLang builds it as out_proj (RowParallelLinear), and asks no one what it runs in: "
        "unquantized"
    )
    without = outline(planned(path, FP8, 'match: "*.{mamba,self_attn}.*", method: bf16'))
    assert not any("mamba" in problem.where for problem in without.problems)


def test_stray_tensor_is_named_before_a_weight_is_read(
    load_model: LoadModel, tmp_path: Path
) -> None:
    tensors = llama_tensors(llama_config())
    # which reading would find
    tensors["model.layers.0.mlp.up_proj.weight"][:] = torch.nan
    tensors["model.layers.0.self_attn.sinks"] = torch.ones(4)
    path = write_checkpoint(tmp_path / "model", llama_config(), tensors)
    with pytest.raises(PlanError, match=r"attn\.sinks: is in the checkpoint, but LlamaFor"):
        load_model(path, write_preset(tmp_path, FP8))


def test_name_that_sglangs_class_trips_over_is_an_error_of_ours(tmp_path: Path) -> None:
    path = saved("HunYuanDenseV1", tmp_path / "model")
    (problem,) = outline(planned(path, FP8)).problems
    assert problem.where == "model.layers.0.self_attn.key_layernorm.weight"
    assert "HunYuanDenseV1ForCausalLM does not load it (KeyError: " in problem.what


def test_config_that_sglangs_class_trips_over_is_an_error_of_ours(tmp_path: Path) -> None:
    path = saved("Qwen3Next", tmp_path / "model", layer_types=["full_attention"] * 2)
    (problem,) = outline(planned(path, 'match: "*.self_attn.*", method: fp8')).problems
    assert problem.where == "config.json"
    assert "no attribute 'full_attention_interval'" in problem.what


def test_tensor_that_a_methods_parameter_does_not_take_is_found_without_weights(
    llama: Path,
) -> None:
    made = planned(llama, FP8)

    def wider(layer: Any) -> Any:
        if not layer.name.endswith("1.mlp.down_proj"):
            return layer
        spec = layer.outputs["weight_scale"]._replace(shape=(3,))
        return dataclasses.replace(layer, outputs={**layer.outputs, "weight_scale": spec})

    broken = dataclasses.replace(made, layers=tuple(map(wider, made.layers)))
    (problem,) = outline(broken).problems
    assert problem.where == "model.layers.1.mlp.down_proj.weight_scale"
    # on a machine that does not have the methods, the modules alone are looked at
    assert outline(broken, has_methods=False).problems == ()


def test_experts_are_looked_at_whole(tmp_path: Path) -> None:
    path = write_mixtral(tmp_path / "model")
    made = planned(path, 'match: "*.experts.*", method: fp8_block')
    assert outline(made).problems == ()
    lost = "model.layers.1.block_sparse_moe.experts.3.w2"
    without = dataclasses.replace(made, layers=tuple(x for x in made.layers if x.name != lost))
    (problem,) = outline(without).problems
    assert problem.where == "model.layers.1.block_sparse_moe.experts.w2_weight"
    assert problem.what == "393,216 of 524,288 elements were filled from the checkpoint"


def test_scales_that_experts_do_not_take_are_found_in_any_layer(tmp_path: Path) -> None:
    made = planned(write_mixtral(tmp_path / "model"), 'match: "*.experts.*", method: fp8_block')

    def wider(layer: Any) -> Any:
        if layer.name != "model.layers.2.block_sparse_moe.experts.0.w1":
            return layer
        spec = layer.outputs["weight_scale_inv"]._replace(shape=(3, 5))
        return dataclasses.replace(layer, outputs={**layer.outputs, "weight_scale_inv": spec})

    (problem,) = outline(
        dataclasses.replace(made, layers=tuple(map(wider, made.layers)))
    ).problems  # fmt: skip
    assert problem.where == "model.layers.2.block_sparse_moe.experts.0.w1.weight_scale_inv"
