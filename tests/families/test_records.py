"""A row for each record of the table: a published model's layers, and what SGLang makes of them.

Layers are called as in the checkpoints' indexes, modules as in SGLang's models.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mixedprec_plugin.families.names import (
    Kind,
    draft_layers,
    fused_module,
    layer_kind,
    parallel_kind,
    sglang_name,
)
from mixedprec_plugin.families.table import DECODER, FAMILIES, family_of
from mixedprec_plugin.families.wiring import coupled_units


class Row(NamedTuple):
    """What a record says of one model; layers, modules and norms are named below a block.

    Attributes:
        config: what its config.json says of the family.
        modules: layer -> the module that runs it.
        readers: norm -> the layers that read it.
        block: what the checkpoint calls a block.
        sglang: what SGLang does.
    """

    config: Mapping[str, Any]
    modules: Mapping[str, str]
    readers: Mapping[str, Sequence[str]]
    block: str = "model.layers.3."
    sglang: str = "model.layers.3."


def _names(architecture: str, model_type: str, **more: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": model_type, **more}


def _mlp(parent: str) -> dict[str, str]:
    inputs = {f"{parent}.{name}": f"{parent}.gate_up_proj" for name in ("gate_proj", "up_proj")}
    return inputs | {f"{parent}.down_proj": f"{parent}.down_proj"}


def _experts(parent: str, *projections: str) -> dict[str, str]:
    return {f"{parent}.{expert}.{name}": parent for expert in (0, 7) for name in projections}


_QKV = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
_ATTENTION = {**dict.fromkeys(_QKV, "self_attn.qkv_proj"), "self_attn.o_proj": "self_attn.o_proj"}
_DENSE = _ATTENTION | _mlp("mlp")
_SWIGLU = _experts("mlp.experts", "gate_proj", "up_proj", "down_proj")
_LLAMA = {
    "input_layernorm": _QKV, "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
}  # fmt: skip
_GEMMA = {
    "input_layernorm": _QKV, "post_attention_layernorm": [],
    "pre_feedforward_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
    "post_feedforward_layernorm": [],
}  # fmt: skip
_LATENT = {
    "self_attn.q_a_proj": "self_attn.fused_qkv_a_proj_with_mqa",
    "self_attn.kv_a_proj_with_mqa": "self_attn.fused_qkv_a_proj_with_mqa",
    "self_attn.q_b_proj": "self_attn.q_b_proj", "self_attn.kv_b_proj": "self_attn.kv_b_proj",
    "self_attn.o_proj": "self_attn.o_proj",
}  # fmt: skip


def _inputs(modules: Mapping[str, str]) -> list[str]:
    """The layers of MLPs that read the block's hidden state."""
    ends = ("gate_proj", "up_proj", "w1", "w3", ".gate")
    return [name for name in modules if name.endswith(ends)]


