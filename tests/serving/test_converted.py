"""Converted checkpoints in SGLang's own model classes, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixedprec_plugin.errors import UsageError
from tests import commands
from tests.checkpoints import write_llama
from tests.presets import write_preset
from tests.tensors import same_bytes

LoadModel = Callable[..., Any]
RULES = (
    'match: "*", method: gptq',
    'match: "*.self_attn.*_proj", method: fp8_block',
    'match: "*.0.mlp.*", method: awq',
    'match: "*.1.mlp.*", method: int8',
    'match: "*.2.self_attn.*_proj", method: fp8',
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model", parts=2)


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    return write_preset(tmp_path, *RULES)


@pytest.fixture
def converted(model: Path, preset: Path, tmp_path: Path) -> Path:
    return commands.converted(model, preset, tmp_path / "converted")


@pytest.fixture
def load_with_args(sglang_context: SimpleNamespace) -> LoadModel:
    """Load as a server does, from ServerArgs on."""

    def load(model: Path, **extra: object) -> object:
        from sglang.srt.configs.device_config import DeviceConfig
        from sglang.srt.configs.load_config import LoadConfig
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.model_loader.loader import get_model_loader
        from sglang.srt.server_args import ServerArgs

        args = ServerArgs(
            model_path=str(model), load_format="mixedprec", device="cpu", dtype="bfloat16",
            skip_tokenizer_init=True, model_loader_extra_config=dict(extra) or "{}",
        )  # fmt: skip
        model_config = ModelConfig.from_server_args(args)
        assert model_config.quantization is None
        load_config = LoadConfig(load_format="mixedprec", model_loader_extra_config=dict(extra))
        loader = get_model_loader(load_config, model_config)
        return loader.load_model(model_config=model_config, device_config=DeviceConfig("cpu"))

    return load


def test_checkpoint_of_a_method_that_sglang_runs_nowhere_is_planned(
    load_with_args: LoadModel, tmp_path: Path
) -> None:
    """configs/model_config.py:2152: `gptq` is no method of SGLang's but on ROCm."""
    said = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    stored = write_llama(tmp_path / "gptq", quantization_config=said)
    preset = write_preset(tmp_path, 'match: "*", method: fp8_block')
    served = load_with_args(stored, mixedprec_config=str(preset))
    method = served.model.layers[0].self_attn.o_proj.quant_method
    assert type(method).__name__ == "Fp8LinearMethod"


def test_converted_checkpoint_loads_without_a_preset_into_the_same_model(
    load_model: LoadModel, load_with_args: LoadModel, model: Path, preset: Path, converted: Path
) -> None:
    direct, later = load_model(model, preset), load_with_args(converted)
    theirs, ours = dict(direct.named_parameters()), dict(later.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert same_bytes(parameter, theirs[name]), name
    for name, module in later.named_modules():
        if hasattr(module, "quant_method"):
            assert type(module.quant_method) is type(direct.get_submodule(name).quant_method)


def test_preset_that_is_given_wins(
    load_with_args: LoadModel, converted: Path, tmp_path: Path
) -> None:
    other = write_preset(tmp_path / "other", 'match: "*", method: bf16')
    loaded = load_with_args(converted, mixedprec_config=str(other))
    assert loaded.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16


def test_without_the_load_format_sglang_says_that_it_does_not_know_the_method(
    sglang_context: SimpleNamespace, converted: Path
) -> None:
    from sglang.srt.configs.model_config import ModelConfig

    with pytest.raises(
        ValueError, match=r"Unknown quantization method: mixedprec\. Must be one of"
    ):
        ModelConfig(str(converted), dtype="bfloat16")


def test_checkpoint_that_carries_no_preset_needs_one(
    load_with_args: LoadModel, model: Path
) -> None:
    with pytest.raises(UsageError, match=r"--mixedprec-config .* carries no preset of its own"):
        load_with_args(model)


def test_without_its_load_format_a_converted_folder_is_refused_in_a_sentence(
    tmp_path: Path,
) -> None:
    from mixedprec_plugin.serving.early import check_not_converted

    said = {"quant_method": "mixedprec", "preset": {}, "layers": []}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": said}))
    args = SimpleNamespace(model_path=str(tmp_path), load_format="auto")
    with pytest.raises(UsageError, match=rf"^{tmp_path}: was written by mixedprec convert, in a "):
        check_not_converted(args)
    args.load_format = "mixedprec"
    check_not_converted(args)
    args.load_format = "auto"
    for other in ({"quant_method": "awq"}, {"quant_method": "compressed-tensors"}, None, []):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": other}))
        check_not_converted(args)
    for text in ("[]", "{", "\xff"):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        check_not_converted(args)
