"""Method `humming`: symmetric integers of 2 to 8 bits in groups along K; weight-only."""

from __future__ import annotations

import math
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
    FLOAT_DTYPES,
    Said,
    StoredFormat,
    Tensors,
    TensorSpec,
    unusable,
)

NAME = "humming"

_MATRIX = ("weight", "weight_scale")
_SIZES = (128, 64, 32)
_GROUP_SIZES = tuple({"group_size": size} for size in _SIZES)
# humming-kernels' names of what it reads in config.json (humming/schema/humming.py, KWARGS_ALIAS)
_DTYPE_KEYS = ("b_dtype", "weight_dtype", "dtype")
_GROUP_KEYS = ("weight_scale_group_size", "group_size")
# it pads the rest with zeros; outputs that it writes are whole vectors (kernel/humming.py:323)
_UNIT_N = 8
BF16_CAPABILITY = 80


def declare(arguments: Arguments) -> dict[str, Any]:
    """Return what config.json's `quantization_config` says of such a checkpoint.

    In the names that are the weights' alone: `dtype` and `group_size` are taken for those of
    activations, too.
    """
    return {
        "quant_method": NAME,
        "b_dtype": f"uint{arguments['bits']}",
        "weight_scale_group_size": arguments["group_size"],
    }


def read_config(config: Mapping[str, Any], _name: str) -> Said:
    dtype = next((str(config[key]) for key in _DTYPE_KEYS if config.get(key)), "")
    size = next((config[key] for key in _GROUP_KEYS if config.get(key)), -1)
    facts: dict[str, Any] = {"group_size": size, "symmetric": not config.get("has_zero_point")}
    if found := re.fullmatch(r"u?int([2-8])", dtype):
        facts["bits"] = int(found.group(1))
    return Said(NAME, facts, dtype, ignores="within")


def codes_a_word(bits: int) -> int:
    """Input features that fill whole int32 words."""
    return 32 // math.gcd(32, bits)


