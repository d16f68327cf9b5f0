"""The kernel that each method names, against the dry run of SGLang's code in docs/cuda.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixedprec_plugin.methods.cards import find_gpu, served_dtype
from mixedprec_plugin.methods.interface import LayerShape, Target
from mixedprec_plugin.methods.kernels import config_class, kernel
from mixedprec_plugin.methods.registry import METHODS, bind

_DOCS = Path(__file__).resolve().parents[2] / "docs" / "cuda.md"
# how the page's rows are written in a preset
_WRITTEN = {
    "fp8_static": ("fp8", {"activation_scheme": "static"}),
    "gptq_column": ("gptq", {"group_size": -1}),
    "gptq_act_order": ("gptq", {"desc_act": True}),
}
# the page's layers, as its text says: [N, K] of the shards, and how ranks split them
_LAYERS = {
    "column": ((2048,), 1024, "column"), "merged": ((2048, 2048), 1024, "column"),
    "row": ((1024,), 2048, "row"), "replicated": ((256,), 1024, "replicated"),
    "narrow": ((256,), 1024, "column"), "ragged": ((1056,), 1024, "column"),
    "experts": ((1024, 1024), 512, "column"), "narrow_experts": ((512, 512), 512, "column"),
}  # fmt: skip


def _cells() -> Iterator[tuple[str, str, int, str, str]]:
    """Method, layer, ranks, card and kernel of each cell that runs."""
    cards: list[str] = []
    for line in _DOCS.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "method":
            cards = [cell.rpartition(" (")[0] for cell in cells[2:]]
        elif len(cells) == len(cards) + 2 and not cells[0].startswith(("several", "--")):
            for kinds, sizes in re.findall(r"([\w, ]+) \(([\d, ]+)\)", cells[1]):
                for kind in kinds.split(", "):
                    for size in map(int, sizes.split(", ")):
                        for card, runs in zip(cards, cells[2:], strict=True):
                            if kind in _LAYERS and not runs.startswith("refused"):
                                yield cells[0], kind, size, card, runs


def test_every_kernel_is_the_one_that_sglangs_code_reached() -> None:
    seen = 0
    for method, kind, tp_size, card, runs in _cells():
        sizes, K, parallel = _LAYERS[kind]
        gpu = find_gpu(card)
        dtype = served_dtype("BF16", gpu.capability)
        shape = LayerShape(
            sizes[0], K, sizes, parallel, tp_size, dtype, is_expert=kind.endswith("experts")
        )  # type: ignore[arg-type]
        name, arguments = bind(*_WRITTEN.get(method, (method, {})))
        found = kernel(name, arguments, shape, Target(tp_size=tp_size, dtype=dtype, gpu=gpu))
        assert found == runs, (method, kind, tp_size, card)
        seen += 1
    assert seen > 400


@pytest.mark.parametrize("method", sorted(METHODS))
def test_kernel_is_not_named_without_a_card(method: str) -> None:
    shape = LayerShape(256, 256, (256,), "column")
    assert kernel(method, METHODS[method].defaults, shape, Target()) == ""


def test_class_on_an_old_card_is_the_fallback() -> None:
    assert config_class("awq", Target(gpu=find_gpu("T4"))).endswith(":AWQConfig")
    assert config_class("awq", Target(gpu=find_gpu("H100"))).endswith(":AWQMarlinConfig")
