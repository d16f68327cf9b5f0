"""Is the plugin whole in this process, and does SGLang still have what it is hooked to?"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, Literal

from mixedprec_plugin.cli.blame import hook_faults, line_of, line_of_failure, line_of_text
from mixedprec_plugin.errors import Problem

Status = Literal["ok", "absent", "failed"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        section: what it belongs to: `configs`, `registration`, `versions` or `device`.
        name: what was looked at.
        status: `absent` is what this machine cannot have, and no fault.
        text: what was found, or the reason.
        details: the same as data, for --json.
    """

    section: str
    name: str
    status: Status
    text: str
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def failed(section: str, problem: Problem) -> Finding:
    """Return the line that reports a problem."""
    what = f"{problem.what}; {problem.remedy}" if problem.remedy else problem.what
    return Finding(section, problem.where, "failed", what)


def examine_registration() -> list[Finding]:
    """Report whether SGLang knows the load format, the flag, the hooks and the platform."""
    findings = _examine_imports() or _examine_hooks()
    return [*findings, _examine_flag(), _examine_platform()]


def _examine_imports() -> list[Finding]:
    """Our modules that take what they need from SGLang by name, and do not find it."""
    findings = []
    for module in ("mixedprec_plugin.serving.hooks", "mixedprec_plugin.serving.loader"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            text = f"cannot be imported: {error}; look at {line_of_failure(error)}"
            findings.append(Finding("registration", module, "failed", text))
    return findings


def _examine_hooks() -> list[Finding]:
    """Whether our hooks are there, and what SGLang's functions have become that they are for."""
    from mixedprec_plugin.serving import hooks
    from mixedprec_plugin.serving.flags import LOAD_FORMAT

    problems = hooks.check_registration()
    findings = [failed("registration", problem) for problem in problems]
    for hook in hooks.HOOKS:
        place = f"{line_of_text(hooks, hook.target)} and {line_of(hook.function)}"
        findings += [
            Finding("registration", hook.target, "failed", f"{fault}; look at {place}")
            for fault in hook_faults(hook)
        ]
    if not problems:
        targets = ", ".join(hook.target.rpartition("srt.")[2] for hook in hooks.HOOKS)
        findings.append(Finding("registration", "load format", "ok", LOAD_FORMAT))
        findings.append(Finding("registration", "hooks", "ok", targets))
    return findings


def _examine_flag() -> Finding:
    from sglang.srt.server_args import ServerArgs

    flag = "--mixedprec-config"
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    if flag in parser.format_usage():
        return Finding("registration", "flag", "ok", flag)
    text = f"{flag} is not among the server's flags; SGLang's log says why the plugin failed"
    return Finding("registration", "flag", "failed", text)


def _examine_platform() -> Finding:
    from sglang.srt.platforms import current_platform

    kind = type(current_platform)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind.__name__ == "SRTPlatform":
        text = (
            "no platform: no accelerator is there and the CPU platform is not registered; "
            "run 'pip install mixedprec-plugin'"
        )
        return Finding("registration", "platform", "failed", text)
    return Finding("registration", "platform", "ok", name)
