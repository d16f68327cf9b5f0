"""Layers that only SGLang's own classes read: `auto` where config.json names one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import write_checkpoint
from tests.presets import plan


class TestAutoByName:
    def write(self, folder: Path, **config: Any) -> Path:
        tensors = {"x.0.up_proj.W_q": torch.zeros(8, 8, dtype=torch.uint8)}
        return write_checkpoint(folder, {"torch_dtype": "bfloat16", **config}, tensors)

    def test_what_only_sglang_reads_is_served_as_its_error_says(self, tmp_path: Path) -> None:
        model = self.write(tmp_path / "model", quantization_config={"quant_method": "hqq"})
        (problem,) = plan(model, 'match: "*", method: bf16').errors
        remedy = "match it with method: auto to serve it as it is, or take a checkpoint in another "
        assert str(problem).endswith(f"{remedy}format")
        assert plan(model, 'match: "*", method: auto').errors == ()

    def test_without_a_quant_method_auto_is_refused_and_not_advised(self, tmp_path: Path) -> None:
        model = self.write(tmp_path / "model")
        (problem,) = plan(model, 'match: "*", method: auto').errors
        assert "config.json names no quant_method" in str(problem)
        assert "write a quantization_config with the tool's quant_method into it" in str(problem)
        (other,) = plan(model, 'match: "*", method: bf16').errors
        assert str(other).endswith("; take a checkpoint in another format")
