"""The lines of a doctor's report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

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
