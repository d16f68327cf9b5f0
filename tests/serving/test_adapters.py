"""LoRA adapters beside a model of this load format."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints import write_llama
from tests.presets import write_preset

NAME = "base_model.model.model.layers.0.self_attn.o_proj.lora_{}.weight"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["o_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(said), encoding="utf-8")
    tensors = {NAME.format("A"): torch.ones(4, 8), NAME.format("B"): torch.ones(8, 4)}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def test_adapter_is_read_as_without_a_preset(
    sglang_context: SimpleNamespace, adapter: Path, tmp_path: Path
) -> None:
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_config import LoRAConfig

    model = write_llama(tmp_path / "model")
    preset = write_preset(tmp_path, 'match: "*", method: fp8')
    extra = {"mixedprec_config": str(preset), "mixedprec_plan": "plan.json"}
    load_config = LoadConfig(load_format="mixedprec", model_loader_extra_config=extra)
    config = ModelConfig(str(model)).hf_config
    made = LoRAAdapter("id", LoRAConfig(str(adapter)), config, load_config, SimpleNamespace())
    made.initialize_weights()
    held = made.layers[0].weights
    assert {name: tuple(tensor.shape) for name, tensor in held.items()} == {
        NAME.format("A"): (4, 8), NAME.format("B"): (8, 4)
    }  # fmt: skip
    # the model's own is for new weights and stays
    assert load_config.model_loader_extra_config == extra
