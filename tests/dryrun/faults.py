"""Deliberate faults, one in each cell: the dry run must not call any of them good.

python -m tests.dryrun.faults A100 FOLDER
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tests.dryrun.cards import Card
from tests.dryrun.methods import METHODS
from tests.dryrun.process import run_on_card

Change = Callable[[str, Any], Any]


def run_all(card: Card, shared: Path) -> dict[str, Any]:
    """Run every fault; what became of its cell."""
    import torch

    from mixedprec_plugin.methods import construct
    from tests.dryrun import cells, stock
    from tests.dryrun.layers import KINDS

    methods = {method.title: method for method in METHODS}

    def run(method: str, kind: str = "column") -> dict[str, Any]:
        checkpoint = KINDS[kind].write(shared / "faults" / kind)
        return dataclasses.asdict(cells.run_cell(card, methods[method], kind, 1, checkpoint))

    def stream(method: str, change: Change, kind: str = "column") -> dict[str, Any]:
        stock = cells.VirtualCheckpoint

        def changed(plan: Any) -> Iterator[tuple[str, Any]]:
            for name, tensor in stock(plan):
                other = change(name, tensor)
                if other is not None:
                    yield name, other

        with mock.patch.object(cells, "VirtualCheckpoint", changed):
            return run(method, kind)

    def spec(method: str, **changes: Any) -> dict[str, Any]:
        name = "gptq" if method.startswith("gptq") else method
        changed = dataclasses.replace(construct.METHODS[name], **changes)
        with mock.patch.object(construct, "METHODS", {**construct.METHODS, name: changed}):
            return run(method)

    def scales(change: Callable[[Any], Any]) -> Change:
        return lambda name, tensor: change(tensor) if "scale" in name else tensor

    gptq = construct.METHODS["gptq"]
    results: dict[str, Any] = {
        "scales dropped": stream("awq", scales(lambda _: None)),
        "one shard's scales dropped": stream(
            "gptq_int4", lambda n, t: None if n == "block.k_proj.scales" else t, "qkv"
        ),
        "scales transposed": stream("fp8_block", scales(torch.t)),
        "scales in another dtype": stream("blockwise_int8", scales(torch.Tensor.bfloat16)),
        "codes in another dtype": stream(
            "fp8", lambda n, t: t.bfloat16() if n.endswith("weight") else t
        ),
        "a row too few": stream("awq", lambda n, t: t[:-1] if n.endswith("qweight") else t, "row"),
        "a forward through Python of ours": _own_forward(run),
        "wrong config class": spec(
            "gptq_int4",
            config_classes={"cuda": "sglang.srt.layers.quantization.awq.awq:AWQMarlinConfig"},
        ),
        "config class for the CPU": spec(
            "gptq_int4", config_classes={"cuda": gptq.config_classes["cpu"]}
        ),
        "constructor argument renamed": spec(
            "gptq_int4",
            config_arguments=lambda a, p: {
                "num_bits" if k == "weight_bits" else k: v
                for k, v in gptq.config_arguments(a, p).items()
            },
        ),
        "Triton kernel without instructions on the card": {"broken": _compile_fp8_matmul()},
        "no fault": run("gptq_int4"),
        "stock": stock.run(),
    }
    return results


def _own_forward(run: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """SGLang's unquantized method, calling a function of the package in its forward."""
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    from mixedprec_plugin import names

    stock = UnquantizedLinearMethod.apply

    def apply(self: Any, layer: Any, x: Any, bias: Any = None) -> Any:
        names.nearest("q_proj", ["k_proj"])
        return stock(self, layer, x, bias)

    with mock.patch.object(UnquantizedLinearMethod, "apply", apply):
        return run("unquantized")


def _compile_fp8_matmul() -> str:
    """Launch SGLang's block FP8 matmul in Triton, and return why it does not compile."""
    import torch
    from sglang.kernels.ops.gemm.fp8_kernel import w8a8_block_fp8_matmul_triton

    from tests.dryrun.fake_device import fake_card

    with fake_card():
        a = torch.empty(5, 1024, dtype=torch.float8_e4m3fn)
        b = torch.empty(1024, 1024, dtype=torch.float8_e4m3fn)
        try:
            w8a8_block_fp8_matmul_triton(
                a, b, torch.empty(5, 8), torch.empty(8, 8), [128, 128], torch.bfloat16
            )
        # whatever Triton raises is the result
        except Exception:  # noqa: BLE001
            return traceback.format_exc()
    return ""


if __name__ == "__main__":
    run_on_card(run_all)
