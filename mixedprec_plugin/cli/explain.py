"""`mixedprec explain`: why a layer runs as it does."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, TextIO

from mixedprec_plugin.cli.output import print_json
from mixedprec_plugin.cli.planning import add_planning_arguments, make_plan
from mixedprec_plugin.errors import Problem, UsageError
from mixedprec_plugin.families.names import NEVER_QUANTIZED
from mixedprec_plugin.methods.kernels import config_class
from mixedprec_plugin.names import nearest
from mixedprec_plugin.plan.checks import kernel_of
from mixedprec_plugin.plan.model import Plan, PlannedLayer
from mixedprec_plugin.plan.render import format_bytes
from mixedprec_plugin.plan.tables import Page
from mixedprec_plugin.preset.model import Rule

EXAMPLES = """
  mixedprec explain model.layers.0.self_attn.q_proj --model DIR --preset mine.yaml
  mixedprec explain model.layers.0.mlp.gate_up_proj --model DIR --preset awq --gpu H100
"""
# a number, or a run of some
_RUN = re.compile(r"\d[\d,-]*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "layer", metavar="LAYER", help="a layer's name, or a fused module's for all its parts"
    )
    add_planning_arguments(parser)


def run(args: argparse.Namespace, out: TextIO) -> Sequence[Problem]:
    """Print every rule that matched, which won, and what came of it; return its problems."""
    plan = make_plan(args)
    layers = [x for x in plan.layers if args.layer in (x.name, x.module)]
    if not layers:
        if shared := plan.tied.get(args.layer):
            remedy = f"explain {shared}, or write untie_lm_head: true in the preset"
            raise UsageError(Problem(args.layer, f"shares the weight of {shared}", remedy))
        what = f"the model has no layer {args.layer!r}"
        near = nearest(args.layer, list({*plan.by_name, *plan.modules}))
        remedy = f"did you mean {' or '.join(near)}?" if near else "mixedprec inspect lists them"
        raise UsageError(Problem("", what, remedy, "unknown-layer"))
    matched = plan.matches.matched
    told = []
    for layer in layers:
        rules = [rule for rule in plan.preset.rules if layer.name in matched[rule.index]]
        told.append(_told(plan, layer, rules))
    if args.json:
        print_json({"layers": told}, out)
    else:
        page = Page(out)
        for each in told:
            _print(each, page)
    return [p for p in plan.problems if any(_is_about(p.where, layer) for layer in layers)]


def _is_about(where: str, layer: PlannedLayer) -> bool:
    """Whether a problem's folded names, `model.layers.0-29.mlp.up_proj`, are like the layer's."""
    shapes = {_RUN.sub("#", name) for name in where.split(", ")}
    return not shapes.isdisjoint(_RUN.sub("#", name) for name in (layer.name, layer.module))


def _told(plan: Plan, layer: PlannedLayer, rules: Sequence[Rule]) -> dict[str, Any]:
    scheme = layer.scheme
    return {
        "layer": layer.name,
        "module": layer.module if layer.module != layer.name else None,
        "rules": [
            {
                "where": str(rule.location),
                "match": list(rule.shown),
                "scheme": rule.scheme.label,
                "wins": rule is layer.rule,
            }
            for rule in rules
        ],
        "why": _why(layer),
        "method": layer.method,
        "arguments": dict(scheme.arguments) if scheme else {},
        "source": f"{layer.source} ({plan.sources[layer.source].path})",
        "stored": layer.stored.description if layer.stored else None,
        "action": layer.action,
        "note": layer.note,
        "tensors": {
            suffix: f"{spec.dtype} {list(spec.shape)}" for suffix, spec in layer.outputs.items()
        },
        "bytes": layer.bytes_after,
        "bits_per_weight": round(layer.bits_per_weight, 4),
        "sglang": config_class(layer.method, plan.target) or "SGLang's unquantized methods",
        "kernel": kernel_of(layer, plan),
    }


def _why(layer: PlannedLayer) -> str:
    if layer.kind in NEVER_QUANTIZED:
        return f"stays as stored: {NEVER_QUANTIZED[layer.kind]}"
    if layer.rule is None:
        return "stays as stored: no rule matches it"
    if layer.scheme is not None and layer.scheme is not layer.rule.scheme:
        return f"runs in {layer.scheme.label}, as all parts of its module"
    return f"runs in {layer.rule.scheme.label}: the last rule that matches it wins"


def _print(told: dict[str, Any], page: Page) -> None:
    page.print(told["layer"], "bold")
    if told["module"]:
        page.print(f"  part of    {told['module']}")
    for rule in told["rules"]:
        mark = "wins" if rule["wins"] else "matches, a later rule wins"
        listed = ", ".join(map(repr, rule["match"]))
        page.print(f"  rule       {rule['where']}: {listed} -> {rule['scheme']}  ({mark})")
    said = ", ".join(f"{key}: {value}" for key, value in told["arguments"].items())
    page.print(f"  so         {told['why']}")
    page.print(f"  method     {told['method']}{f' ({said})' if said else ''}")
    page.print(f"  source     {told['source']}, stored as {told['stored'] or 'no matrix'}")
    page.print(f"  action     {told['action']}{', ' + told['note'] if told['note'] else ''}")
    for suffix, spec in told["tensors"].items():
        page.print(f"  tensor     {suffix}  {spec}")
    bits = f", {told['bits_per_weight']:.2f} bits a weight" if told["bits_per_weight"] else ""
    page.print(f"  memory     {format_bytes(told['bytes'])}{bits}")
    page.print(f"  runs in    {told['sglang']}")
    if told["kernel"]:
        page.print(f"  kernel     {told['kernel']}")
