"""Where a start quantizes, and what it keeps of layers that are made when they are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.compose.lazy import LazyTensor
from mixedprec_plugin.compose.on_device import DeviceRounding
from mixedprec_plugin.compose.parts import compose_parts
from mixedprec_plugin.compose.stream import round_to_nearest
from mixedprec_plugin.methods.interface import Device, Target
from mixedprec_plugin.serving.settings import Settings
from tests.checkpoints import write_llama
from tests.presets import plan

# of SGLang's imports
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(
    ("device", "asked", "is_there"),
    [
        ("cuda", "", False),
        ("cuda", "device", True),
        ("cuda", "cpu", False),
        ("cpu", "device", False),
    ],
)
def test_weights_are_quantized_on_the_cpu_unless_the_option_says_otherwise(
    tmp_path: Path, device: Device, asked: str, is_there: bool
) -> None:
    from mixedprec_plugin.serving.loader import rounding_for

    made = plan(write_llama(tmp_path / "model"), "match: '*', method: fp8", target=Target(device))
    rounding = rounding_for(made, Settings(quantize_on=asked))
    if is_there:
        assert isinstance(rounding, DeviceRounding)
        assert rounding.device == torch.device("cuda")
    else:
        assert rounding is round_to_nearest


def test_of_a_shard_the_order_of_its_groups_is_kept_and_no_more(tmp_path: Path) -> None:
    from mixedprec_plugin.serving.placement import Orders, check_act_order

    made = plan(write_llama(tmp_path / "model"), "match: '*', method: gptq, group_size: 32")
    layer, orders = made.by_name["model.layers.0.self_attn.q_proj"], Orders()
    with Reader() as reader:
        order = compose_parts(layer, made.target, reader)["g_idx"]
        assert isinstance(order, LazyTensor)
        check_act_order(orders, layer, order)
    ((_, kept),) = orders.values()
    assert type(kept) is torch.Tensor
    assert layer.stored is not None
    assert kept.untyped_storage().nbytes() == 4 * layer.stored.K
