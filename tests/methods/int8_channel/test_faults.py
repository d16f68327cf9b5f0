"""What SGLang's INT8 matmul refuses of a layer, by its source; see `faults`."""

from __future__ import annotations

from functools import partial

import pytest

from mixedprec_plugin.methods.interface import LayerShape
from tests.methods import shapes
from tests.methods.shapes import linear

BF16, F16 = "BF16", "F16"
texts = partial(shapes.texts, "int8_channel")


@pytest.mark.parametrize(
    ("gpu", "message"),
    [
        ("RTX 2080 Ti", "int8_channel does not run on this GPU, whose compute capability is 7.5"),
        ("A100", ""),
        ("RTX 3090", ""),
        ("RTX 4090", ""),
        ("H100", ""),
        ("B200", "has no kernel for this GPU, whose compute capability is 10.0 (expected 8.0 to"),
        ("RTX 5090", "has no kernel for this GPU, whose compute capability is 12.0"),
    ],
)
def test_gpus_that_the_matmul_has_code_for(gpu: str, message: str) -> None:
    found = texts(linear(256, 256), gpu)
    assert len(found) == bool(message)
    assert all(message in text for text in found)


def test_experts_run_in_tritons_kernel_on_newer_gpus_too() -> None:
    shape = linear(250, 250, is_expert=True)
    assert texts(shape, "B200") == texts(shape, "RTX 5090") == texts(shape, "A100") == []
    assert "does not run on this GPU" in texts(shape, "RTX 2080 Ti")[0]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (linear(8, 16), ""),
        (linear(576, 1536), ""),
        (linear(12, 64), "N = 12 is not a multiple of 8, which INT8 matmuls need"),
        (linear(64, 24), "K = 24 is not a multiple of 16"),
        # the shards of a fused module are one matrix, and so is a rank's part
        (linear(12, 64, shard_sizes=(12, 4)), ""),
        (linear(24, 64, shard_sizes=(24,), tp_size=2), "N = 12 per rank is not a multiple of 8"),
        (linear(64, 48, parallel="row", tp_size=2), "K = 24 per rank is not a multiple of 16"),
    ],
)
def test_widths_are_whole_words_of_a_rank(shape: LayerShape, message: str) -> None:
    found = texts(shape)
    assert len(found) == bool(message)
    assert all(message in text for text in found)
    assert texts(shape, device="cpu") == []
