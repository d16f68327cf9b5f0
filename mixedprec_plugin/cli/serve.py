"""`mixedprec serve`: check first, in files alone, and then become `sglang serve`.

Preset, plan, card and port are looked at before SGLang is imported, which takes a minute on some
machines; what only SGLang can tell is said by the server itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from mixedprec_plugin.cli.arguments import positive
from mixedprec_plugin.cli.output import print_json, report
from mixedprec_plugin.cli.planning import add_model_argument, add_override_argument, make_plan
from mixedprec_plugin.errors import LoadError, Problem, UsageError
from mixedprec_plugin.plan.budget import KV_BYTES, Load
from mixedprec_plugin.plan.memory import MEMORY_RULES, memory_lines, usual_load, why_not_in_memory
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.render import plan_as_dict, totals_line
from mixedprec_plugin.plan.tables import Page
from mixedprec_plugin.preset.parents import locate_preset
from mixedprec_plugin.resources import preset_dir

EXAMPLES = """
  mixedprec serve awq --model DIR
  mixedprec serve mine.yaml --model DIR --port 30001 --mem-fraction-static 0.85
  mixedprec serve --model DIR-awq                  a folder that mixedprec convert wrote
  mixedprec serve mine.yaml --model DIR --check    the checks, and the command that would run
"""
_NUM_PORTS_TRIED = 100
# the options by which SGLang gets what was checked
_OWN = ("--load-format", "--mixedprec-config")
# what options of SGLang's begin with that change what a GPU holds, or what is kept free of it
_CHANGE_MEMORY = (
    "--cuda-graph", "--disable-cuda-graph", "--speculative", "--enable-dp-attention",
    "--moe-a2a-backend", "--disaggregation-mode", "--cpu-offload-gb", "--offload-",
    "--max-total-tokens", "--mamba-", "--max-mamba-", "--lora-paths",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments; what is not known goes to SGLang."""
    parser.add_argument(
        "preset", nargs="?", default="", metavar="PRESET",
        help="YAML file, or a packaged preset's name; first, before any option",
    )  # fmt: skip
    add_model_argument(parser, "--model-path")
    add_override_argument(parser)
    parser.add_argument(
        "--tp", "--tp-size", "--tensor-parallel-size", dest="tp", type=int, default=1, metavar="N",
        help="tensor-parallel ranks",
    )  # fmt: skip
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float16, as SGLang's")
    parser.add_argument(
        "--gpu", default="", metavar="NAME",
        help="GPU to check for, where nvidia-smi does not tell: H100, 8.9",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="as SGLang's (127.0.0.1)")
    parser.add_argument(
        "--port", type=_port, default=30000, metavar="N", help="as SGLang's (30000)"
    )
    memory = parser.add_argument_group("memory of the GPU", "as SGLang's")
    memory.add_argument("--mem-fraction-static", type=_fraction, metavar="SHARE")
    memory.add_argument("--context-length", type=positive, metavar="TOKENS")
    memory.add_argument("--max-running-requests", type=positive, metavar="N")
    memory.add_argument("--kv-cache-dtype", metavar="DTYPE")
    memory.add_argument("--chunked-prefill-size", type=int, metavar="TOKENS")
    memory.add_argument(
        "--pp-size", "--pipeline-parallel-size", dest="pp_size", type=positive, default=1,
        metavar="N", help="of several stages the memory is not checked",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="start nothing")
    parser.epilog = f"Any other option is SGLang's, and is handed on.\n\n{parser.epilog or ''}"
    parser.set_defaults(passed_on=[])


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Check, print what is going to run, and become the server; 0 with --check."""
    for option in (word.partition("=")[0] for word in args.passed_on):
        # SGLang also takes an abbreviated option, and of two the last
        if len(option) > 3 and any(own.startswith(option) for own in _OWN):
            what = "is not handed on: another preset or format would be served than was checked"
            raise UsageError(Problem(option, what, "leave it out, and name the preset as PRESET"))
    if not args.gpu and (found := _gpu_here()):
        args.gpu = found
    args.device = "cuda" if args.gpu else "cpu"
    plan = make_plan(args)
    load = _load(args, plan)
    problems = [p for p in plan.problems if p.rule not in MEMORY_RULES]
    if load is not None:
        problems += why_not_in_memory(plan.layers, plan.target, plan.source.config, load)
    plan = dataclasses.replace(plan, problems=tuple(problems)).check()
    if problems := [*plan.not_calibrated(), *_port_problems(args.host, args.port)]:
        raise LoadError(problems)
    command = _command(args)
    if args.json:
        print_json({"command": command, **plan_as_dict(plan)}, out)
    else:
        page = Page(out)
        page.print(totals_line(plan))
        if args.device == "cpu":
            page.print("no GPU: served by the CPU platform")
        for line in memory_lines(plan, load) if load else ():
            page.print(line)
        if load is None and plan.target.gpu is not None:
            page.print(f"not checked, with {_changes_memory(args)}: whether it fits the memory")
        report(plan.problems, sys.stderr)
        print(f"$ {shlex.join(command)}", file=out, flush=True)
    if not args.check:
        os.execv(command[0], command)
    return 0


def _port(text: str) -> int:
    """Read a port from the command line."""
    value = int(text)
    if not 0 <= value < 65536:
        raise argparse.ArgumentTypeError(f"{text} is not a port (expected 0 to 65535)")
    return value


def _fraction(text: str) -> float:
    """Read a share of memory from the command line."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(
            f"{text} is not a fraction (expected more than 0, less than 1)"
        )
    return value


