"""Names of real models' layers, from their checkpoints' indexes."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from mixedprec_plugin.families.names import Kind, layer_kind
from mixedprec_plugin.families.table import DECODER, family_of
from mixedprec_plugin.families.wiring import Unit, coupled_units, producers

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DENSE = tuple(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj"))


def kinds(names: Iterable[str]) -> dict[str, Kind]:
    """Layers of the given names, matrices all but the norms."""
    return {
        name: layer_kind(name, "norm" not in name and not name.endswith("sinks"), DECODER)
        for name in names
    }


def block(*names: str, index: int = 3) -> list[str]:
    return [f"model.layers.{index}.{name}" for name in names]


def units(model_type: str, names: Iterable[str], **tied: str) -> dict[str, Unit]:
    found = coupled_units(kinds(names), tied, {"model_type": model_type})
    return {unit.norm.removeprefix("model.layers.3."): unit for unit in found}


def ends(names: Iterable[str]) -> list[str]:
    return [name.removeprefix("model.layers.3.") for name in names]


def attention(*names: str) -> list[str]:
    return [f"self_attn.{name}" for name in names]


def test_llamas_norms_feed_attention_and_mlp() -> None:
    names = block("input_layernorm", *attention(*ATTENTION), "post_attention_layernorm", *DENSE)
    found = units("llama", names)
    assert ends(found["input_layernorm"].consumers) == attention("q_proj", "k_proj", "v_proj")
    assert ends(found["post_attention_layernorm"].consumers) == ["mlp.gate_proj", "mlp.up_proj"]
    assert not any(unit.fixed for unit in found.values())


def test_every_expert_and_the_router_read_the_second_norm() -> None:
    mixtral = [f"block_sparse_moe.experts.{i}.{w}" for i in range(2) for w in ("w1", "w2", "w3")]
    names = block("input_layernorm", *attention(*ATTENTION), "post_attention_layernorm",
                  "block_sparse_moe.gate", *mixtral)  # fmt: skip
    assert ends(units("mixtral", names)["post_attention_layernorm"].consumers) == [
        "block_sparse_moe.gate",
        "block_sparse_moe.experts.0.w1", "block_sparse_moe.experts.0.w3",
        "block_sparse_moe.experts.1.w1", "block_sparse_moe.experts.1.w3",
    ]  # fmt: skip
    qwen = [
        "mlp.gate", "mlp.shared_expert_gate", "mlp.shared_expert.gate_proj",
        "mlp.shared_expert.down_proj", "mlp.experts.7.up_proj", "mlp.experts.7.down_proj",
    ]  # fmt: skip
    names = block("input_layernorm", *attention(*ATTENTION), "post_attention_layernorm", *qwen)
    unit = units("qwen2_moe", names)["post_attention_layernorm"]
    assert ends(unit.consumers) == [n for n in qwen if "down" not in n]


def test_deepseeks_latent_norms_feed_the_b_projections() -> None:
    names = block(
        "input_layernorm", "post_attention_layernorm", *DENSE,
        *attention("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa",
                   "kv_a_layernorm", "kv_b_proj", "o_proj", "indexer.wk"),
    )  # fmt: skip
    found = units("deepseek_v32", names)
    assert ends(found["input_layernorm"].consumers) == attention("q_a_proj", "kv_a_proj_with_mqa")
    assert ends(found["input_layernorm"].fixed) == ["self_attn.indexer.wk"]
    assert ends(found["self_attn.q_a_layernorm"].consumers) == ["self_attn.q_b_proj"]
    assert ends(found["self_attn.kv_a_layernorm"].consumers) == ["self_attn.kv_b_proj"]


def test_gemmas_mlp_reads_the_norm_before_it() -> None:
    names = block("input_layernorm", *attention(*ATTENTION), "post_attention_layernorm",
                  "pre_feedforward_layernorm", *DENSE, "post_feedforward_layernorm")  # fmt: skip
    found = units("gemma2", names)
    assert ends(found["pre_feedforward_layernorm"].consumers) == ["mlp.gate_proj", "mlp.up_proj"]
    assert found["post_attention_layernorm"].consumers == ()
    assert found["post_feedforward_layernorm"].consumers == ()


def test_olmo2_has_no_norm_before_a_layer() -> None:
    names = block(*attention(*ATTENTION), "post_attention_layernorm", *DENSE,
                  "post_feedforward_layernorm")  # fmt: skip
    found = units("olmo2", names)
    assert not any(unit.consumers for unit in found.values())
    assert len(found["post_attention_layernorm"].fixed) == 7


def test_parallel_blocks_mlp_reads_the_only_norm() -> None:
    found = units("cohere", block("input_layernorm", *attention(*ATTENTION), *DENSE))
    assert ends(found["input_layernorm"].consumers) == [
        *attention("q_proj", "k_proj", "v_proj"), "mlp.gate_proj", "mlp.up_proj",
    ]  # fmt: skip


def test_unknown_family_is_not_guessed_at() -> None:
    names = block("input_layernorm", *attention(*ATTENTION), "post_attention_layernorm", *DENSE)
    for unit in units("brand_new", names).values():
        assert unit.consumers == ()
        assert len(unit.fixed) == 7
    assert family_of({"model_type": "brand_new"}).norm_offset is None


def test_head_norms_and_sinks_come_with_their_attention() -> None:
    names = block("input_layernorm", *attention(*ATTENTION, "q_norm"), "post_attention_layernorm")
    assert ends(units("qwen3", names)["self_attn.q_norm"].fixed) == attention(*ATTENTION)


def test_last_norm_feeds_lm_head_or_the_embedding_that_it_is_tied_to() -> None:
    names = ["model.embed_tokens", "model.norm"]
    assert units("llama", [*names, "lm_head"])["model.norm"] == Unit("model.norm", ("lm_head",))
    tied = units("llama", names, lm_head="model.embed_tokens")["model.norm"]
    assert tied == Unit("model.norm", (), ("model.embed_tokens",))


@pytest.mark.parametrize(
    ("config", "offset"),
    [
        ({"model_type": "llama"}, 0.0),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, 1.0),
        ({"model_type": "qwen3_next"}, 1.0),
        ({"model_type": "gemma3n"}, None),
        ({}, None),
    ],
)
def test_norm_offset_is_the_familys(config: dict[str, object], offset: float | None) -> None:
    assert family_of(config).norm_offset == offset


def test_producers_are_found_for_each_expert() -> None:
    names = block(
        *attention("v_proj", "o_proj"), "mlp.up_proj", "mlp.down_proj",
        "mlp.experts.4.up_proj", "mlp.experts.4.down_proj", "block_sparse_moe.experts.1.w3",
        "block_sparse_moe.experts.1.w2", "mlp.experts.5.down_proj",
    )  # fmt: skip
    found = producers(names, {})
    assert [tuple(ends(pair)) for pair in found] == [
        ("self_attn.v_proj", "self_attn.o_proj"),
        ("mlp.up_proj", "mlp.down_proj"),
        ("mlp.experts.4.up_proj", "mlp.experts.4.down_proj"),
        ("block_sparse_moe.experts.1.w3", "block_sparse_moe.experts.1.w2"),
    ]
