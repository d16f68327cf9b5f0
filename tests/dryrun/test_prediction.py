"""The plan's bytes against what SGLang's layers hold once they are repacked for a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.dryrun.matrix import prepare, run_module
from tests.dryrun.prediction import PRESETS


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, widened_model: Path
) -> Mapping[str, Mapping[str, Any]]:
    folder = tmp_path_factory.mktemp("prediction")
    prepare(folder)
    return run_module("prediction", "H100", folder)


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_take_what_the_plan_says(
    found: Mapping[str, Mapping[str, Any]], preset: str
) -> None:
    assert found[preset]["held"] == pytest.approx(found[preset]["planned"], rel=0.02)
