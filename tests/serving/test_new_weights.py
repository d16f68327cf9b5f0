"""New weights that are read straight into the parameters, and the way back where they fail."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixedprec_plugin.errors import CheckpointError
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint
from tests.presets import write_preset
from tests.serving.stock import load_again, loader_of

LoadModel = Callable[..., Any]
# of the largest tensors, 8 MiB in bfloat16: several pieces, more than wait at once in all
SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8,
         "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip


@pytest.mark.parametrize("spoilt", [0, 1])
def test_old_weights_come_back_whole_after_new_ones_failed(
    load_model: LoadModel, tmp_path: Path, spoilt: int
) -> None:
    """SGLang asks the same loader again, while it handles the error (weight_updater.py:236)."""
    config = llama_config(**SIZES)
    tensors = llama_tensors(config)
    first = write_checkpoint(tmp_path / "first", config, tensors)
    others = {name: tensor * 0.5 for name, tensor in tensors.items()}
    others[f"model.layers.{spoilt}.mlp.down_proj.weight"][-1, -1] = float("nan")
    second = write_checkpoint(tmp_path / "second", config, others)
    model = load_model(first, write_preset(tmp_path, 'match: "*", method: bf16'))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    assert torch.equal(
        before["model.layers.1.mlp.down_proj.weight"],
        tensors["model.layers.1.mlp.down_proj.weight"],
    )
    loader, model_config = loader_of(second, load_format="mixedprec")
    # whoever handles the error holds the stream that it came from
    with pytest.raises(CheckpointError, match=r"down_proj\.weight: 1 of ") as raised:
        load_again(loader, model_config, model)
    load_again(loader, model_config, model)
    del raised
    gc.collect()
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), name
