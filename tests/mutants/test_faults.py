"""Each deliberate fault is noticed by the tests that are there to notice it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
_ROOT = Path(__file__).resolve().parents[2]
_MARLIN = "tests/quantize/test_marlin_layout.py"
_WRITTEN = "tests/quantize/test_golden_quantize.py"
_READ = "tests/quantize/test_golden_dequantize.py"
_TILES = "tests/quantize/test_block_layout.py::test_scales_of_tiles_lie_where_the_reference_looks"
_SGLANG = "tests/methods/test_against_sglang.py"
_LOADER = "tests/serving/test_loader.py"
_DOCTOR = "tests/cli/test_doctor.py"

CAUGHT_BY: Mapping[str, tuple[str, ...]] = {
    "swapped nibbles, GPTQ": (
        f"{_MARLIN}::test_gptq_weights_survive_marlin",
        f"{_READ}::test_gptq_equals_the_reference",
    ),
    "swapped nibbles, AWQ": (
        f"{_MARLIN}::test_awq_weights_survive_marlin",
        f"{_READ}::test_awq_equals_the_reference",
        f"{_WRITTEN}::test_awq_reproduces_autoround_rtn_bit_for_bit",
    ),
    "zero point off by one, GPTQ": (
        f"{_MARLIN}::test_gptq_zeros_are_the_ones_that_marlin_takes_for_granted",
        f"{_READ}::test_gptq_equals_the_reference",
        f"{_WRITTEN}::test_gptq_zeros_and_groups_are_stored_as_others_store_them",
    ),
    "zero point off by one, AWQ": (
        f"{_MARLIN}::test_awq_weights_survive_marlin",
        f"{_READ}::test_awq_equals_the_reference",
        f"{_WRITTEN}::test_awq_reproduces_autoround_rtn_bit_for_bit",
    ),
    "transposed scales, GPTQ": (
        f"{_MARLIN}::test_gptq_weights_survive_marlin",
        f"{_READ}::test_gptq_equals_the_reference",
    ),
    "transposed scales, FP8": (
        _TILES,
        f"{_READ}::test_fp8_block_with_ragged_edges_equals_the_reference",
        f"{_WRITTEN}::test_fp8_scales_are_those_of_llmcompressor",
    ),
    "transposed scales, INT8": (_TILES,),
    "a scale dropped": (
        f"{_SGLANG}::test_stored_tensors_are_sglangs_parameters",
        f"{_MARLIN}::test_gptq_weights_survive_marlin",
        f"{_LOADER}::test_every_stored_number_arrives_in_its_parameter",
    ),
    "a wrong config class": (f"{_SGLANG}::test_builder_fits_the_installed_constructor",),
    "a constructor argument renamed in SGLang": (
        f"{_SGLANG}::test_builder_fits_the_installed_constructor",
        f"{_DOCTOR}::test_installation_is_well",
    ),
}


def run(fault: str, tests: tuple[str, ...], folder: Path) -> dict[str, set[str]]:
    """Run tests with a fault in place.

    Returns:
        test -> outcomes of its cases.
    """
    path = folder / "outcomes.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.mutants.faults", *tests]
    environment = {
        **os.environ,
        "MIXEDPREC_TEST_FAULT": fault,
        "MIXEDPREC_TEST_OUTCOMES": str(path),
    }
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-3000:]
    outcomes: dict[str, set[str]] = {test: set() for test in tests}
    for name, outcome in json.loads(path.read_text()).items():
        outcomes[name.partition("[")[0]].add(outcome)
    return outcomes


def test_without_a_fault_all_pass(tmp_path: Path) -> None:
    tests = tuple(dict.fromkeys(test for tests in CAUGHT_BY.values() for test in tests))
    assert run("none", tests, tmp_path) == {test: {"passed"} for test in tests}


@pytest.mark.parametrize("fault", CAUGHT_BY)
def test_fault_is_noticed(fault: str, tmp_path: Path) -> None:
    outcomes = run(fault, CAUGHT_BY[fault], tmp_path)
    missed = [test for test, found in outcomes.items() if "failed" not in found]
    assert not missed
