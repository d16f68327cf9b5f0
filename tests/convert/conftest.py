"""A small model in three files, and a preset with a method for each kind of layer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import write_llama
from tests.presets import write_preset

RULES = (
    'match: "*", method: fp8',
    'match: "*.self_attn.*", method: fp8_block',
    'match: "*.0.mlp.*", method: awq',
    'match: "*.1.mlp.*", method: gptq_int8',
    'match: "*.2.mlp.*", method: int8',
    'match: "*.1.self_attn.o_proj", method: unquantized',
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_llama(tmp_path / "model", parts=3)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "quantize_config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("never opened")
    return folder


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    return write_preset(tmp_path, *RULES)
