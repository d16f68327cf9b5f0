"""Where every layer of a converted checkpoint came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.plan.model import Plan, PlannedLayer

PROVENANCE_NAME = "mixedprec_provenance.json"


def layer_provenance(
    layer: PlannedLayer, plan: Plan, digests: Mapping[StoredTensor, str]
) -> dict[str, Any]:
    """Say what one layer was made of.

    Args:
        digests: every stored tensor that was read for it -> SHA-256 of its bytes.
    """
    return {
        "layer": layer.name,
        "source": layer.source,
        "action": layer.action,
        "stored": layer.stored.description if layer.stored else None,
        "method": layer.method if layer.scheme else None,
        "tensors": [
            {"name": tensor.name, "file": tensor.path.name, "sha256": digest}
            for tensor, digest in digests.items()
        ],
    }


def sources_provenance(plan: Plan) -> dict[str, Any]:
    """Say which checkpoints the layers are from: name -> path and revision."""
    used = {layer.source for layer in plan.layers}
    return {
        name: {"path": _path(plan, name), "revision": _revision(plan, name)}
        for name in plan.sources
        if name in used
    }


def _path(plan: Plan, name: str) -> str:
    """The folder; where the preset takes it from the environment, as written there."""
    reference = plan.preset.sources.get(name)
    if reference and reference.shown_path != reference.path:
        return reference.shown_path
    return str(plan.sources[name].path.resolve())


def _revision(plan: Plan, name: str) -> str | None:
    """The commit that a folder in Hugging Face's cache is of, or what the preset asked for."""
    folder = plan.sources[name].path.resolve()
    if folder.parent.name == "snapshots":
        return folder.name
    reference = plan.preset.sources.get(name)
    return reference.shown_revision if reference else None
