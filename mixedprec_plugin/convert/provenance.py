"""Where every layer of a converted checkpoint came from, with the digests of what was read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch

from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.checkpoint.reader import Reader, Reading
from mixedprec_plugin.checkpoint.recorded import SHA256
from mixedprec_plugin.plan.model import Plan, PlannedLayer

if TYPE_CHECKING:
    from typing_extensions import Buffer

_TENSOR = {"name": {"type": "string"}, "file": {"type": "string"}, "sha256": SHA256}
_LAYER = {
    "layer": {"type": "string"},
    "tensors": {
        "type": "array",
        "items": {"type": "object", "required": [*_TENSOR], "properties": _TENSOR},
    },
}
# what `layer_provenance` makes of layers, as it is read again
LAYERS = {
    "type": "array",
    "items": {"type": "object", "required": [*_LAYER], "properties": _LAYER},
}


class HashingReader(Reader):
    """Reads tensors into memory of their own and keeps the SHA-256 of it.

    A mapping would change, between two looks at it, with a file that is written to.
    """

    def __init__(self) -> None:
        super().__init__(Reading(may_map=False))
        self._digests: dict[StoredTensor, str] = {}

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        value = super().read(tensor)
        self._digests[tensor] = hashlib.sha256(bytes_of(value)).hexdigest()
        return value

    def take_digests(self) -> dict[StoredTensor, str]:
        """Stored tensor -> digest of its bytes, of all that were read; forgotten here."""
        digests, self._digests = self._digests, {}
        return digests


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, as a file holds them."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return memoryview(cast("Buffer", flat.numpy()))


def layer_provenance(layer: PlannedLayer, digests: Mapping[StoredTensor, str]) -> dict[str, Any]:
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


def tensors_read(layer: PlannedLayer) -> list[StoredTensor]:
    """The stored tensors that a layer is made of, in the order in which they are read."""
    norms = [layer.rescale.own, layer.rescale.served] if layer.rescale else []
    return [*layer.inputs.values(), *norms]


def are_unchanged(layers: Iterable[Mapping[str, Any]], plan: Plan) -> bool:
    """Read again what layers were made of, and say whether all of it has the same digests.

    Raises:
        CheckpointError: a tensor cannot be read any more.
    """
    with HashingReader() as reader:
        for said in layers:
            layer = plan.by_name.get(said["layer"])
            for tensor in tensors_read(layer) if layer else ():
                reader.read(tensor)
            digests = reader.take_digests()
            if layer is None or layer_provenance(layer, digests)["tensors"] != said["tensors"]:
                return False
    return True


def sources_provenance(plan: Plan) -> dict[str, Any]:
    """Say which checkpoints the layers are from: name -> path and revision."""
    used = {layer.source for layer in plan.layers}
    told = {}
    for name, source in plan.sources.items():
        folder, reference = source.path.resolve(), plan.preset.sources.get(name)
        # in Hugging Face's cache a folder is named by its commit
        revision = folder.name if folder.parent.name == "snapshots" else None
        if reference and not revision:
            revision = reference.shown_revision
        # where the preset takes it from the environment, as written there
        path = reference.conceal(str(folder)) if reference else str(folder)
        if name in used:
            told[name] = {"path": path, "revision": revision}
    return told