def stored(arguments: Arguments, N: int, K: int, dtype: str) -> dict[str, TensorSpec]:
    """Return the stored tensors; W = (q - 2**(bits-1)) * weight_scale, q a stream of bits along K.

    Source: `HummingWeightSchema.get_tensors_attrs` (humming-kernels 0.1.12, humming/schema/
    humming.py), which `HummingLinearMethod.create_weights` asks (quantization/humming.py:861).
    """
    groups = shapes.num_groups(K, arguments["group_size"])
    return {
        "weight": TensorSpec("I32", (N, K * arguments["bits"] // 32)),
        "weight_scale": TensorSpec(dtype, (N, groups)),
    }


def recognize(tensors: Tensors, said: Said) -> StoredFormat | None:
    """Take words beside scales, where config.json tells how many bits a code has: they do not."""
    if said.encoding != NAME or any(suffix not in tensors for suffix in _MATRIX):
        return None
    weight, scale = (tensors[suffix] for suffix in _MATRIX)
    is_matrix = len(weight.shape) == 2 and len(scale.shape) == 2
    if weight.dtype != "I32" or scale.dtype not in FLOAT_DTYPES or not is_matrix:
        return None
    bits, (N, words) = said.facts.get("bits"), weight.shape
    if bits is None:
        return unusable(tensors, f"{NAME} {said.label or 'of unknown bits'}", N, encoding=NAME)
    K, rest = divmod(32 * words, bits)
    label = f"{NAME} {bits}-bit"
    groups = scale.shape[1]
    group_size = shapes.group_size_of(K, groups)
    if rest or scale.shape[0] != N or not words:
        text = f"its weight is {list(weight.shape)} and its weight_scale {list(scale.shape)}"
        return unusable(tensors, label, N, encoding=NAME, disagreements=(text,))
    if group_size is None:
        return integers.ragged(tensors, label, N, K, groups, NAME)
    # of one group of the size that is said, all of K is another word for it
    group_size = K if group_size == -1 and said.facts.get("group_size") == K else group_size
    arguments = {"bits": bits, "group_size": group_size}
    return METHOD.holds(
        arguments,
        N,
        K,
        f"{label} group {group_size}",
        _MATRIX,
        is_served=group_size in _SIZES and bool(said.facts["symmetric"]),
        numbers="integers",
        facts={**arguments, "symmetric": True},
        how=arguments,
    )


def why_not_repack(
    stored: StoredFormat, arguments: Arguments, _tensors: Tensors, may_round: bool
) -> str | None:
    """Say why integers in groups cannot be those of humming, which are symmetric and in order."""
    reason = integers.why_not_integers(stored, arguments, has_words_along_n=False)
    if reason != "":
        return reason
    if stored.said.get("desc_act"):
        return "its groups are in act order"
    return integers.why_not_symmetric(stored, NAME, may_round)


def faults(arguments: Arguments, shape: LayerShape, target: Target) -> list[Fault]:
    """Return what SGLang's humming linear method refuses of a layer.

    Groups and words are whole on every rank; the kernel pads to its tiles, 256 outputs and 128
    inputs (quantization/humming.py:951), and stores outputs in vectors (humming-kernels,
    kernel/humming.py:323, which asserts). bfloat16 is refused before 8.0 (:378).

    SGLang's class for experts (humming.py:985) reads the same codes; its kernels for them were
    neither compiled nor compared here, and the CPU platform has no counterpart.
    """
    if shape.is_expert:
        text = (
            f"{NAME} is served in linear layers alone: its kernels for experts were not tried here"
        )
        return [Fault("shape", text)]
    found = shapes.group_faults(arguments["group_size"], 1, codes_a_word(arguments["bits"]), shape)
    if target.device == "cuda":
        found += shapes.output_faults(shape, _UNIT_N, "the outputs that humming's kernel stores")
    gpu = target.gpu
    if gpu is None or gpu.capability >= BF16_CAPABILITY or shape.dtype != "BF16":
        return shapes.shape_faults(found)
    text = f"{NAME} does not run in bfloat16 on this GPU (expected float16)"
    return [*shapes.shape_faults(found), Fault("gpu", text)]


def rounding(arguments: Arguments) -> Rounding:
    """As GPTQ's of as many bits."""
    bits, size = arguments["bits"], arguments["group_size"]
    return Rounding(
        rank=bits + 0.35 + integers.group_rank(size),
        limit=min(max(3.5 * integers.symmetric_error(bits, max(_SIZES)), 0.05), 0.9),
        error=lambda _N, _K: integers.symmetric_error(bits, size),
    )


METHOD = Method(
    name=NAME,
    title="symmetric integers of 2 to 8 bits in groups along K",
    description="Symmetric integers of 2 to 8 bits in groups along K, in the layout of "
    "humming-kernels, which SGLang brings along. Weight-only: activations stay in 16 bits.",
    aliases={f"{NAME}_int{bits}": {"bits": bits} for bits in range(2, 9)},
    schema={
        "bits": choice("Bits a weight; gptq and awq have 4 and 8, too.", [6, 5, 3, 2, 4, 7, 8]),
        "group_size": choice(
            "Input features (along K) that share a scale; must divide K, and K per rank under "
            "tensor parallelism. Smaller groups are more precise and cost more bits a weight.",
            _SIZES,
        ),
        "rounding": integers.ROUNDING_SCHEMA,
    },
    stored=stored,
    recognize=recognize,
    read_config={NAME: read_config},
    declare=declare,
    faults=faults,
    rounding=rounding,
    # between the 4 bits of awq and the 8 of others, and below
    searched=tuple({"bits": bits, "group_size": size} for bits in (3, 5, 6) for size in (128, 64)),
    alternatives=(
        Alternative(NAME, _GROUP_SIZES),
        Alternative("gptq", integers.GROUP_SIZES),
        Alternative("awq", integers.GROUP_SIZES),
        Alternative("fp8"),
    ),
    config_classes={
        "cuda": "mixedprec_plugin.methods.humming.sglang:HummingConfig",
        "cpu": "mixedprec_plugin.methods.humming.sglang:CpuHummingConfig",
    },
    config_arguments=lambda arguments, _platform: {"full_config": declare(arguments)},
    codec="mixedprec_plugin.methods.humming.codec",
    why_not_repack=why_not_repack,
    quantizes_parts=True,
    sglang="mixedprec_plugin.methods.humming.sglang",
    kernel=lambda _arguments, _shape, _capability: NAME,
)
