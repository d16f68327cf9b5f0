"""What is left where no format's own reader takes a layer: it is told by name at least."""

from __future__ import annotations

import dataclasses
import re

from mixedprec_plugin.methods import blockwise_int8, fp8, scaled
from mixedprec_plugin.methods.interface import Fault, Format, LayerShape, Target
from mixedprec_plugin.methods.stored import FLOAT, Said, StoredFormat, Tensors, incomplete, unusable

# of its formats in 4 bits the one that config.json, or else nearly every checkpoint, says
_MODELOPT = "modelopt nvfp4"
# a suffix that no other format has -> the format that writes it
_SIGNATURES = {
    "SCB": "bitsandbytes 8-bit",
    "quant_map": "bitsandbytes 4-bit",
    "absmax": "bitsandbytes 4-bit",
    "weight_scale_2": _MODELOPT,
    "weight_global_scale": "nvfp4",
    "W_q": "hqq",
    "codebooks": "aqlm",
    "centroids": "vptq",
    "Qidxs": "quip",
    "q_weight": "exl2",
    "trellis": "exl3",
    "B": "marlin",
    "qweight_type": "gguf",
    "weight_blocks": "mxfp4",
    "bitmask": "compressed-tensors sparse bitmask",
}
_CODE_DTYPES = frozenset({"I8", "U8", "I16", "U16", "I32", "U32"} | {"F8_E4M3", "F8_E5M2"})
_BESIDE_CODES = re.compile(r"scales?\d*$|zeros?(?:_?points?)?$|codes?$|packed|quant|absmax|lut$")
# masks and positions that models compute by themselves, and old checkpoints carry
BUFFERS = frozenset(
    {"position_ids", "bias", "masked_bias", "relative_position_index", "num_batches_tracked"}
)
_LIKE = {"fp8": fp8.NAME, "int8": blockwise_int8.NAME}


def _by_signature(tensors: Tensors, said: Said) -> StoredFormat | None:
    """Take a suffix that one format has, or a `qweight` that is neither AWQ's nor GPTQ's."""
    method = said.config.get("quant_method")
    if method == "awq" and tensors.keys() == {"scales"}:
        # AutoAWQ's `ScaledActivation`: what the next layer reads is divided by them
        found = unusable(tensors, "scales")
        return dataclasses.replace(found, obstacle="an activation is divided by them as it runs")
    if method == "w4afp8" and "weight" in tensors:
        return unusable(tensors, "w4afp8") if tensors["weight"].dtype == "I8" else None
    if "qweight" not in tensors:
        name = next((name for suffix, name in _SIGNATURES.items() if suffix in tensors), None)
        if name == _MODELOPT and said.label:
            name = f"modelopt {said.label}"
        return unusable(tensors, name) if name else None
    if missing := [suffix for suffix in ("scales", "qzeros") if suffix not in tensors]:
        encoding = "" if said.encoding == FLOAT else said.encoding or ""
        return incomplete(tensors, "a qweight", missing, encoding)
    qweight, qzeros, scales = (tensors[suffix] for suffix in ("qweight", "qzeros", "scales"))
    if qweight.dtype == qzeros.dtype == "I32" and len(scales.shape) == 2:
        return unusable(tensors, "a qweight in an unknown packing", scales.shape[1])
    return unusable(tensors, f"a qweight of {qweight.dtype} with scales of {scales.dtype}")


def _eight_bits(tensors: Tensors, said: Said) -> StoredFormat | None:
    """8-bit codes beside a scale that no method serves as they are."""
    found = scaled.recognize_scaled(tensors, said)
    return found and dataclasses.replace(found, like=_LIKE.get(found.encoding, ""))


def _eight_bit_faults(stored: StoredFormat, shape: LayerShape, target: Target) -> list[Fault]:
    if stored.encoding != fp8.NAME:
        return []
    return fp8.METHOD.faults(fp8.METHOD.defaults, shape, target)


def _unknown_weight(tensors: Tensors, _said: Said) -> StoredFormat | None:
    weight = tensors.get("weight")
    if weight is None or len(weight.shape) != 2:
        return None
    return unusable(tensors, f"{weight.dtype} weights with {', '.join(sorted(tensors))}")


def is_coded(tensors: Tensors) -> bool:
    """Whether a layer's tensors look like codes, or like what is beside codes."""
    held = _without_buffers(tensors)
    return any(
        (tensor.shape and tensor.dtype in _CODE_DTYPES)
        or (len(tensor.shape) > 1 and _BESIDE_CODES.search(suffix))
        for suffix, tensor in held.items()
    )


def unrecognized(tensors: Tensors) -> StoredFormat:
    """What no format takes: it cannot be used, and its tensors are listed."""
    held = sorted(_without_buffers(tensors).items())
    listed = ", ".join(f"{suffix} {t.dtype} {list(t.shape)}" for suffix, t in held)
    text = f"its tensors are of no format that this release knows ({listed})"
    return unusable(tensors, ", ".join(suffix for suffix, _ in held), disagreements=(text,))


def _without_buffers(tensors: Tensors) -> Tensors:
    return {suffix: tensor for suffix, tensor in tensors.items() if suffix not in BUFFERS}


NAMED = Format(name="known by name only", recognize=_by_signature)
EIGHT_BITS = Format(
    name="8-bit codes beside a scale", recognize=_eight_bits, faults_as_stored=_eight_bit_faults
)
UNKNOWN_WEIGHT = Format(name="unknown weight", recognize=_unknown_weight)
