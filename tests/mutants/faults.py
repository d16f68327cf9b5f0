"""Deliberate faults in the package, or in SGLang, for a run of the tests that must notice them.

A pytest plugin: MIXEDPREC_TEST_FAULT=NAME MIXEDPREC_TEST_OUTCOMES=OUT.json
python -m pytest -p tests.mutants.faults TESTS. Wherever a fault can be read as it is written, it
is in both: what only makes a round trip does not notice it.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mixedprec_plugin.methods import gptq as gptq_method
from mixedprec_plugin.methods.awq import codec as awq
from mixedprec_plugin.methods.blockwise_int8 import codec as blockwise_int8
from mixedprec_plugin.methods.fp8 import codec as fp8
from mixedprec_plugin.methods.gptq import codec as gptq
from mixedprec_plugin.quantize import packing

Tensors = dict[str, torch.Tensor]
_ONE_EACH = 0x11111111


def _swap(words: torch.Tensor) -> torch.Tensor:
    octets = words.contiguous().view(torch.uint8)
    return ((octets << 4) | (octets >> 4)).view(torch.int32)


def _gptq_nibbles() -> None:
    pack, unpack = packing.pack, packing.unpack
    for module in (packing, gptq):
        module.pack = lambda codes, bits: _swap(pack(codes, bits))  # type: ignore[attr-defined]
        module.unpack = lambda words, bits: unpack(_swap(words), bits)  # type: ignore[attr-defined]


def _awq_nibbles() -> None:
    packing.AWQ_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)


def _change(
    module: Any, write: Callable[[Tensors], Tensors], read: Callable[[Tensors], Tensors]
) -> None:
    """Store what `write` makes of a method's tensors, and read what `read` makes of stored ones."""
    quantize, read_stored = module.quantize, module.read
    module.quantize = lambda *args: write(quantize(*args))
    module.read = lambda tensors, *args: read_stored(read(tensors), *args)


def _shift_zeros(module: Any) -> None:
    _change(
        module,
        lambda stored: {**stored, "qzeros": stored["qzeros"] + _ONE_EACH},
        lambda stored: {**stored, "qzeros": stored["qzeros"] - _ONE_EACH},
    )


def _transpose(scales: torch.Tensor) -> torch.Tensor:
    return scales.t().contiguous().view(scales.shape)


def _undo_transpose(scales: torch.Tensor) -> torch.Tensor:
    rows, columns = scales.shape
    return scales.contiguous().view(columns, rows).t().contiguous()


def _transpose_scales(module: Any, name: str) -> None:
    def with_scales(change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        return lambda stored: (
            {**stored, name: change(stored[name])} if name in stored else dict(stored)
        )

    _change(module, with_scales(_transpose), with_scales(_undo_transpose))


def _drop_scales() -> None:
    """Neither quantized nor expected by the plan."""
    stored, quantize = gptq_method.METHOD.stored, gptq.quantize

    def without(tensors: Mapping[str, Any]) -> dict[str, Any]:
        return {name: tensor for name, tensor in tensors.items() if name != "scales"}

    object.__setattr__(gptq_method.METHOD, "stored", lambda *args: without(stored(*args)))
    gptq.quantize = lambda *args: without(quantize(*args))


def _take_another_class() -> None:
    classes = {
        **gptq_method.METHOD.config_classes,
        "cuda": "sglang.srt.layers.quantization.awq.awq:AWQMarlinConfig",
    }
    object.__setattr__(gptq_method.METHOD, "config_classes", classes)


def _rename_argument() -> None:
    """As a next release of SGLang might."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang.srt.layers.quantization.gptq.gptq import GPTQMarlinConfig
    stock = GPTQMarlinConfig.__init__

    def init(
        self: Any,
        num_bits: int,
        group_size: int,
        desc_act: bool,
        is_sym: bool,
        lm_head_quantized: bool,
        dynamic: dict[str, Any],
        full_config: dict[str, Any],
    ) -> None:
        stock(self, num_bits, group_size, desc_act, is_sym, lm_head_quantized, dynamic, full_config)

    GPTQMarlinConfig.__init__ = init


FAULTS: Mapping[str, Callable[[], None]] = {
    "none": lambda: None,
    "swapped nibbles, GPTQ": _gptq_nibbles,
    "swapped nibbles, AWQ": _awq_nibbles,
    "zero point off by one, GPTQ": lambda: _shift_zeros(gptq),
    "zero point off by one, AWQ": lambda: _shift_zeros(awq),
    "transposed scales, GPTQ": lambda: _transpose_scales(gptq, "scales"),
    "transposed scales, FP8": lambda: _transpose_scales(fp8, "weight_scale_inv"),
    "transposed scales, INT8": lambda: _transpose_scales(blockwise_int8, "weight_scale_inv"),
    "a scale dropped": _drop_scales,
    "a wrong config class": _take_another_class,
    "a constructor argument renamed in SGLang": _rename_argument,
}

_outcomes: dict[str, str] = {}


def pytest_sessionstart() -> None:
    """Put the fault in place before a test is imported."""
    FAULTS[os.environ["MIXEDPREC_TEST_FAULT"]]()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note what became of each test; a failure in its set-up is one, too."""
    if report.when == "call" or report.outcome != "passed":
        _outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    """Hand the outcomes to whoever started this run."""
    Path(os.environ["MIXEDPREC_TEST_OUTCOMES"]).write_text(json.dumps(_outcomes))
