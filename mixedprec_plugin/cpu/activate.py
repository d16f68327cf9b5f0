"""Decides whether the CPU platform is wanted; the entry point of `sglang.srt.platforms`.

On a machine without an accelerator SGLang by itself takes its bare base platform, on which no
engine starts. The platform here changes nothing but that: wherever stock SGLang works (an
accelerator, `SGLANG_USE_CPU_ENGINE=1`, another platform plugin) it stays away.
"""

from __future__ import annotations

import atexit
import os
import sys
from importlib.metadata import entry_points

GROUP = "sglang.srt.platforms"
NAME = "mixedprec_cpu"
PLATFORM_CLASS = "mixedprec_plugin.cpu.platform.CpuPlatform"


def activate() -> str | None:
    """Name the CPU platform where nothing else can run the engine.

    Returns:
        The dotted name of the platform class if `SGLANG_PLATFORM` is `mixedprec_cpu`; or if it is
        unset, no accelerator is there, `SGLANG_USE_CPU_ENGINE` is not 1 and no other platform
        plugin is installed. None in all other cases.
    """
    if "serve" in sys.argv[1:2] and {"-h", "--help"}.intersection(sys.argv):
        atexit.register(_print_flags)
    selected = os.environ.get("SGLANG_PLATFORM", "")
    if selected:
        return PLATFORM_CLASS if selected == NAME else None
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    if any(entry_point.name != NAME for entry_point in entry_points(group=GROUP)):
        return None
    return None if has_accelerator() else PLATFORM_CLASS


def _print_flags() -> None:
    """Add our flags to `sglang serve --help`, which prints its own before it loads plugins.

    Source: `serve` (sglang/cli/serve.py:181); a platform is asked for by its first import, so this
    entry point is the one that runs there.
    """
    import argparse

    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    formatter = parser._get_formatter()
    for group in parser._action_groups:
        if group.title and "mixedprec" in group.title:
            formatter.start_section(group.title)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
    print(f"\n{formatter.format_help()}", flush=True)


def has_accelerator() -> bool:
    """Whether torch sees a device that SGLang has a platform of its own for.

    `torch.cuda` answers for NVIDIA, AMD (hip) and SAIL; `npu` and `musa` are there once their
    torch extension is imported or, for MUSA, installed.
    """
    import torch

    if getattr(torch.version, "musa", None) is not None:
        return True
    names = ("cuda", "npu", "xpu", "mps", "hpu")
    modules = (getattr(torch, name, None) for name in names)
    return any(module is not None and module.is_available() for module in modules)
