"""What SGLang asks the config of the whole model while it records graphs for prefilling.

That whole models run in such graphs is shown by `tests/dryrun/test_models.py`.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest

from mixedprec_plugin.errors import LoadError
from tests.checkpoints import write_llama
from tests.presets import plan


@pytest.mark.filterwarnings("ignore")
def test_awqs_marlin_asks_the_models_config_for_its_type() -> None:
    """marlin_utils.py:634; GPTQ's says its own, by `unified_apply_gptq_marlin_gemm_with_wtype`."""
    from sglang.srt.layers.quantization import marlin_utils

    source = inspect.getsource(marlin_utils)
    assert "quant_config = get_tc_piecewise_forward_context().quant_config" in source


def test_awq_layers_of_two_types_are_refused(
    sglang_context: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.layers.quantization.awq import AWQMarlinConfig, awq

    from mixedprec_plugin.serving.config import MixedPrecisionConfig

    monkeypatch.setattr(awq, "verify_marlin_supported", lambda *_, **__: None)  # asks a GPU
    four, eight = (AWQMarlinConfig(bits, 128, True, False, None, {}) for bits in (4, 8))
    config = MixedPrecisionConfig(plan(write_llama(tmp_path), 'match: "*", method: auto'))
    assert not hasattr(config, "quant_type")
    config._answer_for(four)
    config._answer_for(four)
    assert config.quant_type == four.quant_type
    text = r"has awq layers whose quant_type is .* and others .*; take them from one source"
    with pytest.raises(LoadError, match=text):
        config._answer_for(eight)
