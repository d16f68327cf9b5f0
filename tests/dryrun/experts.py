"""Layers of experts, each method alone and several in one layer: planned, built, loaded, run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tests.dryrun.cards import Card
from tests.dryrun.journal import JOURNAL, outcome
from tests.dryrun.methods import TP_SIZES

MODULE = "block.mlp.experts"
NUM_EXPERTS, HIDDEN, TOP_K, NUM_TOKENS = 4, 512, 2, 5
# kind -> inner features, of which a rank has its share
KINDS: Mapping[str, int] = {"experts": 1024, "narrow_experts": 512}
# title -> what a preset says; of several rules the last that matches decides
RULES: Mapping[str, tuple[str, ...]] = {
    "unquantized": ('match: "*", method: unquantized',),
    "fp8": ('match: "*", method: fp8',),
    "fp8_block": ('match: "*", method: fp8_block',),
    "fp8_channel": ('match: "*", method: fp8_channel',),
    "blockwise_int8": ('match: "*", method: blockwise_int8',),
    "int8_channel": ('match: "*", method: int8_channel',),
    "awq": ('match: "*", method: awq',),
    "gptq_int4": ('match: "*", method: gptq_int4',),
    "gptq_int8": ('match: "*", method: gptq_int8',),
    "gptq_column": ('match: "*", method: gptq_int4, group_size: -1',),
    "nvfp4": ('match: "*", method: nvfp4',),
    "mxfp4": ('match: "*", method: mxfp4',),
    "several, in FP4": (
        'match: "*", method: nvfp4',
        'match: "*.experts.{1..2}.*", method: mxfp4',
    ),
    "several": (
        'match: "*", method: unquantized',
        'match: "*.experts.1.*", method: blockwise_int8',
        'match: "*.experts.2.*", method: awq',
        'match: "*.experts.3.*", method: gptq_int8',
    ),
    "several, with FP8": (
        'match: "*", method: gptq_int4',
        'match: "*.experts.1.*", method: fp8',
        'match: "*.experts.2.*", method: fp8_block',
        'match: "*.experts.3.*", method: fp8_channel',
    ),
}


@dataclasses.dataclass
class ExpertsCell:
    """What became of a layer of experts on a card.

    Attributes:
        runs_as: class of the quantization method; of a composite, of each group's.
        kernels: what a forward launches, in order, each once.
        parameters: name -> dtype and shape as loaded.
        foretold: why the plan refuses it where the GPU is known.
        refused: why it is refused where the plan knows no GPU.
        broken: what went wrong otherwise.
        again: what becomes of new weights, see again.py.
    """

    method: str
    kind: str
    tp_size: int
    dtype: str
    runs_as: list[str] = dataclasses.field(default_factory=list)
    kernels: list[str] = dataclasses.field(default_factory=list)
    parameters: dict[str, str] = dataclasses.field(default_factory=dict)
    foretold: list[str] = dataclasses.field(default_factory=list)
    refused: str = ""
    broken: str = ""
    made_up: list[str] = dataclasses.field(default_factory=list)
    again: str = ""


def run_all(card: Card, folder: Path) -> list[ExpertsCell]:
    """Run every cell of a card."""
    cells = []
    for kind, inner in KINDS.items():
        checkpoint = write(folder / kind, inner)
        cells += [
            run(card, method, kind, tp_size, checkpoint) for method in RULES for tp_size in TP_SIZES
        ]
    return cells


def write(folder: Path, inner: int) -> Path:
    """Write a bf16 checkpoint of one layer of experts."""
    import torch

    from tests.checkpoints import write_checkpoint

    torch.manual_seed(0)
    tensors = {}
    for expert in range(NUM_EXPERTS):
        for name, (N, K) in {
            "gate": (inner, HIDDEN), "up": (inner, HIDDEN), "down": (HIDDEN, inner)
        }.items():  # fmt: skip
            weight = torch.randn(N, K) * K**-0.5
            tensors[f"{MODULE}.{expert}.{name}_proj.weight"] = weight.bfloat16()
    return write_checkpoint(folder, {"model_type": "one", "torch_dtype": "bfloat16"}, tensors)


def run(card: Card, method: str, kind: str, tp_size: int, checkpoint: Path) -> ExpertsCell:
    """Take a cell as far as it goes."""
    from mixedprec_plugin.methods.cards import find_gpu
    from mixedprec_plugin.methods.interface import Target
    from tests.presets import plan

    cell = ExpertsCell(method, kind, tp_size, card.dtype)
    target = Target("cuda", tp_size, {"bfloat16": "BF16", "float16": "F16"}[card.dtype])
    known = dataclasses.replace(target, gpu=find_gpu(card.title))
    cell.foretold = [
        problem.what for problem in plan(checkpoint, *RULES[method], target=known).errors
    ]
    with outcome(partial(setattr, cell)):
        _run(cell, plan(checkpoint, *RULES[method], target=target).check())
    return cell


def _run(cell: ExpertsCell, made: Any) -> None:
    import torch

    from mixedprec_plugin.compose.stream import VirtualCheckpoint
    from mixedprec_plugin.serving.config import MixedPrecisionConfig
    from mixedprec_plugin.serving.filling import load_weights
    from mixedprec_plugin.serving.late import check_built
    from tests.dryrun.again import load_again
    from tests.dryrun.cells import check_filled, describe_parameters
    from tests.dryrun.fake_device import fake_card
    from tests.dryrun.rank import OneStage, rank

    config = MixedPrecisionConfig(made)
    dtype = getattr(torch, cell.dtype)
    torch.set_default_dtype(dtype)
    with rank(cell.tp_size), fake_card():
        model = build(config, KINDS[cell.kind])
        check_built(config.plan, config.built, OneStage())
        load_weights(model, config, VirtualCheckpoint(made))
        cell.parameters = describe_parameters(model)
        # GPTQ's are of the model's dtype, and no kernel is given them: gptq_kernels.py, gptq_moe.py
        cast = ["qzeros"] if "gptq" in str(RULES[cell.method]) else []
        check_filled(model, *cast)
        for module in model.modules():
            method = getattr(module, "quant_method", None)
            if method is not None:
                method.process_weights_after_loading(module)
        cell.runs_as = class_names(model.layer)
        JOURNAL.take_kernels()
        output = forward(model.layer, dtype)
        cell.kernels = JOURNAL.take_kernels()
        cell.made_up = sorted(set(JOURNAL.made_up))
        assert (tuple(output.shape), output.dtype) == ((NUM_TOKENS, HIDDEN), dtype), output
        cell.again = load_again(model, config, *cast)


def build(config: Any, inner: int) -> Any:
    """A model of one layer of experts."""
    import torch
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = FusedMoE(
                num_experts=NUM_EXPERTS,
                hidden_size=HIDDEN,
                intermediate_size=inner,
                layer_id=0,
                top_k=TOP_K,
                quant_config=config,
                prefix=MODULE,
                reduce_results=True,
            )

        def load_weights(self, weights: Any) -> None:
            assert not list(weights)

    return Model()


def forward(layer: Any, dtype: Any) -> Any:
    """Run the layer on fake hidden states and fake choices of experts."""
    import contextlib

    import torch
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    from tests.dryrun.cells import nothing_of_ours

    weights = torch.empty(NUM_TOKENS, TOP_K, dtype=torch.float32)
    ids = torch.zeros(NUM_TOKENS, TOP_K, dtype=torch.int32)
    logits = torch.empty(NUM_TOKENS, NUM_EXPERTS, dtype=torch.float32)
    is_composite = type(layer.quant_method).__name__ == "CompositeMoEMethod"
    with contextlib.nullcontext() if is_composite else nothing_of_ours():
        return layer(
            torch.empty(NUM_TOKENS, HIDDEN, dtype=dtype), StandardTopKOutput(weights, ids, logits)
        )


def class_names(layer: Any) -> list[str]:
    """The classes of SGLang's methods, with their schemes."""
    children = getattr(layer, "expert_groups", None) or [layer]
    names = []
    for child in children:
        method, scheme = type(child.quant_method), getattr(child, "scheme", None)
        assert method.__module__.startswith("sglang."), method
        names.append(f"{method.__name__}/{type(scheme).__name__}" if scheme else method.__name__)
    return names
