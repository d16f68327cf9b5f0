"""`mixedprec plan --html` and `--svg`: the plan as a page and as a picture, each one file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixedprec_plugin.cli.planning import make_plan
from mixedprec_plugin.cli.running import ask, is_address
from mixedprec_plugin.cli.svg import map_of
from mixedprec_plugin.errors import Problem, UsageError
from mixedprec_plugin.plan.document import FORMAT, names_in_order, plan_document
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.overlays import read_overlay
from mixedprec_plugin.resources import page_path

_DATA = "/*DATA*/"


def write_pages(args: argparse.Namespace, plan: Plan) -> None:
    """Write what the command line asks for."""
    for flag in ("against", "overlay"):
        if getattr(args, flag) and not args.html:
            what = "is for the page only"
            raise UsageError(Problem(f"--{flag}", what, "add --html FILE"))
    if args.html:
        write_page(args.html, plan, _against(args), args.overlay)
    if args.svg:
        _write(args.svg, map_of(plan), "--svg")


def _against(args: argparse.Namespace) -> dict[str, Any] | None:
    """The document of what is shown beside the plan."""
    if not args.against:
        return None
    if not is_address(args.against):
        return plan_document(make_plan(args, preset=args.against, overrides=[]))
    text, url = ask(args.against, document=True)
    try:
        document: dict[str, Any] = json.loads(text)
        said = document["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(Problem(url, "is not a plan's document")) from error
    if said != FORMAT:
        what = f"is of another release: its format is {said!r} (expected {FORMAT})"
        raise UsageError(Problem(url, what, "run the release that the server runs"))
    return document


def write_page(
    path: Path, plan: Plan, against: dict[str, Any] | None, overlays: Sequence[Path]
) -> None:
    """Write the page of a plan, with the document of another one over the same model `against` it.

    `overlays` are files with a number for each layer.
    """
    data = {
        "plan": plan_document(plan),
        "against": against,
        "overlays": [_in_order(read_overlay(each, plan), plan) for each in overlays],
    }
    # nothing in it ends the element or the JSON
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c").replace("\x7f", "\\u007f")
    _write(path, page_path().read_text(encoding="utf-8").replace(_DATA, text), "--html")


def _in_order(overlay: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """An overlay with its values in the document's order, to three digits."""
    values = overlay["values"]
    numbers = (values.get(name) for name in names_in_order(plan))
    return {**overlay, "values": [n if n is None else float(f"{n:.3g}") for n in numbers]}


def _write(path: Path, text: str, flag: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        what = f"{path} cannot be written: {error.strerror}"
        raise UsageError(Problem(flag, what, "name a file in a folder that is there")) from None
