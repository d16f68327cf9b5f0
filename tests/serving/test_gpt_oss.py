"""gpt-oss with its experts as they are stored, on the CPU platform, held against transformers'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import write_gpt_oss
from tests.presets import write_preset

pytestmark = pytest.mark.usefixtures("sglang_context")
EXPERTS, NUM_EXPERTS, INNER = "model.layers.1.mlp.experts", 4, 128


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gpt_oss(tmp_path_factory.mktemp("gpt_oss") / "model")


def test_rows_of_gate_lie_above_those_of_up_and_attention_goes_by_its_rules(
    load_model: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    rules = ('match: "*.experts.*", method: mxfp4', 'match: "*.self_attn.*", method: fp8')
    served = load_model(model, write_preset(tmp_path, *rules))
    block = served.model.layers[1]
    assert type(block.self_attn.qkv_proj.quant_method).__name__ == "Fp8LinearMethod"
    assert block.self_attn.o_proj.weight.dtype == torch.float8_e4m3fn
    experts, stored = block.mlp.experts, load_file(model / "model.safetensors")
    assert type(experts.quant_method).__name__ == "Mxfp4MoEMethod"
    assert experts.moe_runner_config.gate_up_interleaved is False
    for suffix, end in (("weight", "blocks"), ("weight_scale", "scales"), ("weight_bias", "bias")):
        w13, w2 = getattr(experts, f"w13_{suffix}"), getattr(experts, f"w2_{suffix}")
        gate_up = stored[f"{EXPERTS}.gate_up_proj_{end}"].view(NUM_EXPERTS, 2 * INNER, -1)
        assert torch.equal(w13[:, :INNER].reshape(NUM_EXPERTS, INNER, -1), gate_up[:, ::2])
        assert torch.equal(w13[:, INNER:].reshape(NUM_EXPERTS, INNER, -1), gate_up[:, 1::2])
        assert torch.equal(w2, stored[f"{EXPERTS}.down_proj_{end}"].view(w2.shape))
    assert torch.equal(block.self_attn.sinks, stored["model.layers.1.self_attn.sinks"])


@pytest.mark.parametrize("rules", ["mxfp4", "bf16", "auto", "mxfp4 and bf16"])
def test_experts_compute_what_transformers_does_of_the_same_blocks(
    load_model: Callable[..., Any], model: Path, tmp_path: Path, rules: str
) -> None:
    methods = rules.split(" and ")
    names = ("*.experts.*", "*.experts.{0,3}.*")
    given = [f'match: "{n}", method: {m}' for n, m in zip(names, methods, strict=False)]
    experts = load_model(model, write_preset(tmp_path, *given)).model.layers[1].mlp.experts
    tokens = torch.randn(48, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    made, choices = run(experts, tokens)
    expected = reference(model)(tokens.float(), *choices)
    distance = (made.float() - expected).norm() / expected.norm()
    # three roundings to bf16 of at most 2^-9 each, and their sum's
    assert distance < 2**-7


def run(experts: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The output of two experts a token, and which they were."""
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(len(tokens), NUM_EXPERTS, generator=generator)
    weights, ids = logits.softmax(-1).topk(2)
    out = experts.forward(tokens.clone(), StandardTopKOutput(weights, ids.int(), logits))
    return out, (ids, weights)


def reference(model: Path) -> Any:
    """The experts of transformers' layer, with the weights that it makes of the blocks."""
    from transformers import GptOssConfig
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(hidden_size=128, intermediate_size=INNER, num_local_experts=NUM_EXPERTS)
    config._experts_implementation = "eager"
    made, stored = GptOssExperts(config), load_file(model / "model.safetensors")
    for name in ("gate_up_proj", "down_proj"):
        packed = (stored[f"{EXPERTS}.{name}_{end}"] for end in ("blocks", "scales"))
        getattr(made, name).data = convert_moe_packed_tensors(*packed, dtype=torch.float32)
        getattr(made, f"{name}_bias").data = stored[f"{EXPERTS}.{name}_bias"].float()
    return made.requires_grad_(requires_grad=False)


def test_a_bias_of_what_ranks_sum_is_added_on_the_first(
    load_model: Callable[..., Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixedprec_plugin.experts.loading import load_expert_tensor

    preset = write_preset(tmp_path, 'match: "*.experts.*", method: mxfp4')
    experts = load_model(model, preset).model.layers[1].mlp.experts
    bias = torch.full((128,), 2.0).bfloat16()
    for rank, expected in ((0, bias), (1, torch.zeros_like(bias))):
        monkeypatch.setattr(experts, "moe_tp_rank", rank)
        load_expert_tensor(experts, 2, "w2", "bias", bias)
        assert torch.equal(experts.w2_weight_bias[2], expected)
