"""One method in one layer kind: planned, built, loaded, processed, run."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.serving.config import MixedPrecisionConfig
from mixedprec_plugin.serving.filling import load_weights
from mixedprec_plugin.serving.late import check_built
from tests.dryrun.cards import Card
from tests.dryrun.fake_device import fake_card
from tests.dryrun.foretold import foretell
from tests.dryrun.journal import JOURNAL, outcome
from tests.dryrun.layers import KINDS, Kind
from tests.dryrun.methods import Method
from tests.dryrun.rank import OneStage, rank
from tests.presets import plan

_DTYPES = {"bfloat16": (torch.bfloat16, "BF16"), "float16": (torch.float16, "F16")}


@dataclasses.dataclass
class Cell:
    """What became of a method in a layer kind on a card.

    Attributes:
        runs_as: class of the quantization method, and of its scheme where it has one.
        kernels: what a forward launches, in order.
        parameters: name -> dtype and shape as loaded, before SGLang repacks them.
        refused: our own error, if the cell is refused.
        foretold: what the rules say of it, without SGLang.
        broken: what went wrong otherwise; empty in every good cell.
        made_up: operations whose data a dry run has not got.
        again: what becomes of new weights, see again.py.
    """

    method: str
    kind: str
    tp_size: int
    dtype: str
    runs_as: str = ""
    kernels: list[str] = dataclasses.field(default_factory=list)
    parameters: dict[str, str] = dataclasses.field(default_factory=dict)
    refused: str = ""
    foretold: list[str] = dataclasses.field(default_factory=list)
    broken: str = ""
    made_up: list[str] = dataclasses.field(default_factory=list)
    again: str = ""


class OneLayer(torch.nn.Module):
    """A model of one layer; everything goes through the plugin's own placement."""

    def __init__(self, kind: Kind, config: MixedPrecisionConfig) -> None:
        super().__init__()
        self.add_module("layer", kind.build(config, kind.module))

    def load_weights(self, weights: Any) -> None:
        """Load what the plugin leaves to the model: lm_head."""
        for name, tensor in weights:
            parameter = getattr(self.layer, name.rpartition(".")[2])
            parameter.weight_loader(parameter, tensor)


def run_cell(
    card: Card, method: Method, kind_name: str, tp_size: int, checkpoint: Path, dtype: str = ""
) -> Cell:
    """Take a cell as far as it goes.

    Args:
        dtype: what the model runs in; what SGLang would choose on the card if it is empty.
    """
    cell = Cell(method.title, kind_name, tp_size, dtype or card.dtype)
    cell.foretold = foretell(card, method, KINDS[kind_name], tp_size, cell.dtype)
    with outcome(partial(setattr, cell)):
        _run(cell, KINDS[kind_name], method, checkpoint)
    return cell


def _run(cell: Cell, kind: Kind, method: Method, checkpoint: Path) -> None:
    from tests.dryrun import again

    torch_dtype, name = _DTYPES[cell.dtype]
    target = Target("cuda", cell.tp_size, name)
    made = plan(checkpoint, f'match: "{kind.pattern}", {method.rule}', target=target).check()
    config = MixedPrecisionConfig(made)
    torch.set_default_dtype(torch_dtype)
    with rank(cell.tp_size), fake_card():
        model = OneLayer(kind, config)
        check_built(config.plan, config.built, OneStage())
        amounts: dict[str, int] = {}
        load_weights(model, config, _count(VirtualCheckpoint(made), amounts))
        if cell.tp_size == 1:
            _check_amounts(model.layer, amounts)
        cell.parameters = describe_parameters(model.layer)
        check_filled(model)
        quant_method: Any = model.layer.quant_method
        quant_method.process_weights_after_loading(model.layer)
        cell.runs_as = class_name(model.layer)
        JOURNAL.take_kernels()
        inputs = kind.inputs(cell.tp_size, torch_dtype)
        output = forward(model.layer, inputs)
        cell.kernels = JOURNAL.take_kernels()
        cell.made_up = sorted(set(JOURNAL.made_up))
        _check_output(output, kind, cell.tp_size, torch_dtype)
        cell.again = again.load_again(model, config)


def _count(
    weights: Iterable[tuple[str, torch.Tensor]], amounts: dict[str, int]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        suffix = name.rpartition(".")[2]
        amounts[suffix] = amounts.get(suffix, 0) + tensor.numel()
        yield name, tensor


def _check_amounts(layer: torch.nn.Module, amounts: dict[str, int]) -> None:
    """Assert that one rank holds as much as was stored: loaders pad with zeros, and cut."""
    for name, parameter in layer.named_parameters():
        # all shards of a fused module have the same group index
        given = parameter.numel() if name == "g_idx" else amounts[name]
        assert given == parameter.numel(), f"{name}: {given} elements for {parameter.numel()}"


def forward(layer: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Run a layer on one rank's inputs."""
    method: Any = layer.quant_method
    with nothing_of_ours():
        if type(layer).__name__ == "ParallelLMHead":
            output = method.apply(layer, inputs)
        else:
            output = layer(inputs)[0]
    result: torch.Tensor = output
    return result


@contextlib.contextmanager
def nothing_of_ours() -> Iterator[None]:
    """Assert that no Python function of the plugin is called meanwhile."""
    names: set[str] = set()

    def profile(frame: FrameType, event: str, _argument: Any) -> None:
        if event == "call":
            names.add(str(frame.f_globals.get("__name__", "")))

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)
    assert any(name.startswith("sglang.srt.layers.") for name in names), names
    ours = sorted(name for name in names if name.startswith("mixedprec_plugin"))
    assert not ours, f"a forward calls into {ours}"


def class_name(layer: torch.nn.Module) -> str:
    """The quantization method's class, with the scheme that it works by."""
    method = type(layer.quant_method)
    assert method.__module__.startswith("sglang."), method
    scheme = getattr(layer, "scheme", None)
    return method.__name__ if scheme is None else f"{method.__name__}/{type(scheme).__name__}"


def describe_parameters(module: torch.nn.Module) -> dict[str, str]:
    """Name -> "dtype [shape]"."""
    return {
        name: f"{str(parameter.dtype).removeprefix('torch.')} {list(parameter.shape)}"
        for name, parameter in module.named_parameters()
    }


def check_filled(model: torch.nn.Module, *cast: str) -> None:
    """Assert that what was written into each parameter is all of it, and of its dtype and shape.

    Args:
        cast: ends of the names of parameters whose dtype on the way does not matter.
    """
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            continue
        storage = parameter.data.untyped_storage()._cdata
        misfits = JOURNAL.misfits.get(storage)
        assert storage in JOURNAL.written, f"{name}: nothing was written"
        elements, _ = JOURNAL.written[storage]
        assert elements.all(), f"{name}: {elements.sum()} of {elements.size} elements written"
        if not name.endswith(cast):
            assert not misfits, f"{name}: {misfits}"


def _check_output(output: torch.Tensor, kind: Kind, tp_size: int, dtype: torch.dtype) -> None:
    N = kind.num_outputs(tp_size)
    assert (output.shape[-1], output.dtype) == (N, dtype), (output.shape, output.dtype)
