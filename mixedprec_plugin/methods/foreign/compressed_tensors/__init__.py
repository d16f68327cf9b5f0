"""compressed-tensors: what llm-compressor writes, and what stock SGLang and vLLM load.

Its pack-quantized holds integers packed along K:

    weight_packed      I32 [N, K/(32/bits)] holding q + 2**(bits-1), low bits first
    weight_scale       [N, K/G]
    weight_shape       I64 [2]
    weight_zero_point  I32 [N/(32/bits), K/G], packed along N, or (older) I8 [N, K/G]
    weight_g_idx       I32 [K], where groups are in activation order

Its nvfp4- and mxfp4-pack-quantized are told in `fp4`. Its int-, float- and naive-quantized are
8-bit weights beside a scale: see `methods.scaled`.
Source: compressed-tensors `QuantizationConfig` and `PackedQuantizationCompressor`, and what SGLang
0.5.23 makes of them (layers/quantization/compressed_tensors/compressed_tensors.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mixedprec_plugin.checkpoint.values import Values
from mixedprec_plugin.methods import gptq, integers
from mixedprec_plugin.methods.foreign.compressed_tensors import fp4
from mixedprec_plugin.methods.interface import Fault, Format, LayerShape, Target
from mixedprec_plugin.methods.shapes import group_size_of, marlin_faults, num_groups, shape_faults
from mixedprec_plugin.methods.stored import (
    FLOAT,
    FLOAT_DTYPES,
    Said,
    StoredFormat,
    Tensors,
    TensorSpec,
    block_of,
    incomplete,
    matches,
    said_keys,
    strings,
    unusable,
)

NAME = "compressed-tensors"
PACKED = "pack-quantized"
# encoding of 8-bit codes -> the type of number, and the format
_KINDS = {"fp8": ("float", "float-quantized"), "int8": ("int", "int-quantized")}
_ENCODINGS = {
    **{label: label for label in (PACKED, fp4.PACKED, fp4.MX_PACKED)},
    **{label: encoding for encoding, (_, label) in _KINDS.items()},
    "dense": FLOAT,
}
CODEC = "mixedprec_plugin.methods.foreign.compressed_tensors.codec"
_CODES = "weight_packed"


def read_config(config: Mapping[str, Any], name: str) -> Said:
    """Read what config.json says of a layer, by the group whose targets it is of."""
    groups = config.get("config_groups")
    group = _group_of(groups, name) if isinstance(groups, Mapping) else None
    weights = group.get("weights") if group else None
    if group is None or not isinstance(weights, Mapping):
        return Said()
    label = str(group.get("format") or config.get("format") or "")
    kind = f"{weights.get('type', 'int')}{weights.get('num_bits', 8)}"
    naive = {"float8": "fp8", "int8": "int8"}.get(kind)
    strategy, block = weights.get("strategy"), block_of(weights.get("block_structure"))
    facts = said_keys(weights, bits="num_bits", symmetric="symmetric", strategy="strategy")
    if strategy in ("group", "tensor_group"):
        facts |= said_keys(weights, group_size="group_size")
    elif strategy == "channel" and label == PACKED:
        facts["group_size"] = -1
    elif strategy == "block" and block:
        facts["block"] = block
    facts |= said_keys(weights, actorder="actorder")
    if weights.get("actorder") in ("group", "dynamic", True):
        facts["desc_act"] = True
    inputs = group.get("input_activations")
    facts["inputs"] = (
        {"dynamic": inputs.get("dynamic") is True, "group_size": inputs.get("group_size")}
        if isinstance(inputs, Mapping)
        else None
    )
    encoding = naive if label == "naive-quantized" else _ENCODINGS.get(label)
    # the tool writes containers into `ignore`, whose layers are quantized (utils.py:91)
    return Said(encoding, facts, label, ignores="named")


def _group_of(groups: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The group of a layer: by its name, then by a pattern, then by its class.

    Source: compressed-tensors `match_targets`, which sorts patterns.
    """
    found: list[tuple[int, str, Mapping[str, Any]]] = []
    for group in groups.values():
        for target in strings(group.get("targets")) if isinstance(group, Mapping) else ():
            is_pattern = target.startswith("re:")
            if target == name or (is_pattern and matches(target[3:], name)):
                found.append((int(is_pattern), target, group))
            elif target == "Linear":
                found.append((2, target, group))
    return min(found, key=lambda entry: entry[:2])[2] if found else None


def _bits_of(tensors: Tensors, said: Mapping[str, Any]) -> int | None:
    """The bits of a code: as config.json says, or as many as K, which is told, leaves."""
    bits, size, num_words = said.get("bits"), said.get("group_size"), tensors[_CODES].shape[1]
    if bits is not None:
        return bits if isinstance(bits, int) else None
    shape = tensors.get("weight_shape")
    if shape is not None and shape.shape == (2,) and Values.can_read(shape):
        K = int(Values().of(shape)[1])
    else:
        K = tensors["weight_scale"].shape[-1] * size if isinstance(size, int) else 0
    return num_words * 32 // K if K > 0 and num_words * 32 % K == 0 else None


