"""Method `gptq`: symmetric 4- or 8-bit integers in the GPTQ (v1) layout; weight-only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mixedprec_plugin.methods import integers, shapes
from mixedprec_plugin.methods.interface import (
    Alternative,
    Arguments,
    Fault,
    LayerShape,
    Method,
    Rounding,
    Target,
    choice,
)
from mixedprec_plugin.methods.stored import (
    FLOAT,
    Said,
    StoredFormat,
    Tensors,
    TensorSpec,
    incomplete,
    matches,
    said_keys,
    unusable,
)

NAME = "gptq"

_V1_PACKINGS = frozenset({"", "gptq", "auto_round:auto_gptq"})
V2 = "gptq_v2"
_BITS = (4, 8)
# of what config.json says of a layer that `dynamic` overrides: what it says of the others
_WHOLE = "without dynamic"


def config_arguments(arguments: Arguments, _platform: str) -> dict[str, Any]:
    """Return the constructor arguments of `GPTQMarlinConfig`.

    `dynamic` stays empty: the plan decides layer by layer.
    """
    declared = declare(arguments)
    return {
        "weight_bits": declared["bits"],
        "is_sym": declared["sym"],
        # it is asked for lm_head only where the plan quantizes it
        "lm_head_quantized": True,
        "full_config": {**declared, "lm_head": True},
        **{key: declared[key] for key in ("group_size", "desc_act", "dynamic")},
    }


def has_order(arguments: Arguments) -> bool:
    """Whether groups follow an act order; one group a column has none, whatever is stored of it.

    Marlin refuses an order of one group
    (sglang/kernels/jit/csrc/gemm/marlin/gptq_marlin.cuh:924).
    """
    return bool(arguments["desc_act"]) and arguments["group_size"] != -1


def declare(arguments: Arguments) -> dict[str, Any]:
    return {
        "quant_method": NAME,
        "checkpoint_format": NAME,
        "bits": arguments["bits"],
        "group_size": arguments["group_size"],
        "desc_act": has_order(arguments),
        "sym": arguments["sym"],
        "lm_head": False,
        "dynamic": {},
    }


def read_config(config: Mapping[str, Any], name: str) -> Said:
    """Read what config.json says of a layer, gptqmodel's `dynamic` overrides applied."""
    whole = facts = _facts(config)
    dynamic = config.get("dynamic")
    for pattern, override in dynamic.items() if isinstance(dynamic, Mapping) else ():
        if matches(re.sub(r"^\+:|^-:", "", pattern), name):
            if pattern.startswith("-:"):
                return Said(FLOAT, facts)
            if isinstance(override, Mapping):
                facts = {**whole, **_facts(override), _WHOLE: whole}
            break
    return Said(NAME, facts)


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    return integers.config_facts(config) | said_keys(config, desc_act="desc_act")