_MIXTRAL = {
    "block_sparse_moe.gate": "block_sparse_moe.gate",
    **_experts("block_sparse_moe.experts", "w1", "w2", "w3"),
}
_SHARED = {"mlp.gate": "mlp.gate", **_mlp("mlp.shared_experts"), **_SWIGLU}
_ROUTED = {"mlp.gate": "mlp.gate", **_SWIGLU}
ROWS: Mapping[str, Row] = {
    "meta-llama/Llama-3.1-8B": Row(_names("LlamaForCausalLM", "llama"), _DENSE, _LLAMA),
    "google/gemma-2-9b": Row(_names("Gemma2ForCausalLM", "gemma2"), _DENSE, _GEMMA),
    "Qwen/Qwen3-30B-A3B": Row(
        _names("Qwen3MoeForCausalLM", "qwen3_moe"),
        _ATTENTION | _ROUTED,
        {"input_layernorm": _QKV, "post_attention_layernorm": _inputs(_ROUTED)},
    ),
    "mistralai/Mixtral-8x7B-v0.1": Row(
        _names("MixtralForCausalLM", "mixtral"),
        _ATTENTION | _MIXTRAL,
        {"input_layernorm": _QKV, "post_attention_layernorm": _inputs(_MIXTRAL)},
        sglang="layers.3.",
    ),
    "allenai/OLMoE-1B-7B-0924": Row(
        _names("OlmoeForCausalLM", "olmoe"),
        _ATTENTION | _ROUTED,
        {"input_layernorm": _QKV, "post_attention_layernorm": _inputs(_ROUTED)},
    ),
    "openai/gpt-oss-20b": Row(
        _names("GptOssForCausalLM", "gpt_oss"),
        _ATTENTION | _SWIGLU,
        {"input_layernorm": _QKV, "post_attention_layernorm": _inputs(_SWIGLU)},
    ),
    "moonshotai/Kimi-K2-Instruct": Row(
        _names("DeepseekV3ForCausalLM", "kimi_k2"),
        _LATENT | _SHARED,
        {
            "input_layernorm": ["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"],
            "self_attn.q_a_layernorm": ["self_attn.q_b_proj"],
            "self_attn.kv_a_layernorm": ["self_attn.kv_b_proj"],
            "post_attention_layernorm": _inputs(_SHARED),
        },
    ),
    "zai-org/GLM-4.5-Air": Row(
        _names("Glm4MoeForCausalLM", "glm4_moe"),
        _ATTENTION | _SHARED,
        {"input_layernorm": _QKV, "post_attention_layernorm": _inputs(_SHARED)},
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": Row(
        _names("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl"),
        _DENSE,
        _LLAMA,
        block="model.language_model.layers.3.",
    ),
    "google/gemma-3-4b-it": Row(
        _names(
            "Gemma3ForConditionalGeneration", "gemma3", text_config={"model_type": "gemma3_text"}
        ),
        _DENSE,
        _GEMMA,
        block="model.language_model.layers.3.",
        sglang="language_model.model.layers.3.",
    ),
}
# blocks of other parts, by config.json's model_type alone
_PARALLEL = {"input_layernorm": [*_QKV, "mlp.gate_proj", "mlp.up_proj"]}
_MODELS_OF_OTHER_PARTS = {
    "CohereForAI/c4ai-command-r-v01": Row({"model_type": "cohere"}, _DENSE, _PARALLEL),
    "arcee-ai/AFM-4.5B": Row(
        {"model_type": "arcee"},
        {**_ATTENTION, "mlp.up_proj": "mlp.up_proj", "mlp.down_proj": "mlp.down_proj"},
        {"input_layernorm": _QKV, "post_attention_layernorm": ["mlp.up_proj"]},
    ),
    "allenai/OLMo-2-1124-7B": Row(
        {"model_type": "olmo2"},
        _DENSE,
        {"post_attention_layernorm": [], "post_feedforward_layernorm": []},
    ),
    "nvidia/Minitron-8B-Base": Row(
        {"model_type": "nemotron"},
        {**_ATTENTION, "mlp.up_proj": "mlp.up_proj", "mlp.down_proj": "mlp.down_proj"},
        {"input_layernorm": _QKV, "post_attention_layernorm": ["mlp.up_proj"]},
    ),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": Row(
        _names("Qwen3NextForCausalLM", "qwen3_next"),
        {
            "linear_attn.in_proj_qkvz": "linear_attn.in_proj_qkvz",
            "linear_attn.in_proj_ba": "linear_attn.in_proj_ba",
            "linear_attn.out_proj": "linear_attn.out_proj",
            **_ROUTED,
        },
        {
            "input_layernorm": ["linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"],
            "post_attention_layernorm": _inputs(_ROUTED),
        },
    ),
    "Qwen/Qwen2-VL-7B-Instruct": Row(
        _names("Qwen2VLForConditionalGeneration", "qwen2_vl"),
        _DENSE,
        _LLAMA,
        block="model.language_model.layers.3.",
    ),
}
# layers of multi-token prediction, as the draft model that SGLang makes of them
_DRAFTS = {
    "deepseek-ai/DeepSeek-V3": Row(
        _names("DeepseekV3ForCausalLMNextN", "deepseek_v3"),
        _LATENT | _SHARED,
        ROWS["moonshotai/Kimi-K2-Instruct"].readers,
        block="model.layers.61.",
        sglang="model.decoder.",
    ),
    "zai-org/GLM-4.5": Row(
        _names("Glm4MoeForCausalLMNextN", "glm4_moe"),
        _ATTENTION | _SHARED,
        {"input_layernorm": _QKV, "post_attention_layernorm": _inputs(_SHARED)},
        block="model.layers.92.",
        sglang="model.decoder.",
    ),
    "Qwen/Qwen3-Next-80B-A3B-Thinking": Row(
        _names("Qwen3NextForCausalLMMTP", "qwen3_next"),
        _ATTENTION | _ROUTED,
        {"input_layernorm": _QKV, "post_attention_layernorm": _inputs(_ROUTED)},
        block="mtp.layers.0.",
        sglang="model.layers.0.",
    ),
}
ROWS = {**ROWS, **_MODELS_OF_OTHER_PARTS, **_DRAFTS}
rows = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def _kind(layer: str) -> Kind:
    if layer.endswith(".gate"):
        return "router"
    return "expert" if ".experts." in layer else "linear"


def test_every_record_has_a_row() -> None:
    told = {name for row in ROWS.values() for name in row.config.get("architectures", ())}
    told |= {row.config["model_type"] for row in ROWS.values()}
    for family in FAMILIES:
        names = {*family.architectures, *family.model_types}
        assert names & told, f"no row for {', '.join(sorted(names))}"


def test_nothing_else_in_the_package_names_an_architecture() -> None:
    package = _source("mixedprec_plugin", "")
    named = [
        path
        for path in package.rglob("*.py")
        if re.search(
            r"\b(?!AutoModel)\w+For(?:CausalLM|ConditionalGeneration)\b|\bmodel_type\b",
            path.read_text("utf-8"),
        )
    ]
    assert {path.parent.name for path in named} == {"families"}


