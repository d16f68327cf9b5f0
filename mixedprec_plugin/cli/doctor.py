"""`mixedprec doctor`: does every method fit the installed SGLang, and is the plugin whole?"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import logging
import platform
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from mixedprec_plugin.cli.output import print_json
from mixedprec_plugin.cli.registration import (
    Finding,
    Status,
    examine_registration,
    failed,
    line_of_method,
)
from mixedprec_plugin.errors import MixedPrecisionError
from mixedprec_plugin.plan.tables import Page

if TYPE_CHECKING:
    from mixedprec_plugin.methods.interface import Method

EXAMPLES = """
  mixedprec doctor
  mixedprec doctor --verbose
  mixedprec doctor --json
"""
# docs/compat.md
TESTED = "0.5.23"
PACKAGES = ("mixedprec-plugin", "sglang", "torch", "transformers", "safetensors")
_STYLES: Mapping[Status, str] = {"ok": "green", "absent": "yellow", "failed": "red"}


def variants() -> list[tuple[str, dict[str, Any]]]:
    """Every method with its defaults, and with each argument changed alone: name and arguments."""
    from mixedprec_plugin.methods.registry import METHODS

    found: list[tuple[str, dict[str, Any]]] = []
    for name, spec in METHODS.items():
        changed = [
            {key: value} for key, entry in spec.schema.items() for value in entry.get("enum", ())
        ]
        others = [x for x in changed if not x.items() <= spec.defaults.items()]
        found += [(name, x) for x in ({}, *others) if not spec.conflict({**spec.defaults, **x})]
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-v", "--verbose", action="store_true", help="print all that was looked at")


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Examine the installation and print the report; 1 if anything is wrong."""
    from mixedprec_plugin.methods.construct import quieted

    # what SGLang warns of each config, and torch where there is no CUDA; errors still show
    with contextlib.ExitStack() as quiet:
        for name in ("sglang", "torch"):
            quiet.enter_context(quieted(name, logging.ERROR))
        quiet.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        findings = [*examine_versions(), *examine_sglang()]
    if args.json:
        print_json(_as_data(findings), out)
    elif args.verbose:
        _print(findings, Page(out))
    else:
        _print_answer(findings, Page(out))
    return 1 if any(finding.status == "failed" for finding in findings) else 0


def examine_versions() -> list[Finding]:
    """Report Python's and the packages' versions; what is not installed is a fault."""
    findings = [Finding("versions", "python", "ok", platform.python_version())]
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            text = f"is not installed; run 'pip install {package}'"
            findings.append(Finding("versions", package, "failed", text))
        else:
            findings.append(Finding("versions", package, "ok", version))
            if package == "sglang" and _numbers(version) > _numbers(TESTED):
                text = f"{version} is newer than {TESTED}, which this release was tested with"
                findings.append(Finding("versions", "newer sglang", "absent", text))
    return findings


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def examine_sglang() -> list[Finding]:
    """Report device, registration and configs, all of which need SGLang itself."""
    try:
        from sglang.srt.plugins import load_plugins
    except ImportError as error:
        text = f"cannot be imported: {error}; install sglang 0.5.21 or newer"
        return [Finding("registration", "sglang.srt.plugins", "failed", text)]
    load_plugins()
    active, device = examine_device()
    try:
        configs = examine_configs(active)
    except MixedPrecisionError as error:
        configs = [failed("configs", problem) for problem in error.problems]
    return [device, *examine_registration(), *configs]


def examine_device() -> tuple[str, Finding]:
    """Return `cuda` or `cpu`, whichever SGLang runs on, and the line that says what that is."""
    import torch

    from mixedprec_plugin.methods.construct import cuda_capability

    capability = cuda_capability()
    if capability is None:
        name = platform.processor() or platform.machine()
        details: dict[str, Any] = {"platform": "cpu", "threads": torch.get_num_threads()}
        return "cpu", Finding("device", "cpu", "ok", name, details)
    name = torch.cuda.get_device_name()
    details = {"platform": "cuda", "capability": capability}
    text = f"{name}, capability {capability // 10}.{capability % 10}"
    return "cuda", Finding("device", "cuda", "ok", text, details)


