from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixedprec_plugin.methods.blockwise_int8 import codec as blockwise_int8
from mixedprec_plugin.methods.gptq import codec as gptq
from mixedprec_plugin.methods.interface import Target
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint, write_llama
from tests.commands import run_without_torch
from tests.plan.mixtures import mixed_plan
from tests.presets import plan, problem_texts, write_preset

ATTENTION = '"model.layers.*.self_attn.*_proj"'


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model")


def test_last_matching_rule_wins(model: Path) -> None:
    made = plan(
        model,
        'match: "*", method: gptq',
        f"match: {ATTENTION}, method: fp8",
        'match: "model.layers.1.*", method: bf16',
    )
    methods = {name: layer.method for name, layer in made.by_name.items()}
    assert methods["model.layers.0.self_attn.q_proj"] == "fp8"
    assert methods["model.layers.0.mlp.up_proj"] == "gptq"
    assert methods["model.layers.1.self_attn.q_proj"] == "bf16"
    assert methods["model.layers.1.mlp.up_proj"] == "bf16"
    assert not made.problems


def test_shards_go_to_their_fused_module(model: Path) -> None:
    made = plan(model, 'match: "*", method: fp8')
    qkv = made.modules["model.layers.2.self_attn.qkv_proj"]
    assert [(layer.name[-6:], layer.shard) for layer in qkv] == [
        ("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v")
    ]  # fmt: skip
    gate_up = made.modules["model.layers.2.mlp.gate_up_proj"]
    assert [layer.shard for layer in gate_up] == [0, 1]
    assert made.modules["model.layers.2.self_attn.o_proj"][0].shard is None


def test_star_leaves_norms_embeddings_and_tied_head_as_stored(model: Path) -> None:
    made = plan(model, 'match: "*", method: awq')
    untouched = [layer.name for layer in made.layers if layer.scheme is None]
    assert "model.embed_tokens" in untouched
    assert "model.norm" in untouched
    assert dict(made.tied) == {"lm_head": "model.embed_tokens"}
    assert not made.problems


def test_layer_without_a_rule_is_served_as_stored(model: Path) -> None:
    made = plan(model, 'match: "*.mlp.*", method: fp8')
    layer = made.by_name["model.layers.0.self_attn.q_proj"]
    assert (layer.action, layer.method, layer.rule) == ("as stored", "bf16", None)


def test_bytes_count_scales_and_zero_points(model: Path) -> None:
    made = plan(model, 'match: "*", method: gptq, group_size: 64')
    up = made.by_name["model.layers.0.mlp.up_proj"]
    N, K, G = 512, 256, 64
    expected = N * K // 2 + (K // G) * N * 2 + (K // G) * N // 2 + K * 4
    assert up.bytes_after == expected
    assert up.bytes_before == 2 * N * K
    assert up.bits_per_weight == pytest.approx(8 * expected / (N * K))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            'match: "model.layers.*.attn.*", method: fp8',
            r"preset\.yaml:3: rules\[0\].*: 'model\.layers\.\*\.attn\.\*' matches no layer of the "
            r"model; did you mean 'model\.layers\.\*\.self_attn\.\*'[?] add optional: true",
        ),
        ('match: "lm_head", method: awq', r"in awq: it shares the weight of .*untie_lm_head: true"),
        ('match: "*.embed_tokens", method: fp8', r"model\.embed_tokens cannot run in fp8: SGLang"),
        (
            'match: "*norm*", method: int8',
            r"input_layernorm.* cannot run in int8: it has no weight",
        ),
    ],
)
def test_rule_that_asks_the_impossible_is_an_error(model: Path, rule: str, message: str) -> None:
    made = plan(model, rule)
    assert len(made.errors) == 1
    import re

    assert re.search(message, str(made.errors[0])), str(made.errors[0])


def test_optional_rule_may_match_nothing(model: Path) -> None:
    assert not plan(model, 'match: "nothing", method: fp8, optional: true').problems


def test_shadowed_rule_is_a_warning(model: Path) -> None:
    made = plan(model, 'match: "*.up_proj", method: fp8', 'match: "*.mlp.*", method: gptq')
    assert not made.errors
    assert "rules[0]: decides no layer: rules 1 match all of its layers after it" in str(
        made.problems[0]
    )


@pytest.mark.parametrize(("more", "severity"), [("", "error"), (", optional: true", "warning")])
def test_rule_that_matches_a_head_and_does_not_spell_it_is_told_to(
    model: Path, more: str, severity: str
) -> None:
    (problem,) = plan(model, f'match: "lm_*", method: awq, group_size: 64{more}').problems
    assert problem.severity == severity
    text = "rules[0]: decides no layer: a rule that quantizes lm_head spells its name; write match"
    assert text in str(problem)
    # which is asked then: this model ties its head
    (problem,) = plan(model, f'match: "lm_head", method: awq, group_size: 64{more}').problems
    assert "untie_lm_head: true" in str(problem)


