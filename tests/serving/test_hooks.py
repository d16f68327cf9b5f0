"""The plugin whole, and what happens when it is not."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from mixedprec_plugin.errors import LoadError, RegistrationError
from tests.checkpoints import write_llama
from tests.presets import write_preset


def test_plugin_is_whole_after_load_plugins(sglang_context: SimpleNamespace) -> None:
    from mixedprec_plugin.serving.hooks import check_registration

    assert check_registration() == []


def test_hook_that_is_gone_fails_the_load(
    sglang_context: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.configs.load_config import LoadConfig

    from mixedprec_plugin.serving import hooks

    original = LoadConfig._verify_load_format.__wrapped__
    monkeypatch.setattr(LoadConfig, "_verify_load_format", original)
    hooks.require_registration.cache_clear()
    with pytest.raises(RegistrationError, match=r"LoadConfig\._verify_load_format: is not hooked"):
        hooks.require_registration()
    hooks.require_registration.cache_clear()


def test_every_hook_names_the_lines_it_stands_on(sglang_context: SimpleNamespace) -> None:
    import importlib
    import inspect

    import sglang.srt

    from mixedprec_plugin.serving.hooks import HOOKS

    root = Path(inspect.getfile(importlib.import_module("sglang.srt.server_args"))).parent
    assert sglang.srt
    for hook in HOOKS:
        file = hook.stands_on.split(":")[0]
        assert list(root.rglob(file)), hook.stands_on


def test_other_load_formats_are_what_they_were(sglang_context: SimpleNamespace) -> None:
    from sglang.srt.configs.load_config import LoadConfig, LoadFormat

    assert LoadConfig(load_format="safetensors").load_format is LoadFormat.SAFETENSORS
    assert LoadConfig().load_format is LoadFormat.AUTO
    with pytest.raises(ValueError, match="nonsense"):
        LoadConfig(load_format="nonsense")


def test_server_parser_knows_the_flags(sglang_context: SimpleNamespace) -> None:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    args = parser.parse_args(
        ["--model-path", "x", "--load-format", "mixedprec", "--mixedprec-config", "y"]
    )
    assert (args.load_format, args.mixedprec_config) == ("mixedprec", "y")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--quantization", "fp8"), "--quantization: 'fp8': a preset names the method"),
        (("--tp", "3"), "model.layers.0-2.mlp"),
        (("--dtype", "float32"), "--dtype: 'float32' cannot hold mixed precision"),
    ],
)
def test_server_stops_before_it_starts(
    sglang_context: SimpleNamespace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    argv: tuple[str, ...],
    message: str,
) -> None:
    from sglang.srt.server_args import ServerArgs

    model = write_llama(tmp_path / "model")
    preset = write_preset(tmp_path, 'match: "*", method: fp8')
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    args = parser.parse_args(
        ["--model-path", str(model), "--load-format", "mixedprec", "--mixedprec-config",
         str(preset), *argv]
    )  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        ServerArgs.from_cli_args(args)
    assert stop.value.code == 1
    assert message in capsys.readouterr().err


def test_engine_without_a_preset_says_how_to_name_one(
    sglang_context: SimpleNamespace, tmp_path: Path
) -> None:
    from sglang.srt.configs.model_config import ModelConfig

    from mixedprec_plugin.errors import UsageError

    args = SimpleNamespace(
        load_format="mixedprec", model_loader_extra_config="{}", dtype="auto", tp_size=1,
        model_path=str(write_llama(tmp_path / "model")),
    )  # fmt: skip
    with pytest.raises(UsageError, match="mixedprec_config"):
        ModelConfig.from_server_args(args)


class TestCompositeConfig:
    @pytest.fixture
    def config(self, sglang_context: SimpleNamespace, tmp_path: Path) -> object:
        from mixedprec_plugin.methods.interface import Target
        from mixedprec_plugin.serving.config import MixedPrecisionConfig
        from tests.presets import plan

        model = write_llama(tmp_path / "model")
        made = plan(
            model,
            'match: "*", method: gptq',
            'match: "*.self_attn.*_proj", method: fp8_block',
            'match: "*.layers.0.*_proj", method: awq',
            'match: "*.layers.1.*_proj", method: int8',
            'match: "*.o_proj", method: bf16',
            target=Target(device="cpu"),
        )
        return MixedPrecisionConfig(made)

    @pytest.mark.parametrize(
        ("module", "method"),
        [
            ("model.layers.0.self_attn.qkv_proj", "AWQLinearMethod"),
            ("model.layers.1.mlp.gate_up_proj", "BlockInt8LinearMethod"),
            ("model.layers.2.self_attn.qkv_proj", "Fp8LinearMethod"),
            ("model.layers.2.mlp.down_proj", "GPTQMarlinLinearMethod"),
            ("model.layers.2.self_attn.o_proj", "UnquantizedLinearMethod"),
        ],
    )
    def test_each_module_gets_the_method_of_its_plan(
        self, config: object, module: str, method: str
    ) -> None:
        from sglang.srt.layers.linear import RowParallelLinear

        layer = RowParallelLinear(512, 256, bias=False, quant_config=config, prefix=module)
        assert type(layer.quant_method).__name__ == method

    def test_unknown_module_is_an_error(self, config: object) -> None:
        from sglang.srt.layers.linear import ReplicatedLinear

        with pytest.raises(LoadError, match=r"vision\.proj: the model builds it .ReplicatedLinear"):
            ReplicatedLinear(64, 64, quant_config=config, prefix="vision.proj")

    def test_one_child_config_serves_all_layers_of_a_scheme(self, config: object) -> None:
        from sglang.srt.layers.linear import RowParallelLinear

        first, second = (
            RowParallelLinear(
                512, 256, bias=False, quant_config=config, prefix=f"model.layers.0.{name}_proj"
            )
            for name in ("mlp.down", "mlp.down")
        )
        assert first.quant_method.quant_config is second.quant_method.quant_config


def test_a_start_resolves_its_plan_once_and_again_after_a_file_changed(tmp_path: Path) -> None:
    from mixedprec_plugin.serving.early import make_plan
    from mixedprec_plugin.serving.settings import Settings

    model = write_llama(tmp_path / "model")
    preset = tmp_path / "p.yaml"
    preset.write_text("version: 1\nrules: [{match: '*_proj', method: bf16}]\n")

    def planned(dtype: str) -> object:
        return make_plan(str(model), Settings(str(preset)), dtype, 1, "cpu")

    first = planned("auto")
    assert planned("bfloat16") is first
    assert planned("float16") is not first
    again = planned("auto")
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert planned("auto") is not again
