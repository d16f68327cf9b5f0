"""What every verb that plans takes on its command line, and the plan that this asks for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mixedprec_plugin.checkpoint.source import Source, open_source
from mixedprec_plugin.cli.arguments import count, file_there, positive
from mixedprec_plugin.errors import Problem, UsageError
from mixedprec_plugin.families.config import model_dtype
from mixedprec_plugin.methods.cards import find_gpu, served_dtype
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.budget import KV_BYTES, Load
from mixedprec_plugin.plan.drafts import own_draft, resolve_draft_plan
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.plan.sources import open_other_sources
from mixedprec_plugin.preset.load import preset_for


def add_planning_arguments(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Declare the arguments that name model, preset (or `several` of them) and target."""
    add_model_argument(parser)
    named = (
        "YAML file, or a packaged preset's name; may be left out for a checkpoint that "
        "mixedprec convert wrote"
    )
    if several:
        parser.add_argument(
            "--preset", dest="presets", metavar="PRESET", action="append",
            help=f"{named}; or a folder that it wrote; repeatable",
        )  # fmt: skip
    else:
        parser.add_argument("--preset", default="", metavar="PRESET", help=named)
    add_override_argument(parser)
    add_target_arguments(parser)


def add_model_argument(
    parser: argparse.ArgumentParser, *also: str, is_required: bool = True
) -> None:
    """Declare --model, and what else it is called."""
    parser.add_argument(
        "--model", *also, required=is_required, metavar="MODEL",
        help="checkpoint folder, or a Hugging Face id",
    )  # fmt: skip


def add_override_argument(parser: argparse.ArgumentParser) -> None:
    """Declare --set."""
    parser.add_argument(
        "--mixedprec-set", "--set", dest="overrides", metavar="KEY=VALUE", action="append",
        default=[], help="override a key of the preset; repeatable",
    )  # fmt: skip


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that say what is planned for."""
    parser.add_argument("--tp", type=positive, default=1, metavar="N", help="tensor-parallel ranks")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float16, as SGLang's")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="what to plan for"
    )
    parser.add_argument(
        "--gpu", default="", metavar="NAME",
        help="GPU of each rank, as H100, A100-40GB or 8.9: refuse what it does not run or hold",
    )  # fmt: skip


def add_load_arguments(parser: argparse._ActionsContainer) -> None:
    """Declare the arguments that say what a server is to hold at once beside its weights."""
    parser.add_argument(
        "--context", type=count, metavar="TOKENS",
        help="tokens of one request, prompt and answer: 8192 or 8k",
    )  # fmt: skip
    parser.add_argument("--concurrency", type=count, metavar="N", help="requests at once (1)")
    parser.add_argument(
        "--kv-cache-dtype", choices=KV_BYTES, help="as SGLang's; auto, the default, is 16 bits"
    )


def load_of(args: argparse.Namespace) -> Load | None:
    """The load that the command line asks for; None where it names no --context."""
    if args.context is None:
        for option in given(args, "concurrency", "kv_cache_dtype"):
            option = f"--{option.replace('_', '-')}"
            what = f"{option} without --context does not tell how much a request holds"
            raise UsageError(Problem(option, what, "add --context TOKENS"))
        return None
    return Load(args.context, args.concurrency or 1, KV_BYTES[args.kv_cache_dtype or "auto"])


def add_text_arguments(
    parser: argparse._ActionsContainer, what_for: str, writer: str, windows: int, length: int
) -> None:
    """Declare the arguments that say which text a model is run on; None where one is not given.

    `writer` writes it where none is named, in so many `windows` of that `length`.
    """
    parser.add_argument(
        "--text", type=file_there, metavar="FILE",
        help=f"UTF-8 text to {what_for}; without it, {writer} writes some",
    )  # fmt: skip
    parser.add_argument("--windows", type=positive, metavar="N", help=f"pieces of text ({windows})")
    parser.add_argument(
        "--length", type=positive, metavar="N", help=f"tokens of a piece ({length})"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the written text (0)")


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of some arguments that the command line names."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def make_plan(args: argparse.Namespace, **changed: object) -> Plan:
    """Plan what the command line asks for, but for arguments that are `changed`."""
    args = argparse.Namespace(**{**vars(args), **changed})
    source = open_source(args.model)
    preset = preset_for(args.preset, source, args.overrides, "--preset")
    return resolve_plan(preset, source, target_of(args, source), open_other_sources(preset))


def make_named_plan(args: argparse.Namespace, named: str) -> Plan:
    """Plan a preset, or a folder that `mixedprec convert` wrote; as `make_plan`."""
    if named and Path(named).is_dir():
        return make_plan(args, model=named, preset="")
    return make_plan(args, preset=named)


def make_draft_plan(args: argparse.Namespace, plan: Plan) -> Plan | None:
    """Plan the section `draft` of a plan's preset over the draft model that was named.

    Where none was, over the model's own layers of multi-token prediction, if there are such.
    """
    preset = plan.preset.draft
    if not args.draft_model:
        if preset is None or own_draft(plan.source) is None:
            return None
        return resolve_draft_plan(preset, plan.source, plan.target)
    if preset is None:
        what = f"{plan.preset.path} has no section draft: SGLang loads the draft model by itself"
        raise UsageError(Problem("--draft-model", what, "leave it out, or add the section"))
    source = open_source(args.draft_model)
    return resolve_draft_plan(preset, source, target_of(args, source))


def target_of(args: argparse.Namespace, source: Source) -> Target:
    """What the command line plans for."""
    dtype = model_dtype(source.config, args.dtype)
    if not args.gpu:
        return Target(args.device, args.tp, dtype)
    if args.device != "cuda":
        what = f"{args.gpu!r} beside --device {args.device} (expected --device cuda)"
        raise UsageError(Problem("--gpu", what, "leave one of the two out", "gpu"))
    gpu = find_gpu(args.gpu)
    return Target(args.device, args.tp, served_dtype(dtype, gpu.capability), gpu)
