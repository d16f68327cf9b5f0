"""Vision-language models, whose modules SGLang names otherwise than their checkpoints do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixedprec_plugin.errors import PlanError
from mixedprec_plugin.methods.interface import Target
from tests.presets import open_virtual_checkpoint, write_preset
from tests.serving.stock import load

pytestmark = [
    pytest.mark.usefixtures("sglang_context"),
    # what SGLang's own Qwen2.5-VL says to its own VisionAttention
    pytest.mark.filterwarnings("ignore:VisionAttention:DeprecationWarning"),
]

LoadModel = Callable[..., Any]

_TEXT = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 300, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def qwen_vl(folder: Path) -> Path:
    import transformers

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_TEXT, "rope_parameters": rope},
        vision_config={
            "depth": 2, "hidden_size": 256, "intermediate_size": 256, "num_heads": 4,
            "out_hidden_size": 256, "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=False,
    )  # fmt: skip
    return saved(transformers.Qwen2_5_VLForConditionalGeneration(config), folder)


def gemma(folder: Path) -> Path:
    import transformers

    config = transformers.Gemma3Config(
        text_config={**_TEXT, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16},
        vision_config={
            "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 56, "patch_size": 14,
            "vision_use_head": False,
        },
        mm_tokens_per_image=4, image_token_index=299, boi_token_index=298, eoi_token_index=297,
    )  # fmt: skip
    return saved(transformers.Gemma3ForConditionalGeneration(config), folder)


def saved(model: Any, folder: Path) -> Path:
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def respelled(folder: Path, *replacements: tuple[str, str]) -> Path:
    """The checkpoint with other tensor names: pairs of a prefix and what it becomes."""
    tensors = load_file(folder / "model.safetensors")
    for old, new in replacements:
        tensors = {
            new + name.removeprefix(old) if name.startswith(old) else name: tensor
            for name, tensor in tensors.items()
        }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


# the spelling of google/gemma-3-4b-it; transformers 5 leaves vision_model out
PUBLISHED_TOWER = ("vision_tower.", "vision_tower.vision_model.")


@pytest.fixture(scope="module")
def qwen_vl_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_vl(tmp_path_factory.mktemp("qwen") / "model")


@pytest.fixture(scope="module")
def gemma_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return respelled(gemma(tmp_path_factory.mktemp("gemma") / "model"), PUBLISHED_TOWER)


def test_qwen_vl_runs_text_and_vision_as_rules_say(
    load_model: LoadModel, qwen_vl_path: Path, tmp_path: Path
) -> None:
    preset = write_preset(
        tmp_path,
        'match: "model.layers.*", method: int8',
        'match: "visual.blocks.*.attn.*", method: fp8_block',
        'match: "visual.blocks.{0..1}.mlp.*_proj", method: awq',
    )
    methods = quantized(load_model(qwen_vl_path, preset))
    assert methods["model.layers.1.self_attn.qkv_proj"] == "BlockInt8LinearMethod"
    assert methods["visual.blocks.1.attn.qkv_proj"] == "Fp8LinearMethod"
    assert methods["visual.blocks.0.attn.proj"] == "Fp8LinearMethod"
    assert methods["visual.blocks.0.mlp.gate_up_proj"] == "AWQLinearMethod"
    assert methods["visual.merger.mlp.0"] == "UnquantizedLinearMethod"


def test_gemma_runs_text_and_vision_as_rules_say(
    load_model: LoadModel, gemma_path: Path, tmp_path: Path
) -> None:
    preset = write_preset(
        tmp_path,
        'match: "language_model.model.layers.*", method: int8',
        'match: "vision_tower.*.self_attn.*_proj", method: fp8_block',
        'match: "vision_tower.*.layers.1.mlp.fc?", method: gptq',
    )
    model = load_model(gemma_path, preset)
    methods = quantized(model)
    tower = "vision_tower.vision_model.encoder.layers"
    assert methods["language_model.model.layers.0.mlp.down_proj"] == "BlockInt8LinearMethod"
    assert methods[f"{tower}.0.self_attn.qkv_proj"] == "Fp8LinearMethod"
    assert methods[f"{tower}.0.self_attn.proj"] == "Fp8LinearMethod"
    assert methods[f"{tower}.0.mlp.fc1"] == "UnquantizedLinearMethod"
    assert methods[f"{tower}.1.mlp.fc1"] == "GPTQMarlinLinearMethod"
    stream = dict(iter(open_virtual_checkpoint(gemma_path, preset, Target(device="cpu"))))
    held = model.get_submodule(f"{tower}.1.self_attn.proj")
    stored = stream[f"{tower}.1.self_attn.out_proj.weight_scale_inv"]
    assert torch.equal(held.weight_scale_inv.data, stored)


def quantized(model: Any) -> dict[str, str]:
    """Module -> class of its method."""
    return {
        name: type(module.quant_method).__name__
        for name, module in model.named_modules()
        if getattr(module, "quant_method", None) is not None
    }


NEW_QWEN = (("model.", "model.language_model."), ("visual.", "model.visual."))
NEW_GEMMA = (
    ("language_model.model.", "model.language_model."),
    ("vision_tower.", "model.vision_tower.vision_model."),
    ("multi_modal", "model.multi_modal"),
)


@pytest.mark.parametrize(
    ("make", "replacements", "message"),
    [
        (qwen_vl, NEW_QWEN, "rename model.language_model.* to model.* and model.visual.* to vis"),
        (gemma, NEW_GEMMA, "rename model.language_model.* to language_model.model.*, and take mo"),
        (gemma, (), "rename vision_tower.* to vision_tower.vision_model.*"),
    ],
)
def test_names_that_sglang_does_not_load_are_refused(
    load_model: LoadModel,
    tmp_path: Path,
    make: Callable[[Path], Path],
    replacements: tuple[tuple[str, str], ...],
    message: str,
) -> None:
    path = respelled(make(tmp_path / "model"), *replacements)
    preset = write_preset(tmp_path, 'match: "*.layers.*", method: fp8_block')
    with pytest.raises(PlanError) as caught:
        load_model(path, preset)
    assert any(message in str(problem) for problem in caught.value.problems)
    with pytest.raises(KeyError):
        load(path)
