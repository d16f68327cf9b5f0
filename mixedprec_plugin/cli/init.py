"""`mixedprec init`: a preset to start from, for one model and one size."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from mixedprec_plugin.checkpoint.source import Source, open_source
from mixedprec_plugin.cli.output import print_json, write_new
from mixedprec_plugin.cli.planning import gpu_of, target_of
from mixedprec_plugin.cli.presets import MODELINE
from mixedprec_plugin.convert.parts import parse_size
from mixedprec_plugin.errors import PlanError, Problem
from mixedprec_plugin.methods.cards import Gpu
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.memory import rank_bytes, why_not_in_memory
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.render import format_bytes, totals, totals_line
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.plan.tables import Page
from mixedprec_plugin.preset.load import load_resolved
from mixedprec_plugin.preset.schema import PRESET_SCHEMA
from mixedprec_plugin.resources import schema_path

EXAMPLES = """
  mixedprec init --model DIR --fit 24GB --out mine.yaml
  mixedprec init --model Qwen/Qwen3-30B-A3B --bits 4.5 --gpu 4090
"""
# of a card, for weights; the rest is for activations, CUDA graphs and the KV cache
_SHARE = 0.75
# the first that serves a kind of layers is taken
_EIGHT: tuple[dict[str, Any], ...] = (
    {"method": "fp8_channel"},
    {"method": "fp8_block"},
    {"method": "fp8"},
    {"method": "gptq_int8", "group_size": 64},
)
_FOUR: tuple[dict[str, Any], ...] = tuple({"method": "awq", "group_size": n} for n in (128, 64, 32))
# attention is small and touchy, experts are most of the bytes
_LADDER = (
    ("everything in 8 bits", {"mlp": _EIGHT, "attention": _EIGHT, "experts": _EIGHT}),
    ("experts in 4 bits, the rest in 8", {"mlp": _EIGHT, "attention": _EIGHT, "experts": _FOUR}),
    ("attention in 8 bits, the rest in 4", {"mlp": _FOUR, "attention": _EIGHT, "experts": _FOUR}),
    ("everything in 4 bits", {"mlp": _FOUR, "attention": _FOUR, "experts": _FOUR}),
)

Scheme = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="checkpoint folder, or a Hugging Face id"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--fit", metavar="SIZE", help="memory of the card of each rank, as 24GB")
    size.add_argument(
        "--bits", type=float, metavar="N", help="bits a weight of linear layers, as 4.5"
    )
    parser.add_argument("--gpu", default="", metavar="NAME", help="card to fit, as H100 or 8.9")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float16, as SGLang's")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what it is for")
    parser.add_argument("--out", metavar="FILE", help="where to write it; else it is printed")


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Write a commented preset that fits the model.

    It is chosen by the scores that `mixedprec search` kept, or else by a rule of thumb.

    Returns:
        0.
    Raises:
        UsageError: a size is none.
        CheckpointError: the model's files are wrong.
        PlanError: nothing fits.
        ConvertError: the file is there already.
    """
    source = open_source(args.model)
    title, text, plan = _by_scores(args, source) or _by_rule_of_thumb(args, source)
    crowded = _why_not_started(args, plan)
    text = text.replace("version: 1\n", "".join(f"# {x}\n" for x in crowded) + "version: 1\n", 1)
    if args.out:
        write_new(Path(args.out), text)
        if not args.json:
            page = Page(out)
            page.print(f"{args.out}: {title}, {_bits_line(plan)}")
            page.print(totals_line(plan))
            for line in crowded:
                page.print(line)
    elif not args.json:
        print(text, end="", file=out)
    if args.json:
        print_json({"preset": plan.preset.resolved, "totals": totals(plan)}, out)
    return 0


def _limit(args: argparse.Namespace) -> int:
    """Bytes of the card of each rank; 0 where none is named."""
    gpu = gpu_of(args)
    return parse_size(args.fit, "--fit") if args.fit else gpu.memory_bytes if gpu else 0


def _why_not_started(args: argparse.Namespace, plan: Plan) -> list[str]:
    """What SGLang's own reserve on the card leaves no room for, and what to do."""
    if args.device != "cuda":
        return []
    gpu = dataclasses.replace(gpu_of(args) or Gpu("a card", 0), memory_bytes=_limit(args))
    target = dataclasses.replace(plan.target, gpu=gpu)
    problems = why_not_in_memory(plan.layers, target, plan.source.config)
    return [f"{problem.what}: {problem.remedy}" for problem in problems]


def _by_scores(args: argparse.Namespace, source: Source) -> tuple[str, str, Plan] | None:
    """What scores that were kept say for a size; None without scores, or without a size."""
    from mixedprec_plugin.search.kept import Basis, KeptScores

    target, limit = target_of(args, source), _limit(args)
    if not (args.bits or limit) or KeptScores(source, target.dtype, Basis()).path is None:
        return None
    # needs numpy and scipy
    from mixedprec_plugin.cli.initial import preset_of_scores
    from mixedprec_plugin.search.finder import Budget

    budget = Budget(bits=args.bits) if args.bits else Budget(int(_SHARE * limit))
    name = Path(args.out).name if args.out else "mine.yaml"
    made = preset_of_scores(source, target, budget, Path(name))
    if made is None:
        return None
    text, plan = made
    held = rank_bytes(plan.layers, args.tp, source.config)
    if limit and held > _SHARE * limit:
        return None
    title = "by the scores that mixedprec search kept"
    return title, f"{MODELINE}{os.path.abspath(schema_path(PRESET_SCHEMA))}\n{text}", plan


