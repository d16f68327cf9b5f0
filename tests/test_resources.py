from __future__ import annotations

import configparser
import json
from pathlib import Path

import pytest

import mixedprec_plugin
from mixedprec_plugin.resources import config_path, preset_dir, preset_names, schema_path

PACKAGE = Path(mixedprec_plugin.__file__).parent
SETUP = PACKAGE.parent / "setup.cfg"


def test_schemas_and_presets_are_found() -> None:
    assert json.loads(schema_path("preset.schema.json").read_text())["title"] == "mixedprec preset"
    assert config_path("presets") == preset_dir()
    assert "fp8-block" in preset_names()


@pytest.mark.skipif(not SETUP.is_file(), reason="not run from a checkout")
def test_setup_lists_every_package() -> None:
    setup = configparser.ConfigParser()
    setup.read(SETUP)
    listed = set(setup["options"]["packages"].split())
    there = {
        ".".join(init.parent.relative_to(PACKAGE.parent).parts)
        for init in PACKAGE.rglob("__init__.py")
    }
    assert listed == there | {"mixedprec_plugin.configs", "mixedprec_plugin.schemas"}


@pytest.mark.skipif(not SETUP.is_file(), reason="not run from a checkout")
def test_every_module_is_in_a_package() -> None:
    for module in PACKAGE.rglob("*.py"):
        assert (module.parent / "__init__.py").is_file(), module
