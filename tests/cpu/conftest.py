"""SGLang's layers in this process: one rank, no process group."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.cpu.context import publish


@pytest.fixture(scope="session")
def linear_module() -> ModuleType:
    """The module of SGLang's linear layers, its context published for a single rank."""
    publish()
    from sglang.srt.layers import linear

    return linear


@pytest.fixture(scope="session")
def expert_layer(linear_module: ModuleType) -> type:
    """SGLang's layer of experts, `FusedMoE`."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    return FusedMoE