def test_no_name_is_in_two_records() -> None:
    names = [name for family in FAMILIES for name in (*family.architectures, *family.model_types)]
    assert sorted(names) == sorted(set(names))


@rows
def test_layers_are_of_their_kind(row: Row) -> None:
    family = family_of(row.config)
    for layer in row.modules:
        assert layer_kind(row.block + layer, True, family) == _kind(layer), layer
    assert {layer_kind(row.block + norm, False, family) for norm in row.readers} == {"norm"}
    assert layer_kind("model.embed_tokens", True, family) == "embedding"
    assert layer_kind("lm_head", True, family) == "lm_head"


@rows
def test_layers_run_in_sglangs_modules(row: Row) -> None:
    family = family_of(row.config)
    names = {row.block + layer for layer in row.modules}
    for layer, module in row.modules.items():
        found, _ = fused_module(row.block + layer, names, family)
        assert found == row.block + module, layer
        assert sglang_name(found, family) == row.sglang + module, layer


@rows
def test_norms_are_read_by_their_consumers(row: Row) -> None:
    kinds: dict[str, Kind] = {row.block + norm: "norm" for norm in row.readers}
    kinds |= {row.block + layer: _kind(layer) for layer in row.modules}
    found = {
        unit.norm.removeprefix(row.block): [name.removeprefix(row.block) for name in unit.consumers]
        for unit in coupled_units(kinds, {}, row.config)
    }
    assert found == row.readers


def _source(package: str, folder: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / folder


# their code comes with the checkpoints
_NOT_IN_TRANSFORMERS = {"baichuan", "kimi_k2", "minicpm"}


@pytest.mark.parametrize(
    "model_type",
    sorted({x for family in FAMILIES for x in family.model_types} - _NOT_IN_TRANSFORMERS),
)
def test_norms_scale_as_in_transformers(model_type: str) -> None:
    module = model_type.removesuffix("_text")
    path = _source("transformers", f"models/{module}/modeling_{module}.py")
    is_offset = re.search(r"1\.0 \+ self\.weight|self\.weight \+ 1\.0", path.read_text("utf-8"))
    assert family_of({"model_type": model_type}).norm_offset == (1.0 if is_offset else 0.0)


@pytest.mark.parametrize("name", [name for family in FAMILIES for name in family.architectures])
def test_sglang_has_a_class_of_the_name(name: str) -> None:
    models = _source("sglang", "srt/models").glob("*.py")
    assert any(re.search(rf"^class {name}\b", path.read_text("utf-8"), re.M) for path in models)


def test_larger_model_around_a_known_one_has_its_norms_and_nothing_else() -> None:
    config = _names("LlavaForConditionalGeneration", "llava", text_config={"model_type": "llama"})
    family = family_of(config)
    assert (family.norm_offset, family.shapes) == (0.0, {})
    assert family_of({**config, "text_config": {"model_type": "brand_new"}}) is DECODER


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        ("self_attn.o_proj", "row"), ("mlp.down_proj", "row"), ("mlp.experts.3.w2", "row"),
        ("self_attn.q_a_proj", "replicated"), ("self_attn.kv_a_proj_with_mqa", "replicated"),
        ("self_attn.q_b_proj", "column"), ("mlp.up_proj", "column"),
    ],
)  # fmt: skip
def test_ranks_split_outputs_inputs_or_nothing(layer: str, kind: str) -> None:
    assert parallel_kind(f"model.layers.0.{layer}", DECODER) == kind


@pytest.mark.parametrize(("num_draft", "drafts"), [(1, {"model.layers.2.q_proj"}), (0, set())])
def test_layers_behind_the_last_are_a_draft_models(num_draft: int, drafts: set[str]) -> None:
    config = {"num_hidden_layers": 2, "num_nextn_predict_layers": num_draft}
    names = ["model.layers.1.q_proj", "model.layers.2.q_proj", "mtp.fc", "visual.layers.9.q_proj"]
    assert draft_layers(config, names, DECODER) == {"mtp.fc", *drafts}


@pytest.mark.parametrize(
    ("architecture", "layer", "kind", "module"),
    [
        ("DeepseekV3ForCausalLMNextN", "model.layers.61.eh_proj", "other", "model.eh_proj"),
        ("Glm4MoeForCausalLMNextN", "model.layers.92.eh_proj", "other", "model.eh_proj"),
        ("Qwen3NextForCausalLMMTP", "mtp.fc", "other", "fc"),
    ],
)
def test_what_a_draft_model_joins_is_torchs_own(
    architecture: str, layer: str, kind: str, module: str
) -> None:
    family = family_of({"architectures": [architecture]})
    assert layer_kind(layer, True, family) == kind
    assert sglang_name(layer, family) == module
