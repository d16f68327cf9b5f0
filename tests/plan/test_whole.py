"""Models that are not whole, as a plan tells it; tests/families/test_whole.py has every family."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixedprec_plugin.cli.main import main
from tests import published
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint, write_llama
from tests.headers import Header, write_headers
from tests.plan.mixtures import mixed_plan
from tests.presets import plan, write_preset

RULE = 'match: "*", method: bf16'
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def llama(**changes: Any) -> tuple[dict[str, Any], Tensors]:
    config = llama_config(**changes)
    tensors = {n: ("BF16", tuple(t.shape)) for n, t in llama_tensors(config).items()}
    return config, tensors


def missing(folder: Path, config: dict[str, Any], tensors: Header) -> list[str]:
    """What a plan of all layers in bf16 says of a checkpoint."""
    made = plan(write_headers(folder / "model", config, tensors), RULE)
    return [str(problem) for problem in made.errors]


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("change", [lambda _: "", lambda name: name.replace("_proj.", "_prok.")])
def test_convert_refuses_a_projection_that_is_not_there(
    tmp_path: Path, num_layers: int, change: Callable[[str], str]
) -> None:
    config = llama_config(num_hidden_layers=num_layers)
    tensors = llama_tensors(config)
    name = "model.layers.0.self_attn.o_proj.weight"
    weight = tensors.pop(name)
    if changed := change(name):
        tensors[changed] = weight
    model = write_checkpoint(tmp_path / "model", config, tensors)
    preset = write_preset(tmp_path / "presets", 'match: "*.mlp.*", method: fp8')
    flags = ["--model", str(model), "--preset", str(preset), "--device", "cpu"]
    err = io.StringIO()
    assert main(["convert", *flags, "--out", str(tmp_path / "out")], out=io.StringIO(), err=err)
    assert "model.layers.0.self_attn.o_proj: the checkpoint lacks it" in err.getvalue()
    assert ("it holds o_prok" in err.getvalue()) == bool(changed)
    assert not (tmp_path / "out").exists()


def test_whole_blocks_are_counted(tmp_path: Path) -> None:
    config, tensors = llama(num_hidden_layers=3)
    assert missing(tmp_path, {**config, "num_hidden_layers": 65536}, tensors) == [
        "model.layers.3-65535: the checkpoint lacks it: num_hidden_layers is 65536 "
        "in config.json; download the checkpoint again, or take one that is whole"
    ]
    inner = {n: t for n, t in tensors.items() if ".layers.1." not in n}
    (text,) = missing(tmp_path / "inner", config, inner)
    assert text.startswith("model.layers.1: the checkpoint lacks it: num_hidden_layers is 3 ")


def test_head_is_needed_unless_it_is_tied(tmp_path: Path) -> None:
    config, tensors = llama()
    assert missing(tmp_path, config, tensors) == []
    (text,) = missing(tmp_path / "untied", {**config, "tie_word_embeddings": False}, tensors)
    assert text.startswith("lm_head: the checkpoint lacks it: tie_word_embeddings is not true")
    # Llama's class has a head of its own by itself, Gemma's has not
    del config["tie_word_embeddings"]
    assert missing(tmp_path / "unsaid", config, tensors) == [text]
    config |= {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}
    assert missing(tmp_path / "gemma", config, tensors) == []


def test_embedding_of_positions_is_no_head(tmp_path: Path) -> None:
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 96}
    tensors = {"wpe.weight": ("BF16", (64, 128)), "wte.weight": ("BF16", (96, 128))}
    made = plan(write_headers(tmp_path, config, tensors), RULE, head="untie_lm_head: true\n")
    assert made.by_name["lm_head"].outputs["weight"].shape == (96, 128)


def test_biases_are_those_of_config_json(tmp_path: Path) -> None:
    config, tensors = llama(attention_bias=True, num_hidden_layers=1)
    (text,) = missing(tmp_path, config, tensors)
    assert text.startswith(
        "model.layers.0.self_attn.q_proj.bias, model.layers.0.self_attn.k_proj.bias, "
        "model.layers.0.self_attn.v_proj.bias: the checkpoint lacks it: attention_bias is true"
    )
    one = {**tensors, "model.layers.0.self_attn.q_proj.bias": ("BF16", (256,))}
    assert len(missing(tmp_path / "one", {**config, "attention_bias": False}, one)) == 1


def test_experts_are_counted_and_alike(tmp_path: Path) -> None:
    model = published.qwen3_30b_a3b(num_layers=1)
    config, tensors = dict(model.config), dict(model.tensors)
    expert = "model.layers.0.mlp.experts.127"
    cut = {n: t for n, t in tensors.items() if not n.startswith(expert)}
    (text,) = missing(tmp_path / "last", config, cut)
    assert text.startswith(f"{expert}: the checkpoint lacks it: the number of experts is 128")
    del tensors["model.layers.0.mlp.experts.5.up_proj.weight"]
    (text,) = missing(tmp_path / "one", config, tensors)
    assert text.startswith("model.layers.0.mlp.experts.5.up_proj: the checkpoint lacks it")


@pytest.mark.parametrize(
    "tensor",
    [
        "layers.3.eh_proj.weight", "layers.3.self_attn.o_proj.weight", "layers.3.mlp.gate.weight",
        "layers.1.mlp.gate.e_score_correction_bias", "layers.0.mlp.up_proj.weight",
        "layers.2.self_attn.kv_a_layernorm.weight", "layers.2.mlp.experts.7.down_proj.weight",
        "layers.2.mlp.shared_experts.up_proj.weight",
    ],
)  # fmt: skip
def test_blocks_that_differ_by_right_are_told_from_damaged_ones(
    tmp_path: Path, tensor: str
) -> None:
    """One dense block, experts behind it, and a layer that predicts further tokens."""
    whole = published.deepseek_v3(num_layers=4)
    config = {**whole.config, "first_k_dense_replace": 1, "num_hidden_layers": 3}
    held = (".0.mlp.", ".1.mlp.", ".2.mlp.")
    tensors = {n: t for n, t in whole.tensors.items() if not any(x in n for x in held)}
    for number, copied in ((0, 0), (1, 3), (2, 3)):
        tensors |= {
            n.replace(f"layers.{copied}.mlp", f"layers.{number}.mlp"): t
            for n, t in whole.tensors.items()
            if f"layers.{copied}.mlp" in n
        }
    draft = {
        n.replace("layers.4.", "layers.3."): t for n, t in whole.tensors.items() if "layers.4." in n
    }
    tensors = {n: t for n, t in tensors.items() if "layers.3." not in n and "layers.4." not in n}
    tensors |= draft
    assert missing(tmp_path / "whole", config, tensors) == []
    del tensors[f"model.{tensor}"]
    texts = missing(tmp_path / "cut", config, tensors)
    assert any(f"model.{tensor.removesuffix('.weight')}" in text for text in texts), texts


def test_draft_layers_may_be_left_out(tmp_path: Path) -> None:
    model = published.glm_4_5_air(num_layers=2)
    tensors = {n: t for n, t in model.tensors.items() if "layers.2." not in n}
    assert missing(tmp_path, dict(model.config), tensors) == []


def test_tensors_that_models_compute_themselves_do_no_harm(tmp_path: Path) -> None:
    config, tensors = llama()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = ("F32", (32,))
    tensors["model.layers.1.self_attn.masked_bias"] = ("F32", (1,))
    assert missing(tmp_path, config, tensors) == []


def test_other_sources_need_not_be_whole(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    config = llama_config()
    part = {n: t for n, t in llama_tensors(config).items() if ".layers.0." in n or "embed" in n}
    other = write_checkpoint(tmp_path / "other", config, part)
    line = 'match: "model.layers.0.mlp.*", method: bf16, source: other'
    assert not mixed_plan(model, line, other=other).errors


@pytest.mark.parametrize("method", ["awq, group_size: 64", "fp8_channel"])
def test_blocks_with_biases_may_be_of_a_folder_that_is_quantized(
    tmp_path: Path, method: str
) -> None:
    config = llama_config(architectures=["Qwen2ForCausalLM"], model_type="qwen2")
    tensors = llama_tensors(config)
    biases = [f"model.layers.{n}.self_attn.{x}_proj.bias" for n in range(3) for x in "qkv"]
    for bias in biases:
        tensors[bias] = torch.ones(len(tensors[bias.replace(".bias", ".weight")])).bfloat16()
    model = write_checkpoint(tmp_path / "model", config, tensors)
    preset = write_preset(tmp_path / "presets", f'match: "*_proj", method: {method}')
    other, flags = tmp_path / "other", ["--device", "cpu", "--preset", str(preset)]
    assert not main(["convert", "--model", str(model), *flags, "--out", str(other)])
    line = 'match: "model.layers.0.*", method: auto, source: other'
    assert not mixed_plan(model, line, other=other).errors
    # in codes or not, where the model has a bias its block has one
    (other / "mixedprec_provenance.json").unlink()
    changed = load_file(other / "model.safetensors")
    save_file({n: t for n, t in changed.items() if n != biases[0]}, other / "model.safetensors")
    first, *_ = mixed_plan(model, line, other=other).errors
    assert first.where == "model.layers.0.self_attn.q_proj"
    assert "has a bias in 'model' that is not zero, and none in 'other'" in first.what


def test_what_the_model_lacks_is_not_made_up_for_by_another_source(tmp_path: Path) -> None:
    config, tensors = llama_config(), llama_tensors(llama_config())
    other = write_checkpoint(tmp_path / "other", config, tensors)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    model = write_checkpoint(tmp_path / "model", config, tensors)
    line = 'match: "*.mlp.*", method: bf16, source: other'
    (problem,) = mixed_plan(model, line, other=other).errors
    assert problem.where == "model.layers.2.mlp.up_proj"


def test_drafts_and_parts_of_models_are_left_alone(tmp_path: Path) -> None:
    config, tensors = llama(architectures=["LlamaForCausalLMEagle3"])
    part = {n: t for n, t in tensors.items() if "norm" not in n}
    assert missing(tmp_path, config, part) == []
