from __future__ import annotations

import dataclasses
import json
import logging
import platform
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from mixedprec_plugin.cli import doctor
from mixedprec_plugin.methods import registry
from mixedprec_plugin.methods.construct import quieted
from mixedprec_plugin.methods.registry import METHODS, MethodTable
from tests import commands
from tests.methods.packages import install

pytestmark = pytest.mark.sglang

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tells what a machine without GPU is")


def run(*flags: str) -> tuple[int, str]:
    code, out, _ = commands.run("doctor", *flags)
    return code, out


@pytest.fixture(scope="module")
def report() -> tuple[int, dict[str, Any]]:
    """The report on this machine: one run for all the tests that only read it."""
    code, text = run("--json")
    return code, json.loads(text)


def test_installation_is_well(report: tuple[int, dict[str, Any]]) -> None:
    code, data = report
    assert data["problems"] == []
    assert (code, data["ok"]) == (0, True)


def test_warnings_stay_out_of_the_report(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """SGLang says of some configs that they are experimental, and torch that there is no CUDA."""
    logger = logging.getLogger("sglang.srt.layers.quantization")

    def examine() -> list[doctor.Finding]:
        with quieted(logger.name, logging.WARNING):
            logger.warning("chatter")
        logging.getLogger("torch.utils").warning("no CUDA")
        return []

    monkeypatch.setattr(doctor, "examine_sglang", examine)
    assert run("--quiet") == (0, "")
    assert caplog.messages == []
    logger.warning("heard again")
    assert caplog.messages == ["heard again"]


def test_every_method_is_constructed(report: tuple[int, dict[str, Any]]) -> None:
    constructed = {line["method"] for line in report[1]["configs"] if line["status"] == "ok"}
    assert constructed == set(METHODS)


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        (
            "fp8 weight_block_size=[128, 128] (cuda)",
            {
                "is_checkpoint_fp8_serialized": True,
                "activation_scheme": "dynamic",
                "weight_block_size": [128, 128],
            },
        ),
        (
            "blockwise_int8 (cuda)",
            {
                "is_checkpoint_int8_serialized": True,
                "activation_scheme": "dynamic",
                "weight_block_size": [128, 128],
            },
        ),
        (
            "gptq bits=8 (cuda)",
            {
                "weight_bits": 8,
                "group_size": 128,
                "is_sym": True,
                "desc_act": False,
                "lm_head_quantized": True,
                "pack_factor": 4,
                "quant_type": "uint8b128",
            },
        ),
        (
            "awq group_size=64 (cpu)",
            {"weight_bits": 4, "group_size": 64, "zero_point": True, "pack_factor": 8},
        ),
    ],
)
def test_config_line_has_the_attributes(
    report: tuple[int, dict[str, Any]], name: str, attributes: dict[str, Any]
) -> None:
    (line,) = [line for line in report[1]["configs"] if line["name"] == name]
    assert line["attributes"] == attributes


@no_gpu
def test_marlin_without_a_gpu_is_no_fault(report: tuple[int, dict[str, Any]]) -> None:
    (line,) = [line for line in report[1]["configs"] if line["name"] == "awq (cuda)"]
    assert line["status"] == "absent"
    assert line["text"].startswith("not constructible on this device: Marlin does not support")


@no_gpu
def test_cpu_platform_is_registered(report: tuple[int, dict[str, Any]]) -> None:
    lines = {line["name"]: line["text"] for line in report[1]["registration"]}
    assert lines["platform"] == "mixedprec_plugin.cpu.platform.CpuPlatform"
    assert lines["load format"] == "mixedprec"
    assert lines["flag"] == "--mixedprec-config"


def test_versions_are_listed(report: tuple[int, dict[str, Any]]) -> None:
    versions = {line["name"]: line["text"] for line in report[1]["versions"]}
    assert list(versions) == [
        "python",
        "mixedprec-plugin",
        "sglang",
        "torch",
        "transformers",
        "safetensors",
    ]
    assert torch.__version__.startswith(versions["torch"])


def test_report_is_plain_text_where_there_is_no_terminal() -> None:
    code, text = run("--verbose")
    assert code == 0
    assert "\x1b" not in text
    assert "  ok      gptq (cuda)  " in text
    assert "GPTQMarlinConfig: weight_bits=4 is_sym=True pack_factor=8 group_size=128" in text
    assert text.endswith("all well\n")


@no_gpu
def test_without_flags_it_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = run()
    lines = text.splitlines()
    assert code == 0
    assert len(lines) <= 8
    assert lines[0].startswith(f"With python {platform.python_version()}, mixedprec-plugin ")
    assert "  device   no GPU: SGLang runs on this CPU, by the plugin's platform" in lines
    assert "  plugin   load format, flags, hooks and platform are in place" in lines
    (methods,) = [line for line in lines if line.startswith("  methods  ")]
    assert all(method in methods for method in METHODS)
    assert lines[-1] == "all well; next: mixedprec serve PRESET --model DIR"
    monkeypatch.setattr(doctor, "TESTED", "0.5.9")
    assert ", which this release was tested with" in run()[1]


def with_method(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Put a changed `fp8` into the table, as another SGLang release would make ours look."""
    changed = {**METHODS, "fp8": dataclasses.replace(METHODS["fp8"], **changes)}
    monkeypatch.setattr(METHODS, "_methods", MappingProxyType(changed))


def test_argument_that_sglang_does_not_take_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with_method(monkeypatch, config_arguments=lambda _arguments, _platform: {"weight_bits": 8})
    code, text = run()
    assert code == 1
    assert "failed  fp8 (cuda)" in text
    assert "does not take the argument 'weight_bits' (expected is_checkpoint_fp8_serialized" in text


@no_gpu
def test_class_of_the_active_platform_must_construct(monkeypatch: pytest.MonkeyPatch) -> None:
    build = METHODS["fp8"].config_arguments
    with_method(
        monkeypatch,
        config_arguments=lambda arguments, platform: {
            **build(arguments, platform),
            "activation_scheme": "no",
        },
    )
    code, text = run("--json")
    status = {line["name"]: line["status"] for line in json.loads(text)["configs"]}
    assert (code, status["fp8 (cpu)"], status["fp8 (cuda)"]) == (1, "failed", "absent")


def test_broken_package_fails_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "tests.methods.gone:SPEC")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "METHODS", MethodTable(dict(METHODS)))
    code, text = run()
    assert code == 1
    assert "third-party: entry point 'foreign = tests.methods.gone:SPEC' of mixedprec" in text
    assert "cannot be loaded: ModuleNotFoundError: " in text
    assert "repair or uninstall third-party" in text


def test_package_that_is_not_installed_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("sglang", "mixedprec-no-such-package"))
    code, text = run()
    assert code == 1
    assert "is not installed; run 'pip install mixedprec-no-such-package'" in text


def test_missing_hook_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixedprec_plugin.serving import hooks

    gone = dataclasses.replace(hooks.HOOKS[0], function=lambda *_: None)
    monkeypatch.setattr(hooks, "HOOKS", (gone,))
    code, text = run()
    assert code == 1
    assert f"failed  {gone.target}" in text
    assert "is not hooked" in text