def test_head_is_tied_where_the_models_class_ties_it(tmp_path: Path) -> None:
    config = llama_config(architectures=["GemmaForCausalLM"], model_type="gemma")
    tensors = llama_tensors(config)
    del config["tie_word_embeddings"]
    gemma = write_checkpoint(tmp_path / "gemma", config, tensors)
    rule = 'match: "lm_head", method: awq, group_size: 64'
    (problem,) = plan(gemma, rule).errors
    assert "it shares the weight of model.embed_tokens" in str(problem)
    made = plan(gemma, rule, head="untie_lm_head: true\n")
    assert (made.errors, made.by_name["lm_head"].action) == ((), "quantize")


@pytest.mark.parametrize("method", ["bf16", "auto"])
def test_a_tied_head_does_not_come_from_elsewhere_alone(
    model: Path, tmp_path: Path, method: str
) -> None:
    other = write_llama(tmp_path / "other", tie_word_embeddings=False)
    rule = f'match: "lm_head", method: {method}, source: other'
    (problem,) = mixed_plan(model, rule, other=other).errors
    assert problem.what == (
        "lm_head cannot come from source 'other': it shares the weight of model.embed_tokens"
    )
    untied = mixed_plan(model, rule, head="untie_lm_head: true\n", other=other)
    assert (untied.errors, untied.by_name["lm_head"].source) == ((), "other")


def test_head_that_is_tied_is_so_where_a_copy_is_stored_too(tmp_path: Path) -> None:
    config = llama_config()
    tensors = llama_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    model = write_checkpoint(tmp_path / "model", config, tensors)
    rule = 'match: "lm_head", method: awq, group_size: 64'
    (problem,) = plan(model, rule).errors
    assert "untie_lm_head: true" in str(problem)
    made = plan(model, rule, head="untie_lm_head: true\n")
    assert not made.errors
    assert made.by_name["lm_head"].action == "quantize"
    assert made.source.config["tie_word_embeddings"] is False


