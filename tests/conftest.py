"""Fixtures that several test packages share: the real model in its shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

# times say nothing on a shared machine
settings.register_profile("mixedprec", deadline=None)
settings.load_profile("mixedprec")


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
