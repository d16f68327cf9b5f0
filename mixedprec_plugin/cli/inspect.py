"""`mixedprec inspect`: how every layer of a checkpoint is stored; reads headers only."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from mixedprec_plugin.checkpoint.converted import embedded_preset
from mixedprec_plugin.checkpoint.headers import StoredTensor, unreadable
from mixedprec_plugin.checkpoint.source import Source, open_source
from mixedprec_plugin.cli.output import print_json
from mixedprec_plugin.errors import Problem
from mixedprec_plugin.families.names import NEVER_QUANTIZED, Kind, layer_kind
from mixedprec_plugin.families.table import family_of
from mixedprec_plugin.methods import registry
from mixedprec_plugin.methods.recognition import FormatCache
from mixedprec_plugin.methods.stored import StoredFormat
from mixedprec_plugin.names import without_numbers
from mixedprec_plugin.plan.conversion import action_of
from mixedprec_plugin.plan.folding import fold_names, fold_problems, natural_key
from mixedprec_plugin.plan.render import format_bytes
from mixedprec_plugin.plan.tables import Page, Table
from mixedprec_plugin.preset.model import Scheme

EXAMPLES = """
  mixedprec inspect DIR
  mixedprec inspect Qwen/Qwen3-30B-A3B-GPTQ-Int4 --json
"""


@dataclasses.dataclass(frozen=True)
class InspectedLayer:
    """One layer of a checkpoint; `stored` is the format of its weight matrix, if it has one."""

    name: str
    kind: Kind
    stored: StoredFormat | None
    tensors: Mapping[str, StoredTensor]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def num_weights(self) -> int:
        """Elements of the weight matrix; 0 where there is none, or where its size is not known."""
        return self.stored.N * self.stored.K if self.stored else 0

    @property
    def description(self) -> str:
        """How it is stored, for people; without a weight matrix, its dtypes that are not read."""
        return self.stored.description if self.stored else ", ".join(self._unreadable)

    @property
    def _unreadable(self) -> list[str]:
        return unreadable(self.tensors.values())

    @property
    def use(self) -> str:
        """What a plan can do with the layer."""
        if self._unreadable or (self.stored and not self.stored.is_readable):
            return "neither"
        is_quantizable = self.kind not in NEVER_QUANTIZED or self.kind == "lm_head"
        if self.stored is None or self.stored.is_float:
            return f"serve as stored{', quantize' if self.stored and is_quantizable else ''}"
        if not is_quantizable:
            return "dequantize"
        if self.stored.method:
            return f"serve as {self.stored.method}, dequantize"
        others = "".join(f"repack as {method}, " for method in self._repacked_as())
        return f"{others}dequantize"

    def _repacked_as(self) -> list[str]:
        """Methods whose own format holds the same numbers, some arguments given."""
        assert self.stored is not None
        how = {**self.stored.how, **self.stored.facts}
        how["weight_block_size"] = how.get("block")
        how["activation_scheme"] = "static" if "input_scale" in self.tensors else "dynamic"
        how["desc_act"] = bool(self.stored.said.get("desc_act"))
        found = []
        for method, spec in registry.METHODS.items():
            if self.kind != "expert" and not spec.serves_linear:
                continue
            given = {key: how[key] for key in spec.defaults if key in how}
            scheme = Scheme(method, method, {**spec.defaults, **given})
            if action_of(scheme, self.stored, self.tensors, "BF16") == "repack":
                found.append(method)
        return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help="checkpoint folder")


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Print how a checkpoint is stored; 1 where config.json and the tensors disagree."""
    source = open_source(args.model)
    layers = inspect_layers(source)
    problems = disagreements(layers)
    if args.json:
        made = {
            "layers": [_as_dict(layer) for layer in layers],
            "bytes": sum(layer.num_bytes for layer in layers),
            "disagreements": problems,
        }
        print_json(made, out)
        return 1 if problems else 0
    page = Page(out)
    _print(layers, problems, page)
    if embedded_preset(source.quantization_config) is not None:
        page.print("written by mixedprec convert; carries the preset that it was made with")
    if folded := source.folded:
        what = f"{len(folded)} norms and layers are divided for what reads them"
        page.print(f"scales are folded between layers: {what}")
    return 1 if problems else 0


def inspect_layers(source: Source) -> list[InspectedLayer]:
    """Tell the format of every layer, in natural order of their names."""
    family, formats = family_of(source.config), FormatCache()
    layers = []
    for name, tensors in sorted(source.layers.items(), key=lambda item: natural_key(item[0])):
        stored = formats.of(source, name)
        kind = layer_kind(name, stored is not None, family)
        layers.append(InspectedLayer(name, kind, stored, tensors))
    return layers


def disagreements(layers: Sequence[InspectedLayer]) -> list[Problem]:
    """Where config.json and tensors contradict each other, folded by layer range."""
    return fold_problems(
        Problem(layer.name, text, rule="stored-disagreement", severity="warning")
        for layer in layers
        for text in ((*layer.stored.disagreements, layer.stored.obstacle) if layer.stored else ())
        if text
    )


def _as_dict(layer: InspectedLayer) -> dict[str, Any]:
    stored = layer.stored
    return {
        "name": layer.name,
        "kind": layer.kind,
        "stored": layer.description or None,
        "encoding": stored.encoding if stored else None,
        "shape": [stored.N, stored.K] if stored and layer.num_weights else None,
        "bits_per_weight": round(_bits([layer]), 4),
        "bytes": layer.num_bytes,
        "method": (stored.method or None) if stored else None,
        "arguments": dict(stored.arguments) if stored else {},
        "dequantize": bool(stored and stored.codec and stored.is_readable),
        "use": layer.use,
    }


def _bits(layers: Sequence[InspectedLayer]) -> float:
    """Stored bits a weight, scales and zero points counted; 0 without weights."""
    num_weights = sum(layer.num_weights for layer in layers)
    return 8 * sum(layer.num_bytes for layer in layers) / num_weights if num_weights else 0.0


def _print(layers: Sequence[InspectedLayer], problems: Sequence[Problem], page: Page) -> None:
    table = Table(
        ("layers", False), ("stored", False), ("bits", True), ("bytes", True), ("a plan can", False)
    )  # fmt: skip
    # alike but for a number in their names
    groups: dict[tuple[str, str, int, int], list[InspectedLayer]] = {}
    for layer in layers:
        shape = (layer.stored.N, layer.stored.K) if layer.stored else (0, 0)
        key = (without_numbers(layer.name), layer.description, *shape)
        groups.setdefault(key, []).append(layer)
    for alike in groups.values():
        first, bits = alike[0], _bits(alike)
        table.add(
            ", ".join(fold_names(layer.name for layer in alike)),
            first.description,
            f"{bits:.2f}" if bits else "",
            format_bytes(sum(layer.num_bytes for layer in alike)),
            first.use,
        )
    page.print(table)
    page.print()
    total = format_bytes(sum(layer.num_bytes for layer in layers))
    page.print(f"{len(layers)} layers: {total} stored")
    for problem in problems:
        page.print(f"disagreement: {problem}", "yellow")
