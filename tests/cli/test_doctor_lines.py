"""The doctor names the line of ours to look at, where SGLang is not what it was."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.sglang
_ROOT = Path(__file__).resolve().parents[2]
_EXAMINE = """
import argparse, io, json, sys
from mixedprec_plugin.cli import doctor
out = io.StringIO()
code = doctor.run(argparse.Namespace(json=True, verbose=False), out)
report = json.loads(out.getvalue())
print("REPORT", json.dumps({"code": code, **report}))
"""
# what a next release might do to a hook's target, to another's parameters, to a constructor
_CHANGED = """
import warnings
warnings.simplefilter("ignore")
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.quantization.fp8 import Fp8Config
LoadConfig._check_load_format = LoadConfig._verify_load_format
del LoadConfig._verify_load_format
LoadConfig.__post_init__ = lambda self: None
ModelConfig.from_server_args = staticmethod(lambda args, model_path=None, **rest: None)
stock = Fp8Config.__init__
def init(self, is_checkpoint_fp8_serialized=False, activation_scheme="dynamic",
         ignored_layers=None, block_shape=None):
    stock(self, is_checkpoint_fp8_serialized, activation_scheme, ignored_layers, block_shape)
Fp8Config.__init__ = init
"""
_MOVED = """
import warnings
warnings.simplefilter("ignore")
import sglang.srt.plugins.hook_registry as registry
registry.HookKind = registry.HookType
del registry.HookType
from sglang.srt.layers.quantization import moe_wna16
del moe_wna16.MoeWNA16Method
"""


def examine(change: str) -> dict[str, Any]:
    """The doctor's report in a process whose SGLang is changed first."""
    script = textwrap.dedent(change) + _EXAMINE
    done = subprocess.run([sys.executable, "-c", script], cwd=_ROOT, capture_output=True, text=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")] or [""]
    assert line, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(line.removeprefix("REPORT "))
    return report


def failures(report: dict[str, Any], section: str) -> dict[str, list[str]]:
    """Name -> texts of the lines that failed."""
    found: dict[str, list[str]] = {}
    for line in report[section]:
        if line["status"] == "failed":
            found.setdefault(line["name"], []).append(line["text"])
    return found


def lines_named(text: str) -> list[str]:
    """The source lines of ours that a text sends the reader to."""
    named = []
    for place in text.rpartition("; look at ")[2].split(" and "):
        path, _, number = place.rpartition(":")
        lines = (_ROOT / path).read_text(encoding="utf-8").splitlines()
        named.append(lines[int(number) - 1])
    return named


@pytest.fixture(scope="module")
def changed() -> dict[str, Any]:
    return examine(_CHANGED)


def test_missing_target_is_sent_to_its_row_and_function(changed: dict[str, Any]) -> None:
    assert changed["code"] == 1
    target = "sglang.srt.configs.load_config.LoadConfig._verify_load_format"
    (text,) = [t for t in failures(changed, "registration")[target] if "look at mixed" in t]
    assert text.startswith("SGLang's sglang.srt.configs.load_config.LoadConfig has no _verify_load")
    row, function = lines_named(text)
    assert target in row
    assert function.startswith("def _verify_load_format(")


def test_changed_parameters_are_named_with_their_line(changed: dict[str, Any]) -> None:
    target = "sglang.srt.configs.model_config.ModelConfig.from_server_args"
    (text,) = [t for t in failures(changed, "registration")[target] if "look at mixed" in t]
    assert "from_server_args has no parameter 'server_args' (expected server_args, got arg" in text
    assert lines_named(text)[1].startswith("def _model_config_from_server_args(")


def test_hooks_that_fit_are_not_named(changed: dict[str, Any]) -> None:
    named = {name for name in failures(changed, "registration") if name.startswith("sglang.")}
    assert named == {
        "sglang.srt.configs.load_config.LoadConfig._verify_load_format",
        "sglang.srt.configs.model_config.ModelConfig.from_server_args",
    }


def test_renamed_argument_is_sent_to_the_builder(changed: dict[str, Any]) -> None:
    (text,) = failures(changed, "configs")["fp8 (cuda)"]
    assert "does not take the argument 'weight_block_size'" in text
    assert "look at mixedprec_plugin/methods/fp8/__init__.py:" in text
    (line,) = lines_named(text)
    assert line.startswith("def config_arguments(")


def test_name_that_is_gone_is_sent_to_the_import() -> None:
    report = examine(_MOVED)
    assert report["code"] == 1
    (text,) = failures(report, "registration")["mixedprec_plugin.serving.hooks"]
    assert text.startswith("cannot be imported: ")
    (line,) = lines_named(text)
    assert line == "from sglang.srt.plugins.hook_registry import HookRegistry, HookType"
    (text,) = failures(report, "configs")["awq (cpu)"]
    (line,) = lines_named(text)
    assert line == "from sglang.srt.layers.quantization.moe_wna16 import MoeWNA16Method"