def _by_rule_of_thumb(args: argparse.Namespace, source: Source) -> tuple[str, str, Plan]:
    title, schemes, plan = _chosen(args, source)
    return title, _text(title, schemes, plan, _globs(source, plan.target)), plan


def _chosen(args: argparse.Namespace, source: Source) -> tuple[str, dict[str, Scheme], Plan]:
    """The first of the ladder that fits: what it is called, its schemes and its plan."""
    limit, target = _limit(args), target_of(args, source)
    if target.gpu is not None:  # its memory is held against whole plans, here
        target = dataclasses.replace(target, gpu=dataclasses.replace(target.gpu, memory_bytes=0))
    globs = _globs(source, target)
    plan = None
    for title, candidates in _LADDER:
        schemes = {}
        for kind, found in candidates.items():
            served = (x for x in found if not _planned(source, target, globs, {kind: x}).errors)
            # what no method serves stays as it is
            if globs[kind] and (scheme := next(served, None)):
                schemes[kind] = scheme
        plan = _planned(source, target, globs, schemes).check()
        held = rank_bytes(plan.layers, args.tp, source.config)
        is_small = args.bits is None or _bits(plan) <= args.bits
        if is_small and (not limit or held <= _SHARE * limit):
            return title, schemes, plan
    assert plan is not None
    what = (
        f"all in 4 bits is {_bits(plan):.2f} bits a weight of linear layers and experts, and "
        f"{format_bytes(held)} a rank; three quarters of a card are counted for weights"
    )
    remedy = "allow more, or share it among more ranks: --tp"
    raise PlanError(Problem("--fit" if args.bits is None else "--bits", what, remedy, "too-large"))


def _bits(plan: Plan) -> float:
    """Served bits a weight of what is quantized: linear layers and experts, scales counted."""
    layers = [layer for layer in plan.layers if layer.kind in ("linear", "expert")]
    num_weights = sum(layer.num_weights for layer in layers)
    return 8 * sum(layer.bytes_after for layer in layers) / max(num_weights, 1)


def _bits_line(plan: Plan) -> str:
    """What --bits counts, which is less than the bits of all that is served."""
    return f"{_bits(plan):.2f} bits a weight of linear layers and experts"


def _globs(source: Source, target: Target) -> dict[str, list[str]]:
    """Kind of layers -> globs over them: all layers below `self_attn`, below `mlp`, …"""
    globs: dict[str, list[str]] = {"mlp": [], "attention": [], "experts": []}
    for layer in _planned(source, target, {}, {}).layers:
        parent = layer.name.split(".")[-2:-1]
        if layer.kind == "expert":
            globs["experts"] = ["*.experts.*"]
        elif layer.kind == "linear" and parent and not parent[0].isdigit():
            kind = "attention" if "attn" in parent[0] or "attention" in parent[0] else "mlp"
            globs[kind] = list(dict.fromkeys([*globs[kind], f"*.{parent[0]}.*"]))
    return globs


def _planned(
    source: Source, target: Target, globs: Mapping[str, list[str]], schemes: Mapping[str, Scheme]
) -> Plan:
    rules = [{"match": globs[kind], "scheme": kind} for kind in schemes]
    rules = rules or [{"match": "*", "method": "auto"}]
    data = {"version": 1, "schemes": dict(schemes), "rules": rules}
    return resolve_plan(load_resolved(data, "init"), source, target)


def _text(
    title: str, schemes: Mapping[str, Scheme], plan: Plan, globs: Mapping[str, list[str]]
) -> str:
    """The preset as a person would write it, sizes in comments."""
    width = max(map(len, schemes))
    lines = [
        f"{MODELINE}{os.path.abspath(schema_path(PRESET_SCHEMA))}",
        f"# {plan.source.path}",
        f"# {totals_line(plan)}",
        f"# {_bits_line(plan)}",
        "# Chosen by a rule of thumb: mixedprec eval tells what it costs.",
        "version: 1",
        f"description: {title[0].upper()}{title[1:]}.",
        "schemes:",
    ]
    for kind, scheme in schemes.items():
        said = ", ".join(f"{key}: {value}" for key, value in scheme.items())
        size = sum(x.bytes_after for x in plan.layers if x.scheme and x.scheme.label == kind)
        lines.append(f"  {kind + ':':{width + 1}} {{{said}}}  # {format_bytes(size)}")
    lines += ["rules:  # the last one that matches a layer wins; others stay as they are stored"]
    for kind in schemes:
        match = json.dumps(globs[kind][0] if len(globs[kind]) == 1 else globs[kind])
        lines.append(f"  - {{match: {match}, scheme: {kind}}}")
    lines += ["  # touchy layers, if mixedprec eval says that there are any:"]
    lines += ['  # - {match: "*.layers.{0,-1}.*", method: bf16}']
    return "\n".join(lines) + "\n"
