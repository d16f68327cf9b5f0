"""A model that is compared with its reference while it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixedprec_plugin.errors import LoadError
from mixedprec_plugin.methods.gptq import codec as gptq
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint, write_llama
from tests.presets import write_preset

LoadModel = Callable[..., Any]
NAME = "model.layers.1.mlp.down_proj"
ARGUMENTS = {"bits": 4, "group_size": 64, "sym": True, "desc_act": False, "rounding": "nearest"}


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    return write_preset(
        tmp_path, 'match: "*", method: fp8',
        'match: "*.1.mlp.down_proj", method: gptq, group_size: 64',
    )  # fmt: skip


def stored_in_gptq(folder: Path, damage: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A Llama with one layer stored in GPTQ, its scales changed."""
    config = llama_config()
    tensors = llama_tensors(config)
    stored = gptq.quantize(tensors.pop(f"{NAME}.weight"), ARGUMENTS, torch.bfloat16)
    stored["scales"] = damage(stored["scales"]).contiguous()
    tensors |= {f"{NAME}.{suffix}": tensor for suffix, tensor in stored.items()}
    return write_checkpoint(folder, config, tensors)


def test_model_that_is_near_its_reference_is_served(
    load_model: LoadModel, preset: Path, tmp_path: Path
) -> None:
    reference = write_llama(tmp_path / "reference")
    model = stored_in_gptq(tmp_path / "model", lambda scales: scales)
    loaded = load_model(model, preset, mixedprec_verify=str(reference))
    assert type(loaded.get_submodule(NAME).quant_method).__name__ == "GPTQMarlinLinearMethod"


def test_model_with_a_damaged_layer_is_not_served(
    load_model: LoadModel, preset: Path, tmp_path: Path
) -> None:
    reference = write_llama(tmp_path / "reference")
    model = stored_in_gptq(tmp_path / "model", lambda scales: scales * 2)
    load_model(model, preset)
    message = rf"^{NAME}: in gptq from 'model' its relative error is 1\S*, its cosine 0\.99\d+ "
    with pytest.raises(LoadError, match=message):
        load_model(model, preset, mixedprec_verify=str(reference))


def test_reference_that_lacks_layers_is_an_error(
    load_model: LoadModel, preset: Path, tmp_path: Path
) -> None:
    reference = write_llama(tmp_path / "reference", num_hidden_layers=2)
    model = stored_in_gptq(tmp_path / "model", lambda scales: scales)
    with pytest.raises(LoadError, match=r"layers\.2\.\S+: was not compared: not in the reference"):
        load_model(model, preset, mixedprec_verify=str(reference))
