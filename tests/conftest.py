"""The real model in its shapes, for several test packages; and what `--quick` leaves out."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from mixedprec_plugin.evaluate.server import Server

# models are quantized whatever was kept before, and leave nothing behind, in servers too
os.environ["MIXEDPREC_CACHE_SIZE"] = "0"
# times say nothing on a shared machine
settings.register_profile("mixedprec", deadline=None)
settings.register_profile("quick", deadline=None, max_examples=20)

TESTS = Path(__file__).resolve().parent
# what `--quick` leaves out: paths, and each test with one of the fixtures or marks
SLOW_PATHS = {
    TESTS / path for path in (
        "benchmarks", "calibrate", "compose/test_transforms.py", "convert/test_strange_files.py",
        "cpu", "dryrun", "experts", "families/test_whole.py", "fuzz", "gpu", "mutants", "search",
        "server", "serving",
        "test_demo_model.py",
    )
}  # fmt: skip
SLOW_FIXTURES = {
    "original_model", "widened_model", "experts_model",
    "expert_layer", "linear_module", "sglang_context", "sglang_marlin", "sglang_sources",
    "browser", "dist",
}  # fmt: skip
SLOW_MARKS = {"sglang", "slow"}
LONG_FOLDERS = {"dryrun", "experts", "server"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--quick`."""
    parser.addoption(
        "--quick", action="store_true",
        help="leave out what is slow: SGLang, engines, dry runs, and whatever runs a model",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Give generated inputs no deadline, and fewer of them under `--quick`."""
    settings.load_profile("quick" if config.getoption("--quick") else "mixedprec")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import the paths that are left out."""
    return True if collection_path in SLOW_PATHS and config.getoption("--quick") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give dry runs their marks, put the longest first, and leave out what is slow."""
    has_gcc = shutil.which("gcc") is not None
    # of two processes, or one runs them in the end while the other waits
    items.sort(key=lambda item: item.path.parent.name not in LONG_FOLDERS)
    for item in items:
        if TESTS / "dryrun" in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(
                pytest.mark.skipif(not has_gcc, reason="needs gcc, for the driver's stub")
            )
    if config.getoption("--quick"):
        config.hook.pytest_deselected(items=[item for item in items if _is_slow(item)])
        items[:] = [item for item in items if not _is_slow(item)]


def pytest_collection_finish() -> None:
    """Leave what imports have made out of every collection of garbage to come."""
    gc.collect()
    gc.freeze()


def _is_slow(item: pytest.Item) -> bool:
    fixtures = set(getattr(item, "fixturenames", ()))
    marks = {mark.name for mark in item.iter_markers()}
    return bool(fixtures & SLOW_FIXTURES or marks & SLOW_MARKS)


@pytest.fixture(autouse=True)
def is_quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Under `--quick`, fail a test that starts a server or imports SGLang."""
    if request.config.getoption("--quick"):
        monkeypatch.setattr(Server, "__enter__", None)
        yield
        assert "sglang.srt" not in sys.modules, "mark this test with `sglang`"
    else:
        yield


@pytest.fixture(scope="session")
def original_model() -> Path:
    """SmolLM2-135M-Instruct in bf16: hidden 576, 9 query and 3 key-value heads."""
    from demo.model import checkpoint

    return checkpoint("original")


@pytest.fixture(scope="session")
def widened_model() -> Path:
    """The same function with every dimension a multiple of 128: hidden 768, 12 and 4 heads."""
    from demo.model import checkpoint

    return checkpoint("widened")


@pytest.fixture(scope="session")
def experts_model() -> Path:
    """The widened one as a mixture of four experts a layer, two a token."""
    from demo.model import checkpoint

    return checkpoint("experts")


@pytest.fixture(scope="session")
def prose() -> str:
    """English prose of a little over 2,000 tokens."""
    root = Path(__file__).resolve().parents[1]
    return (root / "benchmarks" / "data" / "prose.txt").read_text(encoding="utf-8")
