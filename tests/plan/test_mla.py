"""What latent attention cannot absorb, as SGLang's loader of DeepSeek's weights does it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.methods.stored import TensorSpec
from mixedprec_plugin.plan.family_checks import mla_faults
from tests.checkpoint.peers import quantization_config
from tests.checkpoints import write_checkpoint
from tests.headers import write_headers
from tests.presets import plan, problem_texts
from tests.quantize.peers import LAYERS, torch_layer

KV_B = "model.layers.0.self_attn.kv_b_proj"


@pytest.fixture
def latent(tmp_path: Path) -> Path:
    tensors = {f"{KV_B}.weight": torch.randn(512, 256).bfloat16()}
    return write_checkpoint(
        tmp_path / "model", {"model_type": "deepseek_v3", "torch_dtype": "bfloat16"}, tensors
    )


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        # deepseek_common/utils.py:104; shown in tests/dryrun/test_faults.py
        ("awq", "SGLang imports sglang.kernel_api_logging for it"),
        ("gptq_int4", "SGLang takes its packed weights for AWQ's"),
        ("blockwise_int8", "SGLang looks for its block size in the config of a whole model"),
    ],
)
def test_method_that_sglang_does_not_absorb_is_refused(
    latent: Path, method: str, reason: str
) -> None:
    (text,) = problem_texts(plan(latent, f'match: "*", method: {method}', target=Target("cuda")))
    assert re.search(f"kv_b_proj cannot be absorbed in .*: {re.escape(reason)}", text), text
    assert text.endswith("give kv_b_proj the method bf16, fp8 or fp8_channel")


@pytest.mark.parametrize("method", ["bf16", "fp8", "fp8_block", "fp8_channel"])
def test_method_that_sglang_absorbs_is_planned(latent: Path, method: str) -> None:
    assert not plan(latent, f'match: "*", method: {method}', target=Target("cuda")).problems


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (
            "gptq",
            "q_a_proj and kv_a_proj_with_mqa cannot run in gptq: SGLang looks at the dtype of "
            "their weight, and GPTQ has none (models/deepseek_v2.py, is_packed_weight); use "
            "method: fp8_block or awq",
        ),
        # one scale for each: tests/dryrun/test_models.py, docs/families.md
        ("fp8", ""),
        ("awq", ""),
        ("fp8_block", ""),
        ("blockwise_int8", ""),
    ],
)
def test_projections_of_one_input_need_scales_and_dtypes_that_sglang_reads(
    tmp_path: Path, method: str, text: str
) -> None:
    tensors = {
        f"model.layers.0.self_attn.{name}.weight": ("BF16", (512, 256))
        for name in ("q_a_proj", "kv_a_proj_with_mqa")
    }
    config = {"model_type": "deepseek_v3", "torch_dtype": "bfloat16"}
    made = plan(write_headers(tmp_path / "m", config, tensors), f'match: "*", method: {method}')
    where = "model.layers.0.self_attn.kv_a_proj_with_mqa, model.layers.0.self_attn.q_a_proj"
    assert problem_texts(made) == ([f"error: {where}: {text}"] if text else [])


def test_packing_that_sglang_does_not_know_is_not_absorbed(latent: Path) -> None:
    (layer,) = plan(latent, 'match: "*", method: gptq').layers
    packed = dataclasses.replace(layer, outputs={"codes": TensorSpec("U8", (512, 128))})
    (fault,) = mla_faults(packed, (packed,), "cuda", {})
    assert fault.text.endswith("SGLang absorbs floats and FP8, and it is codes")


@pytest.mark.parametrize(
    ("peer", "is_absorbed"),
    [
        ("llmcompressor-fp8-block", True),
        ("llmcompressor-fp8-dynamic", True),
        ("llmcompressor-w4a16-g64", False),
        ("gptqmodel-gptq-g64", False),
        ("autoawq-g64", False),
    ],
)
def test_what_is_stored_decides_under_auto(tmp_path: Path, peer: str, is_absorbed: bool) -> None:
    """No `weight` in floats or FP8: `post_load_weights` fails, or takes GPTQ for AWQ."""
    tensors = {f"{KV_B}.{name}": tensor for name, tensor in torch_layer(peer, LAYERS[0]).items()}
    config = {
        "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
        "quantization_config": quantization_config(peer),
    }  # fmt: skip
    model = write_checkpoint(tmp_path / "model", config, tensors)
    made = plan(model, 'match: "*", method: auto', target=Target("cuda"))
    found = [text for text in problem_texts(made) if "cannot be absorbed" in text]
    assert bool(found) != is_absorbed, problem_texts(made)
