"""Experts behind DeepEP: by a preset, and by SGLang's own config of a whole model in block FP8.

python -m tests.dryrun.deepep "H100" FOLDER
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tests.dryrun.cards import Card
from tests.dryrun.process import run_on_card


def run_all(_card: Card, folder: Path) -> dict[str, dict[str, Any]]:
    """What becomes of each: class, runner, kernels, or why it is refused."""
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    from mixedprec_plugin.methods.interface import Target
    from mixedprec_plugin.serving.config import MixedPrecisionConfig
    from tests.dryrun.experts import write
    from tests.presets import plan

    checkpoint = write(folder / "experts", 512)
    found = {"SGLang": _run(lambda: Fp8Config(True, "dynamic", weight_block_size=[128, 128]))}
    for method in ("fp8_block", "fp8", "awq"):
        rule, target = f'match: "*", method: {method}', Target("cuda", 1, "BF16")
        made = plan(checkpoint, rule, target=target).check()
        found[method] = _run(lambda made=made: MixedPrecisionConfig(made))
    return found


def _run(make_config: Any) -> dict[str, Any]:
    from mixedprec_plugin.errors import LoadError
    from mixedprec_plugin.experts.deepep import settle_deepep
    from tests.dryrun.fake_device import fake_card
    from tests.dryrun.journal import JOURNAL
    from tests.dryrun.rank import rank

    try:
        with rank(1), fake_card(), _deepep():
            model = _build(make_config())
            is_sglangs = model.layer.deprecate_flag
            settle_deepep(model)
            layer = model.layer
            layer.quant_method.process_weights_after_loading(layer)
            JOURNAL.take_kernels()
            _forward(layer)
            assert not JOURNAL.made_up, JOURNAL.made_up
            return {
                "class": type(layer.quant_method).__name__,
                "by_itself": is_sglangs,
                "runner": layer.quant_method.runner.runner_backend.value,
                "dispatched": repr(layer.dispatcher._inners[0].quant_config),
                "kernels": JOURNAL.take_kernels(),
            }
    except LoadError as error:
        return {"refused": str(error)}
    # whatever SGLang raises is the result
    except Exception:  # noqa: BLE001
        return {"broken": traceback.format_exc()}


@contextlib.contextmanager
def _deepep() -> Iterator[None]:
    from sglang.srt.layers.moe.utils import MoeA2ABackend
    from sglang.srt.runtime_context import get_flags

    moe = get_flags().moe
    before, moe.a2a_backend = moe.a2a_backend, MoeA2ABackend.DEEPEP
    try:
        yield
    finally:
        moe.a2a_backend = before


def _build(config: Any) -> Any:
    import torch
    from sglang.srt.layers.moe.ep_moe.layer import get_moe_impl_class

    from tests.dryrun.experts import HIDDEN, MODULE, NUM_EXPERTS, TOP_K

    model = torch.nn.Module()
    model.layer = get_moe_impl_class(config)(
        num_experts=NUM_EXPERTS, hidden_size=HIDDEN, intermediate_size=512, layer_id=0,
        top_k=TOP_K, quant_config=config, prefix=MODULE, params_dtype=torch.bfloat16,
    )  # fmt: skip
    return model


def _forward(layer: Any) -> None:
    """Run the experts on what DeepEP would hand to this rank: 8 tokens an expert, in FP8.

    Pinned memory needs a driver: how many tokens each expert got is there without it.
    """
    import torch
    from sglang.srt.layers.moe.moe_runner import deep_gemm
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPNormalDispatchOutput

    from tests.dryrun.experts import HIDDEN, NUM_EXPERTS, TOP_K

    tokens = 8 * NUM_EXPERTS
    received = DeepEPNormalDispatchOutput(
        torch.empty(tokens, HIDDEN, dtype=torch.float8_e4m3fn),
        torch.empty(tokens, HIDDEN // 128, dtype=torch.float32),
        torch.zeros(tokens, TOP_K, dtype=torch.int64),
        torch.empty(tokens, TOP_K, dtype=torch.float32),
        [128] * NUM_EXPERTS,
    )
    without_pins = mock.Mock(forbid_copy_engine_usage=True)
    counts = torch.empty(NUM_EXPERTS, dtype=torch.int32)
    with (
        mock.patch.object(deep_gemm, "get_offloader", return_value=without_pins),
        mock.patch.object(deep_gemm, "copy_list_to_gpu_no_ce", return_value=counts),
    ):
        made = layer.run_moe_core(received)
    assert tuple(made.hidden_states.shape) == (tokens, HIDDEN), made


if __name__ == "__main__":
    run_on_card(run_all)
