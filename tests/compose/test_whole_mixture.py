"""A real model composed of itself and of a copy with folded scales: the same log-probabilities.

Scales are powers of two, so that folding and unfolding are exact, and the composed model has to
agree with the original to the last bits of float32 matrix products.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.plan.model import Plan
from tests.checkpoints import write_checkpoint
from tests.plan.mixtures import mixed_plan
from tests.presets import problem_texts

NUM_TOKENS = 96
Computes = Callable[[dict[str, torch.Tensor]], torch.Tensor]


@pytest.fixture(scope="module")
def base(original_model: Path) -> dict[str, torch.Tensor]:
    return load_file(original_model / "model.safetensors")


@pytest.fixture(scope="module")
def folded(
    tmp_path_factory: pytest.TempPathFactory, original_model: Path, base: dict[str, torch.Tensor]
) -> Path:
    """The model with norms divided, and rows of up_proj, by powers of two; consumers multiplied."""
    generator = torch.Generator().manual_seed(0)
    tensors = dict(base)

    def scale(name: str) -> torch.Tensor:
        size = base[f"{name}.weight"].shape[0]
        return 2.0 ** torch.randint(-2, 3, (size,), generator=generator).bfloat16()

    def multiply(name: str, factor: torch.Tensor) -> None:
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"] * factor

    for layer in range(30):
        prefix = f"model.layers.{layer}."
        for norm, consumers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            factor = scale(prefix + norm)
            multiply(prefix + norm, 1 / factor)
            for consumer in consumers:
                multiply(prefix + consumer, factor)
        factor = scale(f"{prefix}mlp.up_proj")
        multiply(f"{prefix}mlp.up_proj", 1 / factor[:, None])
        multiply(f"{prefix}mlp.down_proj", factor)
    config = json.loads((original_model / "config.json").read_text())
    return write_checkpoint(tmp_path_factory.mktemp("folded") / "model", config, tensors)


@pytest.fixture(scope="module")
def log_probabilities(original_model: Path, prose: str) -> Computes:
    """What transformers computes in float32 with the given weights, [tokens, vocabulary]."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM(AutoConfig.from_pretrained(original_model)).float().eval()
    tokens = AutoTokenizer.from_pretrained(original_model)(prose[:2000], return_tensors="pt")

    def compute(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        weights = {name: tensor.float() for name, tensor in tensors.items()}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert set(missing) <= {"lm_head.weight"}
        assert not unexpected
        with torch.inference_mode():
            logits: torch.Tensor = model(tokens.input_ids[:, :NUM_TOKENS]).logits[0]
            return logits.log_softmax(-1)

    return compute


def planned(model: Path, folded: Path) -> Plan:
    """Every way of mixing: rescaled to the model's norms, to the copy's, and whole units."""
    return mixed_plan(
        model,
        'match: "*.layers.{0..7}.self_attn.q_proj", method: bf16, source: folded',
        'match: "*.layers.{8..15}.self_attn.{q,k,v}_proj", method: bf16, source: folded',
        'match: "*.layers.{16..23}.mlp.{up,down}_proj", method: bf16, source: folded',
        'match: "*.layers.{24..29}.mlp.gate_proj", method: bf16, source: folded',
        'match: "*.layers.{24..29}.post_attention_layernorm", method: bf16, source: folded',
        folded=folded,
    )


def test_composed_model_is_the_original(
    original_model: Path,
    base: dict[str, torch.Tensor],
    folded: Path,
    log_probabilities: Computes,
    tmp_path: Path,
) -> None:
    (tmp_path / "model").symlink_to(original_model)
    plan = planned(tmp_path / "model", folded)
    assert problem_texts(plan) == []
    sources = [plan.by_name[f"model.layers.{i}.input_layernorm"].source for i in (0, 8, 16)]
    assert sources == ["model", "folded", "model"]
    tensors = dict(iter(VirtualCheckpoint(plan)))
    expected = log_probabilities(base)
    assert float((log_probabilities(tensors) - expected).abs().max()) < 1e-4
    for layer in (0, 7):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        assert torch.equal(tensors[name], base[name])

    # what a loader that does not look at norms would serve
    layers = [dataclasses.replace(layer, rescale=None) for layer in plan.layers]
    careless = dict(iter(VirtualCheckpoint(dataclasses.replace(plan, layers=tuple(layers)))))
    wrong = log_probabilities(careless)
    assert float((expected.exp() * (expected - wrong)).sum(-1).mean()) > 1.0


def test_folded_down_proj_alone_is_an_error_for_all_layers(
    original_model: Path, folded: Path, tmp_path: Path
) -> None:
    (tmp_path / "model").symlink_to(original_model)
    rule = 'match: "*.down_proj", method: bf16, source: folded'
    (problem,) = mixed_plan(tmp_path / "model", rule, folded=folded).errors
    assert str(problem) == (
        "model.layers.0-29.mlp.down_proj: comes from 'folded' and is right only behind its own "
        "up_proj, which comes from 'model': the rows of the two are scaled differently; take "
        "up_proj and down_proj from one source"
    )
