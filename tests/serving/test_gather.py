"""Gathered inputs, where their file cannot be written at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.presets import write_preset

pytestmark = pytest.mark.filterwarnings("ignore")
NUM_TOKENS = 320


def test_what_cannot_be_written_is_kept_and_written_later(
    load_model: Callable[..., Any],
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    from mixedprec_plugin.calibrate.gathered import Gathered
    from mixedprec_plugin.serving import gather
    from mixedprec_plugin.serving.loader import served_config

    preset = write_preset(tmp_path, 'match: "*.mlp.*", method: awq, group_size: 32')
    model, folder = load_model(llama, preset), tmp_path / "inputs"
    config = served_config(model)
    gathering = gather.Gathering(model, config, str(folder), NUM_TOKENS)
    batch = object.__new__(ForwardBatch)
    batch.positions, batch.forward_mode = torch.arange(NUM_TOKENS + 1), ForwardMode.EXTEND
    folder.rmdir()
    given: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(gather, "_RETRY_SECONDS", 0.0)
    while gathering._count < NUM_TOKENS:
        gathering._start_pass(model, (batch,), {})
        for name, module in gathering._modules.items():
            x = torch.randn(len(batch.positions), module.input_size).bfloat16()
            given[name] = x[gathering._rows[-1]]
            gathering._see(name, module, (x,), {})
        gathering._end_pass()
    assert not folder.exists()
    assert "tried again in a minute" in caplog.text
    folder.mkdir()
    gathering._end_pass()
    made = Gathered(folder, config.plan)
    assert made.num_tokens == NUM_TOKENS
    for name, last in given.items():
        assert torch.equal(made.tokens(name, len(last)).x[-1], last)