def test_head_that_a_source_does_not_have_is_an_error(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", tie_word_embeddings=False)
    other = write_llama(tmp_path / "other")
    rule = 'match: "lm_head", method: unquantized, source: other'
    (problem,) = mixed_plan(model, rule, other=other).errors
    assert "holds no lm_head" in str(problem)


def test_fused_conflict_names_both_rules_and_the_remedy(model: Path) -> None:
    made = plan(model, 'match: "*", method: gptq', 'match: "*.q_proj", method: fp8')
    (problem,) = made.errors
    assert str(problem) == (
        "model.layers.0-2.self_attn.qkv_proj: its shards need one scheme, got fp8 for q_proj "
        "(rule 1, '*.q_proj'), gptq for k_proj (rule 0, '*'), gptq for v_proj (rule 0, '*'); match "
        "all of them with one rule, such as '*.{q_proj,k_proj,v_proj}', or set on_fused_conflict: "
        "highest"
    )


def test_fused_conflict_highest_takes_the_most_precise(model: Path) -> None:
    made = plan(
        model,
        'match: "*", method: gptq',
        'match: "*.q_proj", method: fp8',
        head="on_fused_conflict: highest\n",
    )
    assert not made.errors
    qkv = made.modules["model.layers.1.self_attn.qkv_proj"]
    assert {layer.method for layer in qkv} == {"fp8"}
    assert (
        "warning: model.layers.0-2.self_attn.qkv_proj: takes fp8 for all shards"
        in (problem_texts(made)[0])
    )


def test_group_that_does_not_divide_is_an_error(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", hidden_size=192, head_dim=48)
    made = plan(model, 'match: "*.o_proj", method: gptq')
    assert any("group_size 128 does not divide K = 192" in str(p) for p in made.errors)


def test_ragged_fused_block_is_an_error_and_a_ragged_lone_layer_is_not(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", num_key_value_heads=1)
    made = plan(model, 'match: "*", method: fp8_block')
    assert any("k_proj" in p.where and "N = 64" in p.what for p in made.errors)
    ragged = write_llama(tmp_path / "ragged", hidden_size=192, num_attention_heads=4)
    assert not plan(ragged, 'match: "*.o_proj", method: fp8_block').errors


def test_cuda_limits_are_warnings_on_the_cpu(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", hidden_size=192)
    rule = 'match: "*.gate_proj", method: gptq, group_size: 64'
    other = 'match: "*.up_proj", method: gptq, group_size: 64'
    assert plan(model, rule, other).errors
    made = plan(model, rule, other, target=Target(device="cpu"))
    assert not made.errors
    assert any("does not run on CUDA: K = 192" in str(p) for p in made.problems)


def test_tensor_parallel_size_that_does_not_divide_is_an_error(model: Path) -> None:
    assert not plan(model, 'match: "*", method: gptq', target=Target(tp_size=2)).errors
    assert plan(model, 'match: "*", method: gptq', target=Target(tp_size=3)).errors


def test_dtype_other_than_the_models_is_an_error(model: Path) -> None:
    made = plan(model, 'match: "*", method: fp16')
    (problem,) = made.errors
    assert "the model runs in bfloat16, not in fp16; start with --dtype float16" in str(problem)


def test_shape_that_config_json_denies_is_an_error(tmp_path: Path) -> None:
    config = llama_config()
    tensors = llama_tensors(config)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(512, 255, dtype=torch.bfloat16)
    model = write_checkpoint(tmp_path / "model", config, tensors)
    made = plan(model, 'match: "*.self_attn.*", method: fp8')
    (problem,) = made.errors
    assert str(problem).startswith(
        "model.layers.1.mlp.up_proj: its weight is [512, 255] (expected [512, 256] by config.json)"
    )


class TestStoredFormats:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        config = llama_config()
        tensors = llama_tensors(config)
        for name in [n for n in tensors if ".mlp." in n]:
            arguments = {"bits": 4, "group_size": 64, "sym": True, "desc_act": False,
                         "rounding": "nearest"}  # fmt: skip
            weight = tensors.pop(name)
            for suffix, tensor in gptq.quantize(weight, arguments, torch.float16).items():
                tensors[name.removesuffix("weight") + suffix] = tensor
        for name in [n for n in tensors if ".o_proj." in n]:
            weight = tensors.pop(name)
            made = blockwise_int8.quantize(
                weight, {"weight_block_size": [128, 128]}, torch.bfloat16
            )
            for suffix, tensor in made.items():
                tensors[name.removesuffix("weight") + suffix] = tensor
        return write_checkpoint(tmp_path / "model", config, tensors)

    def test_layers_without_rules_keep_their_formats(self, model: Path) -> None:
        made = plan(model, 'match: "*.q_proj", method: bf16')
        assert not made.errors
        up, o = (made.by_name[f"model.layers.0.{n}"] for n in ("mlp.up_proj", "self_attn.o_proj"))
        assert (up.method, up.action) == ("gptq", "as stored")
        assert up.scheme is not None
        assert up.scheme.arguments["group_size"] == 64
        assert (o.method, o.action) == ("blockwise_int8", "as stored")

    def test_bf16_over_a_quantized_layer_dequantizes(self, model: Path) -> None:
        made = plan(model, 'match: "*", method: bf16')
        assert made.by_name["model.layers.0.mlp.up_proj"].action == "dequantize"
        assert not made.errors

    def test_rule_of_another_method_says_what_is_stored(self, model: Path) -> None:
        made = plan(model, 'match: "*.mlp.*", method: awq')
        text = "is stored as gptq 4-bit group 64, not as awq asks (awq): it has groups of 64; write"
        assert any(text in str(p) for p in made.errors)

    def test_rule_with_another_group_says_what_is_stored(self, model: Path) -> None:
        made = plan(model, 'match: "*.mlp.*", method: gptq')
        assert any(
            "is stored as gptq 4-bit group 64, not with group_size: 128; write group_size: 64"
            in str(p)
            for p in made.errors
        )


def test_stored_tensor_of_the_wrong_shape_or_missing_is_an_error(tmp_path: Path) -> None:
    config = llama_config()
    tensors = llama_tensors(config)
    weight = tensors.pop("model.layers.0.self_attn.o_proj.weight")
    tensors["model.layers.0.self_attn.o_proj.weight"] = weight.to(torch.float8_e4m3fn)
    tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"] = torch.ones(2, 1)
    model = write_checkpoint(tmp_path / "model", config, tensors)
    made = plan(model, 'match: "*.o_proj", method: fp8, weight_block_size: [128, 128]')
    text = "\n".join(map(str, made.errors))
    assert "model.layers.0.self_attn.o_proj" in text


def test_plan_needs_neither_torch_nor_sglang(model: Path) -> None:
    preset = write_preset(model.parent / "other", 'match: "*", method: fp8_block')
    run_without_torch("plan", "--model", model, "--preset", preset)


def test_more_ranks_than_key_value_heads_repeat_them(tmp_path: Path) -> None:
    model = write_llama(
        tmp_path / "model", hidden_size=512, num_attention_heads=8, num_key_value_heads=2
    )
    assert not plan(model, 'match: "*.self_attn.*", method: gptq', target=Target(tp_size=4)).errors
    made = plan(model, 'match: "*.self_attn.*", method: gptq', target=Target(tp_size=3))
    assert made.errors
