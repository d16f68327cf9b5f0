"""The checkpoint that layers are compared with; opened without torch."""

from __future__ import annotations

from pathlib import Path

from mixedprec_plugin.checkpoint.source import Source, open_source
from mixedprec_plugin.plan.model import Plan


def reference_of(named: str, plan: Plan) -> Source:
    """Open a reference: one of the plan's sources, or a checkpoint folder.

    Raises:
        CheckpointError: it is neither, or damaged.
    """
    if named in plan.sources and not Path(named).is_dir():
        return plan.sources[named]
    return open_source(named, "reference")
