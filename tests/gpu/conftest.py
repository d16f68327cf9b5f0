"""One GPU, or a reason to skip; what was measured is printed at the end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.gpu.card import capability, why_skip
from tests.gpu.in_order import RESULTS, note

_MEASURED = "measured"


class _Report(list[str]):
    """Lines that go with a test's result, so that they come back from another process as well."""

    def __init__(self, test: pytest.Item) -> None:
        super().__init__()
        self._test = test

    def append(self, line: str) -> None:
        self._test.user_properties.append((_MEASURED, line))


@pytest.fixture(scope="session")
def gpu() -> int:
    """Compute capability of this machine's GPU, major * 10 + minor."""
    found = capability()
    if reason := why_skip(found):
        pytest.skip(reason)
    assert found is not None
    return found


@pytest.fixture(scope="session")
def demo_model(gpu: int) -> Path:
    """The widened demo model, from the cache or built."""
    from demo.gguf_model import DemoModelError
    from demo.model import checkpoint

    try:
        return checkpoint("widened")
    except DemoModelError as error:
        pytest.skip(f"needs the demo model, in the cache or from a package index: {error}")


@pytest.fixture
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU, or a reason to skip; DeepGEMM compiles what is asked for, and not all in advance."""
    from tests.gpu.serving import is_rehearsal

    monkeypatch.setenv("SGLANG_JIT_DEEPGEMM_PRECOMPILE", "0")
    if not is_rehearsal():
        request.getfixturevalue("gpu")


@pytest.fixture
def dense(machine: None, request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue("widened_model")
    return path


@pytest.fixture
def report(request: pytest.FixtureRequest) -> list[str]:
    """Lines that are printed when all is done."""
    return _Report(request.node)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write a test's result where `tests.gpu.in_order` asks for it."""
    path = os.environ.get(RESULTS)
    if path and (report.when == "call" or report.outcome != "passed"):
        measured = [line for key, line in report.user_properties if key == _MEASURED]
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
        why = report.longreprtext[-400:] if report.outcome != "passed" else ""
        note(Path(path), {**line, "measured": measured, "why": why})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was measured."""
    results = [x for key in ("passed", "failed") for x in terminalreporter.stats.get(key, ())]
    lines = {str(line) for x in results for key, line in x.user_properties if key == _MEASURED}
    if lines:
        terminalreporter.section("measured on the GPU")
        for line in sorted(lines):
            terminalreporter.write_line(line)
