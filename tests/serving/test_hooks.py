"""The plugin whole, and what happens when it is not."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest

from mixedprec_plugin.errors import LoadError, RegistrationError
from mixedprec_plugin.plan.model import Plan
from tests.checkpoints import write_llama
from tests.presets import write_preset


def test_plugin_is_whole_after_load_plugins(sglang_context: SimpleNamespace) -> None:
    from mixedprec_plugin.serving.hooks import check_registration

    assert check_registration() == []


def test_hook_that_is_gone_fails_the_load(
    sglang_context: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    from mixedprec_plugin.serving import hooks

    original = WeightUpdater.update_weights_from_disk.__wrapped__
    monkeypatch.setattr(WeightUpdater, "update_weights_from_disk", original)
    hooks.require_registration.cache_clear()
    text = r"WeightUpdater\.update_weights_from_disk: is not hooked"
    with pytest.raises(RegistrationError, match=text):
        LoadConfig(load_format="mixedprec")
    hooks.require_registration.cache_clear()
    # without the hook that would have asked, SGLang does not know the format
    monkeypatch.setattr(
        LoadConfig, "_verify_load_format", LoadConfig._verify_load_format.__wrapped__
    )
    with pytest.raises(ValueError, match="mixedprec"):
        LoadConfig(load_format="mixedprec")


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


class TestPlanner:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        return write_llama(tmp_path / "model")

    @pytest.fixture
    def preset(self, tmp_path: Path) -> Path:
        return write_preset(tmp_path, 'match: "*_proj", method: bf16')

    def test_plan_is_made_again_where_something_changed(self, model: Path, preset: Path) -> None:
        from mixedprec_plugin.serving.planner import Planner
        from mixedprec_plugin.serving.settings import Settings

        planner = Planner()

        def planned(dtype: str) -> Plan:
            return planner.plan(str(model), Settings(str(preset)), dtype, 1, "cpu")

        first = planned("auto")
        assert planned("bfloat16") is first
        assert planned("float16") is not first
        again = planned("auto")
        # headers are read once
        assert again.source is first.source
        os.utime(model / "model.safetensors", ns=(1, 1))
        last = planned("auto")
        assert last is not again
        assert last.source is not first.source

    def test_start_plans_once_a_process(
        self, sglang_context: SimpleNamespace, model: Path, preset: Path
    ) -> None:
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.server_args import ServerArgs

        from mixedprec_plugin.serving.planner import Planner, planner_of

        parser = argparse.ArgumentParser()
        ServerArgs.add_cli_args(parser)
        args = parser.parse_args(
            ["--model-path", str(model), "--load-format", "mixedprec", "--mixedprec-config",
             str(preset), "--dtype", "bfloat16"]
        )  # fmt: skip
        server_args = ServerArgs.from_cli_args(args)
        planner = planner_of(args)
        assert planner.last is not None
        plan = planner.last
        # the loader asks the latter
        for record in (server_args, ModelConfig.from_server_args(server_args)):
            assert planner_of(record) is planner
        assert planner.last is plan
        # a rank's process gets the record, and makes the plan by itself
        travelled = planner_of(pickle.loads(pickle.dumps(server_args)))
        assert isinstance(travelled, Planner)
        assert travelled.last is None
