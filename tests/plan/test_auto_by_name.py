"""Layers that only SGLang's own classes read: `auto` where config.json names one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import write_checkpoint
from tests.presets import plan


class TestAutoByName:
    def write(self, folder: Path, **said: Any) -> Path:
        tensors = {"x.0.up_proj.weight": torch.zeros(8, 8, dtype=torch.int8)}
        config = {"torch_dtype": "bfloat16", "quantization_config": said}
        return write_checkpoint(folder, config, tensors)

    def test_what_only_sglang_reads_is_served_as_its_error_says(self, tmp_path: Path) -> None:
        model = self.write(tmp_path / "model", quant_method="w4afp8")
        (problem,) = plan(model, 'match: "*", method: bf16').errors
        remedy = "match it with method: auto to serve it as it is, or take a checkpoint in another "
        assert str(problem).endswith(f"{remedy}format")
        assert plan(model, 'match: "*", method: auto').errors == ()

    @pytest.mark.parametrize(
        ("said", "why"),
        [
            ({}, "config.json names no quant_method that could read it"),
            ({"quant_method": "exl2"}, "SGLang has no class for quant_method 'exl2'"),
            ({"quant_method": "bitsandbytes"}, "SGLang has no class for quant_method 'bitsandb"),
        ],
    )
    def test_what_sglang_has_no_class_for_is_refused_and_auto_not_advised(
        self, tmp_path: Path, said: dict[str, str], why: str
    ) -> None:
        model = self.write(tmp_path / "model", **said)
        (problem,) = plan(model, 'match: "*", method: auto').errors
        assert why in str(problem)
        (other,) = plan(model, 'match: "*", method: bf16').errors
        assert str(other).endswith("; take a checkpoint in another format")
