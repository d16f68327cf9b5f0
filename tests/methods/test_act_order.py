"""Act order goes with groups: Marlin refuses to order one group."""

from __future__ import annotations

import pytest

from mixedprec_plugin.methods import gptq
from mixedprec_plugin.methods.interface import LayerShape, Target
from mixedprec_plugin.methods.registry import bind


@pytest.mark.parametrize(
    ("group_size", "desc_act", "expected"),
    [(128, True, True), (-1, True, False), (128, False, False), (128, None, False)],
)
def test_one_group_a_column_has_no_order(
    group_size: int, desc_act: bool | None, expected: bool
) -> None:
    _, arguments = bind("gptq", {"group_size": group_size, "desc_act": desc_act})
    keywords = gptq.config_arguments(arguments, "cuda")
    assert keywords["desc_act"] is expected
    assert keywords["full_config"]["desc_act"] is expected


def test_order_within_one_group_is_refused_on_cuda() -> None:
    _, arguments = bind("gptq", {"group_size": 128, "desc_act": True})
    shape = LayerShape(N=256, K=128, shard_sizes=(256,), parallel="column")
    (found,) = gptq.faults(arguments, shape, Target())
    assert found.text == "act order needs more than one group along K = 128"
    assert not gptq.faults(arguments, shape, Target("cpu"))