def recognize(tensors: Tensors, said: Said) -> StoredFormat | None:
    """Tell how a layer with a `weight_packed` is stored."""
    packed, scale = tensors.get(_CODES), tensors.get("weight_scale")
    if packed is None:
        return None
    if "meta" in tensors:
        return unusable(tensors, "compressed-tensors marlin-24")
    if packed.dtype == "U8":
        return fp4.recognize(tensors)
    if scale is None:
        return incomplete(tensors, PACKED, ["weight_scale"], PACKED)
    if packed.dtype != "I32" or len(packed.shape) != 2 or scale.dtype not in FLOAT_DTYPES:
        return unusable(tensors, f"{PACKED} {packed.dtype} with scales of {scale.dtype}")
    N, num_words = packed.shape
    bits = _bits_of(tensors, said.of(PACKED))
    if bits is None:
        return unusable(tensors, f"{PACKED} in bits that config.json does not tell", N)
    if bits not in (4, 8):
        return unusable(tensors, f"{PACKED} {bits}-bit", N, encoding=PACKED)
    K = num_words * 32 // bits
    if len(scale.shape) != 2 or scale.shape[0] != N:
        text = f"its weight_scale is {list(scale.shape)} (expected [{N}, groups])"
        return unusable(tensors, PACKED, N, K, encoding=PACKED, disagreements=(text,))
    groups, label = scale.shape[1], f"{PACKED} {bits}-bit"
    group_size = group_size_of(K, groups)
    if group_size is None:
        return integers.ragged(tensors, label, N, K, groups, PACKED)
    said_size = said.of(PACKED).get("group_size", group_size)
    if "weight_shape" not in tensors and said_size not in (group_size, K, -1):
        # one of the two is wrong, and nothing else tells K
        text = f"{label} in groups of {group_size}, not {said_size}, or in other bits"
        return unusable(tensors, text, N, encoding=PACKED)
    zeros = tensors.get("weight_zero_point")
    layouts = {("I32", (-(-N * bits // 32), groups)), ("I8", (N, groups))}
    if zeros is not None and (zeros.dtype, zeros.shape) not in layouts:
        text = f"its weight_zero_point is {zeros.dtype} {list(zeros.shape)}"
        return unusable(tensors, PACKED, N, K, encoding=PACKED, disagreements=(text,))
    notes = {
        f"{label} group {group_size}": True,
        "asymmetric": zeros is not None,
        "act order": "weight_g_idx" in tensors,
    }
    matrix = {_CODES, "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"}
    return StoredFormat(
        "",
        {},
        N,
        K,
        " ".join(note for note, is_so in notes.items() if is_so),
        encoding=PACKED,
        numbers="integers",
        facts={"group_size": group_size, "symmetric": zeros is None},
        suffixes=frozenset((matrix | {"input_scale", "input_zero_point"}) & tensors.keys()),
        codec=CODEC,
        how={"bits": bits, "group_size": group_size},
        like=gptq.NAME,
        limit=integers.limit(bits, group_size),
    )


def faults(stored: StoredFormat, shape: LayerShape, target: Target) -> list[Fault]:
    """What SGLang's class for experts in integers takes and computes wrongly.

    Source: SGLang 0.5.23. Zero points are stored packed along N, [N / 8, K / G], and are neither
    turned (moe/fused_moe_triton/layer.py:1365) nor told from AWQ's, which are interleaved
    (compressed_tensors_wNa16_moe.py:387). With any actorder but `static` a rank has the scales of
    all groups, of which the loader fills its share (:141; layer.py:948), and `group` alone, not its
    other name, `dynamic`, is asked for (:310). Marlin's kernels are not asked for the shape, and
    take the repacked gate and up codes' width for K where one group is all of it (:370). On compute
    capability 10.0 symmetric int4 in groups of 32 or 128, in no actorder, runs in Triton's kernel
    (compressed_tensors.py:660).
    """
    if target.device != "cuda" or not shape.is_expert:
        return []
    if stored.numbers == "fp4":
        return fp4.faults(stored, shape, target)
    if stored.numbers != "integers":
        return []
    texts = []
    size, bits = stored.said.get("group_size", stored.facts["group_size"]), stored.how["bits"]
    order = stored.said.get("actorder")
    if not stored.facts["symmetric"]:
        texts.append("SGLang reads the zero points of such experts as if they were AWQ's")
    if order == "dynamic":
        texts.append("SGLang ignores the order of groups of such experts unless actorder is group")
    elif order and order != "static" and size != -1 and shape.tp_size > 1:
        texts.append(
            f"SGLang makes room for all scales on each of {shape.tp_size} ranks, and fills a part "
            f"of it, where config.json says actorder: {json.dumps(order)}"
        )
    is_sm100 = target.gpu is not None and target.gpu.capability == 100
    if not (is_sm100 and not texts and not order and bits == 4 and size in (32, 128)):
        texts += marlin_faults(size, shape)
        if size == shape.K and len(shape.shard_sizes) > 1:
            texts.append(f"SGLang turns the scales of one group of {size} inputs")
    return shape_faults(texts)


def why_not_written(stored: StoredFormat, *, is_expert: bool) -> str:
    """Say why SGLang's reader does not take numbers that a method serves; empty if it does."""
    if stored.numbers == "fp4":
        return fp4.why_not_written(stored)
    if stored.numbers == "scaled":
        # compressed_tensors.py:836 and :983, below layers/quantization/compressed_tensors
        is_block = stored.facts["strategy"] == "block"
        is_read = stored.encoding == "fp8" or not (is_block or is_expert)
        where = "for experts" if is_expert else "in blocks"
        return "" if is_read else f"SGLang reads no INT8 {where} there"
    if (bits := stored.facts["bits"]) not in (4, 8):
        # WNA16_SUPPORTED_BITS of compressed_tensors.py
        return f"SGLang reads no integers of {bits} bits there"
    if stored.said.get("desc_act"):
        return "its groups are in act order"
    if is_expert and not is_written_symmetric(stored):
        return "SGLang reads no experts with zero points there"
    return ""


def codec_of(stored: StoredFormat) -> str:
    """The lazy module whose `write` gives a layer's numbers in this form."""
    return fp4.CODEC if stored.numbers == "fp4" else CODEC


def is_written_symmetric(stored: StoredFormat) -> bool:
    """Whether zero points are all the middle of the range, and left out."""
    return bool(stored.said.get("symmetric", True))


def written(stored: StoredFormat, served: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The tensors in which `codec.write` gives the numbers of a layer that a method serves."""
    N, K = stored.N, stored.K
    if stored.numbers == "fp4":
        return fp4.written(served)
    if stored.numbers == "scaled":
        scale = served[stored.how["scale"]]
        scale = scale._replace(shape=scale.shape or (1,))
        inputs = {"input_scale": TensorSpec("F32", (1,))} if "input_scale" in served else {}
        return {"weight": served["weight"], "weight_scale": scale, **inputs}
    bits = stored.facts["bits"]
    groups = num_groups(K, stored.facts["group_size"])
    scales = served["scales"] if "scales" in served else served["weight_scale"]
    tensors = {
        "weight_packed": TensorSpec("I32", (N, K * bits // 32)),
        "weight_scale": TensorSpec(scales.dtype, (N, groups)),
        "weight_shape": TensorSpec("I64", (2,)),
    }
    if not is_written_symmetric(stored):
        tensors["weight_zero_point"] = TensorSpec("I32", (N * bits // 32, groups))
    return tensors


def group_for(stored: StoredFormat, served: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """One `config_groups` entry, without its targets; arguments as of `written`."""
    facts = stored.facts
    if stored.numbers == "fp4":
        weights = _arguments(**fp4.BLOCKS)
        inputs = _arguments(**fp4.BLOCKS, **fp4.INPUTS) if "input_scale" in served else None
        return {"format": fp4.PACKED, "weights": weights, "input_activations": inputs}
    if stored.numbers == "integers":
        size = stored.said.get("group_size", facts["group_size"])
        weights = _arguments(
            num_bits=facts["bits"],
            type="int",
            symmetric=is_written_symmetric(stored),
            strategy="channel" if size == -1 else "group",
            group_size=None if size == -1 else size,
        )
        return {"format": PACKED, "weights": weights, "input_activations": None}
    strategy, is_dynamic = facts["strategy"], "input_scale" not in served
    block = facts.get("block")
    kind, label = _KINDS[stored.encoding]
    weights = _arguments(num_bits=8, type=kind, strategy=strategy, block_structure=block)
    inputs = _arguments(
        num_bits=8,
        type=kind,
        strategy="group" if block else "token" if is_dynamic else "tensor",
        group_size=block[1] if block else None,
        dynamic=is_dynamic,
    )
    return {"format": label, "weights": weights, "input_activations": inputs}


def _arguments(**given: Any) -> dict[str, Any]:
    """compressed-tensors' `QuantizationArgs`, as far as readers look at them."""
    unset = dict.fromkeys(("group_size", "block_structure", "actorder"))
    return {"symmetric": True, "dynamic": False, **unset, **given}


FORMAT = Format(
    name=NAME,
    recognize=recognize,
    read_config=dict.fromkeys((NAME, NAME.replace("-", "_")), read_config),
    faults_as_stored=faults,
)
