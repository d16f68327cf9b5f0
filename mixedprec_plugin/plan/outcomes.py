"""From a layer's scheme and its stored tensors to the action and the tensors that are served."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType

from mixedprec_plugin.checkpoint.formats import StoredFormat
from mixedprec_plugin.checkpoint.headers import DTYPE_BITS, StoredTensor
from mixedprec_plugin.families.names import Kind
from mixedprec_plugin.methods import registry
from mixedprec_plugin.methods.spec import TensorSpec
from mixedprec_plugin.plan.auto import AUTO
from mixedprec_plugin.plan.conversion import is_stored_as
from mixedprec_plugin.plan.model import Action, Target
from mixedprec_plugin.plan.repacking import is_repackable
from mixedprec_plugin.preset.model import Scheme

_FLOATS = frozenset({"BF16", "F16", "F32", "F64"})
# SGLang keeps some routers in float32 (models/glm4_moe.py:391, models/deepseek_v2.py:520), and a
# draft model is loaded from what is stored
_UNCAST = frozenset({"router", "draft"})
_ROUTER_BIAS = "e_score_correction_bias"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What layers that are alike become."""

    action: Action
    outputs: Mapping[str, TensorSpec]
    bytes_before: int
    bytes_after: int


class Outcomes:
    """What each layer becomes; layers that are alike share it."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._known: dict[object, Outcome] = {}

    def of(
        self,
        scheme: Scheme | None,
        stored: StoredFormat | None,
        tensors: Mapping[str, StoredTensor],
        kind: Kind,
    ) -> Outcome:
        """What a layer becomes.

        Args:
            scheme: what it runs as; None for what is never quantized.
            stored: the format of its weight in its source.
            tensors: suffix -> tensor of the layer, in its source.
        """
        # layers share a format only where their tensors have the same dtypes and shapes
        alike: object = id(stored)
        if stored is None:
            alike = tuple([(suffix, t.dtype, t.shape) for suffix, t in tensors.items()])
        key = (id(scheme), alike, kind)
        if key not in self._known:
            action = _action(scheme, stored, tensors, self._target)
            outputs = _outputs(action, scheme, stored, tensors, kind, self._target)
            self._known[key] = Outcome(
                action,
                MappingProxyType(outputs),
                sum(tensor.num_bytes for tensor in tensors.values()),
                sum(map(_spec_bytes, outputs.values())) if kind != "draft" else 0,
            )
        return self._known[key]


def _action(
    scheme: Scheme | None,
    stored: StoredFormat | None,
    tensors: Mapping[str, StoredTensor],
    target: Target,
) -> Action:
    if scheme is None or stored is None:
        return "as stored"
    if scheme.method == "bf16":
        if stored.method != "bf16":
            return "dequantize"
        served = {"BF16": "bfloat16", "F16": "float16"}.get(target.dtype)
        return "as stored" if stored.arguments["dtype"] == served else "cast"
    if scheme.method == AUTO:
        return "as stored"
    if stored.method == "bf16":
        return "quantize"
    if is_stored_as(stored, scheme):
        return "as stored"
    if is_repackable(stored, scheme, tensors):
        return "repack"
    return "requantize" if scheme.requantize and stored.is_readable else "as stored"


def _outputs(
    action: Action,
    scheme: Scheme | None,
    stored: StoredFormat | None,
    tensors: Mapping[str, StoredTensor],
    kind: Kind,
    target: Target,
) -> dict[str, TensorSpec]:
    """What the layer is served as: the method's tensors, then those beside the matrix (biases)."""
    outputs: dict[str, TensorSpec] = {}
    replaced: set[str] = set()
    if scheme is not None and stored is not None and stored.N:
        spec = registry.METHODS[scheme.method]
        outputs |= spec.stored(scheme.arguments, stored.N, stored.K, target.dtype)
        if action != "as stored":
            replaced = set(stored.suffixes)
    if scheme is not None and stored is not None and scheme.method == AUTO:
        outputs |= {
            s: TensorSpec(t.dtype, t.shape) for s, t in tensors.items() if s in stored.suffixes
        }
        if stored.family == "gptq" and "g_idx" not in tensors:
            outputs["g_idx"] = TensorSpec("I32", (stored.K,))
    for suffix, tensor in tensors.items():
        if suffix not in replaced and suffix not in outputs:
            is_cast = tensor.dtype in _FLOATS and kind not in _UNCAST and suffix != _ROUTER_BIAS
            dtype = target.dtype if is_cast else tensor.dtype
            outputs[suffix] = TensorSpec(dtype, tensor.shape)
    return outputs


def _spec_bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * DTYPE_BITS[spec.dtype] // 8
