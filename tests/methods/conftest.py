"""SGLang's layers in this process, without a process group."""

from __future__ import annotations

from tests.cpu.conftest import expert_layer, linear_module

__all__ = ["expert_layer", "linear_module"]
