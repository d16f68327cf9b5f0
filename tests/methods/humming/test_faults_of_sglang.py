"""Faults of SGLang's that `methods.humming` goes around: when one is gone, so is the way round."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.sglang, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def no_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUMMING_DISABLE_PARALLEL_BUILD", "1")


def test_sglang_quantizes_at_load_by_an_argument_that_is_not_there() -> None:
    from humming.utils.weight import quantize_weight
    from sglang.srt.layers.quantization.humming import HummingLinearMethod

    called = inspect.getsource(HummingLinearMethod.prepare_weight_loader)
    assert "has_global_scale=has_global_scale" in called
    assert "has_global_scale" not in inspect.signature(quantize_weight).parameters


def layer_of(linear: Any, kind: str, rank: int, *, is_left: bool = False) -> Any:
    """As much of a layer as its bias depends on."""
    cls = getattr(linear, kind)
    layer = cls.__new__(cls)
    torch.nn.Module.__init__(layer)
    layer.with_bias, layer.skip_bias_add = True, is_left
    layer.tp_group = SimpleNamespace(rank_in_group=rank, world_size=2)
    return layer


@pytest.mark.parametrize(
    ("kind", "rank", "is_left", "is_added"),
    [
        ("RowParallelLinear", 0, False, True),
        ("RowParallelLinear", 1, False, False),
        ("RowParallelLinear", 0, True, False),
        # each has outputs of its own
        ("ColumnParallelLinear", 1, False, True),
        ("ColumnParallelLinear", 1, True, False),
    ],
)
def test_a_bias_is_added_once(
    kind: str, rank: int, is_left: bool, is_added: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where `RowParallelLinear.forward` would hand it to the method (layers/linear.py:1762)."""
    from sglang.srt.layers import linear
    from sglang.srt.layers.quantization.humming import HummingConfig, HummingLinearMethod

    from mixedprec_plugin.methods.humming.sglang import repaired

    taken = []
    monkeypatch.setattr(
        HummingLinearMethod,
        "process_weights_after_loading",
        lambda _method, layer: taken.append(layer.with_bias),
    )
    # the kernel adds it wherever the layer has one, whatever `apply` is given
    assert "bias=" not in inspect.getsource(HummingLinearMethod.apply)
    said = {"quant_method": "humming", "b_dtype": "uint3", "weight_scale_group_size": 64}
    for config in (HummingConfig(said), repaired(HummingConfig(said))):
        layer = layer_of(linear, kind, rank, is_left=is_left)
        method = config.get_quant_method(layer, "layer")
        assert type(method) is HummingLinearMethod
        method.process_weights_after_loading(layer)
    assert taken == [True, is_added]
