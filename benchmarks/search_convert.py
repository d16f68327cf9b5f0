"""Several presets of one model, calibrated in one sweep over it.

`mixedprec convert` would write the text and run the model once for each of them; here a decoder
layer is rounded for all of them as it passes. What is written is the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mixedprec_plugin.calibrate.calibrator import Calibration, Options
from mixedprec_plugin.calibrate.capture import Seen
from mixedprec_plugin.calibrate.network import Network
from mixedprec_plugin.calibrate.rounding import LayerRounding
from mixedprec_plugin.calibrate.sweep import Sweep, rounded_paths, save_whole
from mixedprec_plugin.calibrate.text import num_held_out, write_text
from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.compose.stream import Tensors
from mixedprec_plugin.convert.converter import convert
from mixedprec_plugin.convert.form import MixedForm
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.model import Plan, PlannedLayer
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.preset.load import load_preset

_PART_BYTES = 5 * 10**9


class _Rounded(Calibration):
    """What the sweep rounded for one preset."""

    def __init__(self, plan: Plan, options: Options, folder: Path) -> None:
        super().__init__(plan, options, Progress(disable=True), everything=False)
        self._rounded = folder

    def prepare(self, folder: Path) -> None:
        """Find it, wherever the conversion keeps its work."""
        del folder
        super().prepare(self._rounded)


class _RoundsForAll:
    """Rounds a decoder layer for each plan; see `calibrate.sweep.Rounding`."""

    def __init__(self, plans: Mapping[str, Plan], rounding: LayerRounding, work: Path) -> None:
        self._plans, self._rounding, self._work = plans, rounding, work

    def __call__(
        self, layers: Sequence[PlannedLayer], seen: dict[str, Seen], _num_held: int
    ) -> Iterator[tuple[PlannedLayer, Tensors, dict[str, Any]]]:
        tensors: dict[str, Tensors] = {name: {} for name in self._plans}
        records: dict[str, list[dict[str, Any]]] = {name: [] for name in self._plans}
        for layer, moments in self._rounding.moments(layers, seen):
            made: dict[object, tuple[Tensors, Any, dict[str, Any]]] = {}
            for name, plan in self._plans.items():
                planned = plan.by_name[layer.name]
                if planned.asks_for_calibration:
                    assert planned.scheme is not None
                    key = planned.scheme.identity
                    if key not in made:
                        made[key] = self._rounding.round(planned, moments)
                    own, _, record = made[key]
                    # files share no memory
                    tensors[name] |= {f"{layer.name}.{k}": t.clone() for k, t in own.items()}
                    records[name].append({"layer": layer.name, "loss": None, **record})
            yield layer, {}, {"loss": 0.0}
        (index,) = {int(layer.name.split(".")[2]) for layer in layers}
        for name in self._plans:
            (path,) = rounded_paths(self._work / name, index, 1)
            save_whole(tensors[name], path, {"records": json.dumps(records[name])})


def convert_all(
    model: Path, presets: Mapping[str, Path], work: Path, options: Options,
    say: Callable[[str], None],
) -> dict[str, Path]:  # fmt: skip
    """Write the model in each preset, calibrated; what was stopped goes on.

    Args:
        presets: name -> file.
        work: where the sweep and the models are kept.
    Returns:
        name -> folder.
    """
    source, target = open_source(model), Target("cpu")
    plans = {
        name: resolve_plan(load_preset(path), source, target).check()
        for name, path in presets.items()
    }
    missing = {name: plan for name, plan in plans.items() if not (work / f"model-{name}").exists()}
    if missing:
        _sweep(missing, work, options, say)
    for name, plan in missing.items():
        own = _Rounded(plan, options, work / name)
        convert(plan, MixedForm(), work / f"model-{name}", _PART_BYTES, calibration=own)
        say(f"wrote {name}")
    return {name: work / f"model-{name}" for name in presets}


def _sweep(
    plans: Mapping[str, Plan], work: Path, options: Options, say: Callable[[str], None]
) -> None:
    for name in plans:
        (work / name).mkdir(parents=True, exist_ok=True)
    device, plan = torch.device("cpu"), next(iter(plans.values()))
    with Reader() as reader:
        network = Network(plan, reader, device)
        path = work / "text.safetensors"
        if not path.exists():
            tokenizer = AutoTokenizer.from_pretrained(plan.source.path)
            made = write_text(network, tokenizer, options.all_windows, options.length, options.seed)
            save_whole({"tokens": made}, path)
        names = {x.name for p in plans.values() for x in p.layers if x.asks_for_calibration}
        rounding = _RoundsForAll(plans, LayerRounding(plan.target, reader, device), work)
        tokens = load_file(path)["tokens"]
        Sweep(network, tokens, work, options.seed, held_out=num_held_out(len(tokens))).run(
            names, rounding, lambda _: say("a decoder layer")
        )
