from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import mixedprec_plugin
from mixedprec_plugin.resources import preset_dir, preset_names, schema_path

PACKAGE = Path(mixedprec_plugin.__file__).parent
SETUP = PACKAGE.parent / "setup.py"


def test_schemas_and_presets_are_found() -> None:
    assert json.loads(schema_path("preset.schema.json").read_text())["title"] == "mixedprec preset"
    assert preset_dir().parts[-2:] == ("configs", "presets")
    assert "fp8-block" in preset_names()


@pytest.mark.skipif(not SETUP.is_file(), reason="not run from a checkout")
def test_setup_installs_every_package() -> None:
    code = (
        "import setuptools\n"
        "from distutils.core import run_setup\n"
        "print(*run_setup('setup.py', stop_after='config').packages)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=SETUP.parent, capture_output=True, text=True, check=True
    )
    there = {
        ".".join(init.parent.relative_to(PACKAGE.parent).parts)
        for init in PACKAGE.rglob("__init__.py")
    }
    data = {"mixedprec_plugin.configs", "mixedprec_plugin.schemas"}
    assert set(run.stdout.split()) == there | data


@pytest.mark.skipif(not SETUP.is_file(), reason="not run from a checkout")
def test_every_module_is_in_a_package() -> None:
    for module in PACKAGE.rglob("*.py"):
        assert (module.parent / "__init__.py").is_file(), module
