from __future__ import annotations

import pytest

from compat.check import Checker
from compat.releases import installed, own
from compat.sources import Sources


@pytest.fixture(scope="session")
def sglang_sources() -> Sources:
    """The sources of the installed SGLang, not imported."""
    return installed()


@pytest.fixture(scope="session")
def checker(sglang_sources: Sources) -> Checker:
    return Checker(own(), sglang_sources)