def stored(arguments: Arguments, N: int, K: int, dtype: str) -> dict[str, TensorSpec]:
    """Return the stored tensors; "qzeros" hold zero - 1, W = (qweight - zero) * scales, transposed.

    Source: `GPTQMarlinLinearScheme.create_weights` (gptq/schemes/gptq_marlin.py:88-150).
    """
    packed = 32 // arguments["bits"]
    groups = shapes.num_groups(K, arguments["group_size"])
    return {
        "qweight": TensorSpec("I32", (K // packed, N)),
        "qzeros": TensorSpec("I32", (groups, N // packed)),
        "scales": TensorSpec(dtype, (groups, N)),
        "g_idx": TensorSpec("I32", (K,)),
    }


def recognize(tensors: Tensors, said: Said) -> StoredFormat | None:
    """Take a `qweight` whose words run along K.

    Headers do not tell the zero convention (v1 stores zero - 1, v2 the zero), whether zeros are all
    the middle of the range, and the order of groups.
    """
    found = integers.packed_shapes(tensors)
    if found is None:
        return None
    (rows, columns), (zero_rows, words), (groups, N) = found
    if columns != N or zero_rows != groups or not words:
        return None
    bits, rest = divmod(32 * words, N)
    # GPTQModel writes both; what other methods call their format is none of GPTQ's
    keys = ("checkpoint_format", "packing_format", *(("format",) if said.encoding == NAME else ()))
    packing = next((str(said.config[key]) for key in keys if said.config.get(key)), "")
    K = rows * 32 // bits if bits else 0
    label = f"gptq {bits}-bit"
    group_size = shapes.group_size_of(K, groups)
    g_idx, desc_act = tensors.get("g_idx"), bool(said.facts.get("desc_act"))
    if rest or bits not in _BITS:
        return unusable(tensors, label, N, K, encoding=NAME)
    if packing not in {*_V1_PACKINGS, V2}:
        return unusable(tensors, f"{label} packed as {packing}", N, K, encoding=NAME)
    if group_size is None:
        return integers.ragged(tensors, label, N, K, groups, NAME)
    if g_idx is not None and g_idx.shape != (K,):
        text = f"its g_idx is {list(g_idx.shape)} (expected {[K]})"
        return unusable(tensors, label, N, K, encoding=NAME, disagreements=(text,))
    if desc_act and g_idx is None:
        return incomplete(tensors, f"{label} with act order", ["g_idx"], NAME)
    is_symmetric, is_v2 = bool(said.facts.get("symmetric", True)), packing == V2
    notes = {
        f"{label} group {group_size}": True,
        "asymmetric": not is_symmetric,
        "act order": desc_act,
        "v2": is_v2,
        "without g_idx": g_idx is None,
    }
    facts = {"bits": bits, "group_size": group_size}
    return METHOD.holds(
        {**facts, "sym": True, "desc_act": desc_act},
        N,
        K,
        " ".join(note for note, is_so in notes.items() if is_so),
        {*integers.PACKED, "g_idx"} & tensors.keys(),
        is_served=is_symmetric and not is_v2,
        numbers="integers",
        facts=facts,
        how={**facts, "desc_act": desc_act, "checkpoint_format": V2 if is_v2 else NAME},
        filled={"g_idx": TensorSpec("I32", (K,))} if g_idx is None else {},
    )


def complete(arguments: Arguments, stored: StoredFormat) -> Arguments:
    """Act order that the preset leaves open is as the source stores it, and none if we quantize."""
    if arguments["desc_act"] is not None:
        return arguments
    return {**arguments, "desc_act": stored.encoding == NAME and bool(stored.said.get("desc_act"))}


def why_not_repack(
    stored: StoredFormat, arguments: Arguments, _tensors: Tensors, may_round: bool
) -> str | None:
    """Say why integers in groups cannot be those of GPTQ, which are served symmetric only."""
    reason = integers.why_not_integers(stored, arguments)
    if reason != "":
        return reason
    has_order = bool(stored.said.get("desc_act"))
    if has_order and stored.encoding != NAME:
        return "its groups are in act order"
    if arguments["desc_act"] and not has_order:
        return "its groups are in no act order"
    return integers.why_not_symmetric(stored, NAME, may_round)


def faults(arguments: Arguments, shape: LayerShape, target: Target) -> list[Fault]:
    """Return what SGLang's GPTQ Marlin linear method refuses of a layer.

    Marlin's limits are its own statement: `GPTQMarlinLinearKernel` asks for it and ignores the
    answer (gpu/quantization/gptq_kernels.py:89), so a layer outside of it may fail as late as in
    the first forward pass, or by luck not at all. Nobody asks for experts (gptq/gptq.py:447). With
    act order, a rank has the scales of its own columns and needs all (gptq_moe.py:198).
    """
    packed = 32 // arguments["bits"]
    found = shapes.group_faults(arguments["group_size"], packed, packed, shape)
    if arguments["desc_act"] and shape.is_expert and shape.tp_size > 1:
        found.append(f"act order of experts cannot be split over {shape.tp_size} ranks")
    if target.device == "cuda":
        found += shapes.marlin_faults(arguments["group_size"], shape)
        if has_order(arguments) and arguments["group_size"] == shape.K:
            found.append(f"act order needs more than one group along K = {shape.K}")
    return shapes.shape_faults(found)


def faults_as_stored(stored: StoredFormat, shape: LayerShape, target: Target) -> list[Fault]:
    """Return what SGLang does not ask for experts: their shape, and `dynamic` (gptq.py:447)."""
    known = {**stored.facts, **stored.said}
    arguments = {key: known.get(key, default) for key, default in METHOD.defaults.items()}
    arguments["group_size"] = stored.K if stored.is_one_group else stored.facts["group_size"]
    found = faults(arguments, shape, target)
    whole = stored.said.get(_WHOLE, {})
    # one group has no order
    order = () if whole.get("group_size") == -1 else ("desc_act",)
    texts = [
        f"config.json's dynamic says {key} {stored.said[key]} of its experts, and SGLang does not "
        f"ask it for experts: it would run them with {key} {whole.get(key)}"
        for key in ("bits", "group_size", *order)
        if whole and stored.said.get(key) != whole.get(key)
    ]
    return found + shapes.shape_faults(texts)


def rounding(arguments: Arguments) -> Rounding:
    """Eight bits rank above block INT8: finer scales, and activations are not quantized."""
    bits, size = arguments["bits"], arguments["group_size"]
    return Rounding(
        rank=(8.3 if bits == 8 else 4.4) + integers.group_rank(size),
        limit=integers.limit(bits, size),
        error=lambda _N, K: integers.symmetric_error(bits, integers.elements(size, K)),
    )


def why_not_quantize(arguments: Arguments) -> str:
    """Act order sorts columns by activation size, which only calibration knows."""
    if arguments["desc_act"]:
        return "desc_act: true needs a source that was quantized with act order"
    return ""


# 8-bit codes with one scale for each output feature: finer groups earn little
_BYTES = {"bits": 8, "group_size": -1}

METHOD = Method(
    name=NAME,
    title="symmetric 4- or 8-bit integers in groups along K, GPTQ layout",
    description="Symmetric 4- or 8-bit integers in groups along K, in GPTQ's layout. Weight-only: "
    "activations stay in 16 bits.",
    aliases={
        **{alias: {"bits": 4} for alias in ("gptq_int4", "gptq_4bit", "int4_gptq")},
        **{alias: {"bits": 8} for alias in ("gptq_int8", "gptq_8bit", "int8_gptq")},
        "gptq_marlin": {},
    },
    schema={
        "bits": choice("Bits a weight.", [4, 8]),
        "group_size": integers.GROUP_SIZE_SCHEMA,
        "sym": choice(
            "The zero point is the middle of the range; SGLang's GPTQ kernels take no other.",
            [True],
        ),
        "desc_act": choice(
            "Act order: columns were quantized in the order of their activations' "
            "size. null: as the source stores it, and without where a layer is quantized at load. "
            "true needs a source that has it.",
            [None, False, True],
        ),
        "rounding": integers.ROUNDING_SCHEMA,
    },
    stored=stored,
    recognize=recognize,
    read_config={NAME: read_config},
    declare=declare,
    faults=faults,
    rounding=rounding,
    serves_heads=True,
    searched=(*({"bits": 4, "group_size": size} for size in (128, 64, 32)), _BYTES),
    alternatives=(
        Alternative(NAME, integers.GROUP_SIZES),
        Alternative("awq", integers.GROUP_SIZES),
        Alternative("fp8"),
    ),
    config_classes={
        "cuda": "sglang.srt.layers.quantization.gptq.gptq:GPTQMarlinConfig",
        "cpu": "mixedprec_plugin.methods.gptq.sglang:CpuGPTQConfig",
    },
    config_arguments=config_arguments,
    codec="mixedprec_plugin.methods.gptq.codec",
    min_capability=80,
    why_not_repack=why_not_repack,
    complete=complete,
    faults_as_stored=faults_as_stored,
    why_not_quantize=why_not_quantize,
    quantizes_parts=True,
    sglang="mixedprec_plugin.methods.gptq.sglang",
    kernel=lambda _arguments, _shape, _capability: "Marlin",
    moe_kernels="marlin",
)