def _load(args: argparse.Namespace, plan: Plan) -> Load | None:
    """What the options ask of a GPU; None where they make memory what is not known here."""
    if _changes_memory(args):
        return None
    load = usual_load(plan.preset)
    dtype = args.kv_cache_dtype
    return Load(
        context=args.context_length or load.context,
        concurrency=1,
        kv_bytes=load.kv_bytes if dtype in (None, "auto") else KV_BYTES[dtype],
        fraction=args.mem_fraction_static,
        chunk=args.chunked_prefill_size,
        most_requests=args.max_running_requests,
    )


def _changes_memory(args: argparse.Namespace) -> str:
    """The option that divides the memory of a GPU as is not known here; empty for none."""
    if args.pp_size > 1:
        return "--pp-size"
    if args.kv_cache_dtype not in (None, *KV_BYTES):
        return "--kv-cache-dtype"
    if args.chunked_prefill_size is not None and args.chunked_prefill_size < 1:
        return "--chunked-prefill-size"
    given = (word.partition("=")[0] for word in args.passed_on)
    return next((word for word in given if word.startswith(_CHANGE_MEMORY)), "")


def _command(args: argparse.Namespace) -> list[str]:
    """SGLang's command line."""
    beside = Path(sys.executable).with_name("sglang")
    program = str(beside) if beside.exists() else shutil.which("sglang")
    if program is None:
        what = f"there is no 'sglang' beside {sys.executable}"
        raise LoadError(Problem("sglang", what, "run 'pip install sglang' in this environment"))
    command = [program, "serve", "--model-path", args.model, "--load-format", "mixedprec"]
    if args.preset:
        command += ["--mixedprec-config", _path(args.preset)]
    for override in args.overrides:
        command += ["--mixedprec-set", override]
    said = {
        "--tp-size": (args.tp, 1),
        "--pp-size": (args.pp_size, 1),
        "--dtype": (args.dtype, "auto"),
        "--mem-fraction-static": (args.mem_fraction_static, None),
        "--context-length": (args.context_length, None),
        "--max-running-requests": (args.max_running_requests, None),
        "--kv-cache-dtype": (args.kv_cache_dtype, None),
        "--chunked-prefill-size": (args.chunked_prefill_size, None),
    }
    for flag, (value, default) in said.items():
        command += [flag, str(value)] if value != default else []
    return [*command, "--host", args.host, "--port", str(args.port), *args.passed_on]


def _path(preset: str) -> str:
    """The preset as the server finds it: it has been found here."""
    found = locate_preset(preset, Path())
    return preset if found is None or found.parent == preset_dir() else str(found)


def _gpu_here() -> str:
    """The first GPU as NVIDIA's driver names it; empty where there is none.

    The plan knows the names of some, and of any other its compute capability.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    program = shutil.which("nvidia-smi")
    if program is None or os.environ.get("SGLANG_PLATFORM") == "mixedprec_cpu" or not visible:
        return ""
    asked = [program, f"--id={visible}", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    name, _, capability = done.stdout.strip().partition(", ")
    if done.returncode or not capability:
        return ""
    from mixedprec_plugin.methods.cards import find_gpu

    try:
        return find_gpu(name).name
    except UsageError:
        return capability


def _port_problems(host: str, port: int) -> Sequence[Problem]:
    """Whether something listens on a port already, and which one is free."""
    try:
        if _is_free(host, port):
            return []
        ports = range(port + 1, min(port + _NUM_PORTS_TRIED, 65536))
        free = next((other for other in ports if _is_free(host, other)), None)
    except OSError as error:
        what = f"{host!r} cannot be listened on ({error.strerror})"
        remedy = "name an address of this machine: 127.0.0.1, or 0.0.0.0 for all"
        return [Problem("--host", what, remedy, "host")]
    remedy = f"--port {free} is free" if free else "name another one"
    return [Problem("--port", f"{port} is taken on {host}", remedy, "port")]


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            return False
    return True