def examine_configs(active: str) -> list[Finding]:
    """Construct every method's config as defaults and variants have it; those of `active` must."""
    from mixedprec_plugin.methods.construct import config_key, cuda_capability
    from mixedprec_plugin.methods.registry import METHODS, bind

    findings = []
    for name, given in variants():
        method, arguments = bind(name, given)
        spec = METHODS[method]
        label = " ".join([name, *(f"{key}={value}" for key, value in given.items())])
        if not spec.config_classes:
            text = "SGLang's unquantized methods, no config"
            findings.append(Finding("configs", label, "ok", text, {"method": method}))
            continue
        in_use = config_key(spec, active, cuda_capability())
        for key in spec.config_classes:
            findings.append(_construct(label, spec, arguments, key, key == in_use))
    return findings


def _construct(
    label: str, spec: Method, arguments: Mapping[str, Any], key: str, is_in_use: bool
) -> Finding:
    from mixedprec_plugin.errors import MethodError
    from mixedprec_plugin.methods.construct import build_config

    name = f"{label} ({key})"
    details: dict[str, Any] = {
        "method": spec.name, "arguments": dict(arguments), "platform": key,
        "class": spec.config_classes[key],
    }  # fmt: skip
    try:
        config = build_config(spec.name, arguments, key, capability=spec.fallback_below)
    except MethodError as error:
        details["reason"] = str(error)
        is_device = all(problem.rule == "config-refused" for problem in error.problems)
        if is_device and not is_in_use:
            # SGLang's own words, without ours around them
            text = f"not constructible on this device: {error.__cause__ or error}"
            return Finding("configs", name, "absent", text, details)
        text = f"{error}; look at {line_of_method(spec, key, error.problems[0].rule, error)}"
        return Finding("configs", name, "failed", text, details)
    attributes = _attributes(config, spec.config_arguments(arguments, key))
    shown = " ".join(f"{name}={value}" for name, value in attributes.items())
    text = f"{type(config).__name__}: {shown}"
    return Finding("configs", name, "ok", text, {**details, "attributes": attributes})


def _attributes(config: object, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """What the builder's arguments became, and whatever else the config has switched on."""
    shown = {}
    for name, value in vars(config).items():
        says_something = value not in (None, [], {}, "") if name in keywords else bool(value)
        if says_something and not name.startswith("_") and name != "full_config":
            shown[name] = value if isinstance(value, bool | int | str | list) else str(value)
    return shown


def _as_data(findings: list[Finding]) -> dict[str, Any]:
    report: dict[str, Any] = {"ok": all(f.status != "failed" for f in findings)}
    for finding in findings:
        line = {"name": finding.name, "status": finding.status, "text": finding.text}
        report.setdefault(finding.section, []).append({**line, **finding.details})
    report["problems"] = [f"{f.name}: {f.text}" for f in findings if f.status == "failed"]
    return report


def _print_answer(findings: list[Finding], page: Page) -> None:
    """What is here, what works, what does not and why, and what to do next."""

    def of(section: str, status: Status) -> list[Finding]:
        return [x for x in findings if x.section == section and x.status == status]

    page.print(f"With {', '.join(f'{x.name} {x.text}' for x in of('versions', 'ok'))}:")
    for device in of("device", "ok"):
        here = "no GPU: SGLang runs on this CPU, by the plugin's platform"
        page.print(f"  device   {here if device.name == 'cpu' else device.text}")
    wrong = [finding for finding in findings if finding.status == "failed"]
    if all(finding.section != "registration" for finding in wrong):
        page.print("  plugin   load format, flags, hooks and platform are in place")
    works, unseen = (
        list(dict.fromkeys(x.details["method"] for x in of("configs", status)))
        for status in ("ok", "absent")
    )
    page.print(f"  methods  {', '.join(works) or 'none'}: SGLang takes their arguments")
    if unseen:
        what = "the CUDA class needs a GPU to be checked"
        page.print(f"           {', '.join(sorted(unseen))}: {what}")
    for finding in of("versions", "absent"):
        page.print(f"  note     {finding.text}", "yellow")
    for finding in wrong:
        page.print(f"  failed  {finding.name}  {finding.text}", "red")
    closing = "all well; next: mixedprec serve PRESET --model DIR"
    page.print(f"{len(wrong)} wrong; --verbose shows the rest" if wrong else closing, "bold")


def _print(findings: list[Finding], page: Page) -> None:
    for section in dict.fromkeys(finding.section for finding in findings):
        page.print(section, "bold")
        lines = [finding for finding in findings if finding.section == section]
        width = max(len(finding.name) for finding in lines)
        for line in lines:
            page.print(
                f"  {line.status:<6}  {line.name:<{width}}  {line.text}", _STYLES[line.status]
            )
    wrong = sum(finding.status == "failed" for finding in findings)
    page.print(f"{wrong} wrong" if wrong else "all well", "bold")
