"""From a layer's stored form and its scheme to what is served: decided here, once.

    as stored    the tensors are what the scheme runs
    cast         floats of another dtype
    quantize     floats, rounded to the scheme's codes
    dequantize   codes, to be served unquantized
    repack       codes of another format that holds the same numbers; nothing is lost
    requantize   codes of another format, dequantized and rounded a second time
    calibrate    nothing is stored; a conversion computes it from text
    impossible   none of these, for reasons that come with remedies

Decided from headers and config.json. What only the values tell (zero points that are all the middle
of the range, a g_idx that is in order) is checked when they are read.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from mixedprec_plugin.families.config import Config, is_half_precision
from mixedprec_plugin.families.names import KV_SUFFIXES, NEVER_QUANTIZED, Kind
from mixedprec_plugin.families.table import family_of
from mixedprec_plugin.methods.cards import served_dtype, to_dequantize
from mixedprec_plugin.methods.interface import Fault, Target
from mixedprec_plugin.methods.registry import AUTO, METHODS, UNQUANTIZED
from mixedprec_plugin.methods.stored import FLOAT_DTYPES, StoredFormat, Tensors, TensorSpec
from mixedprec_plugin.preset.model import Rule, Scheme

Action = Literal[
    "as stored", "cast", "quantize", "dequantize", "repack", "requantize", "calibrate",
    "impossible",
]  # fmt: skip

_FLOATS = frozenset({"BF16", "F16", "F32", "F64"})
# SGLang keeps some routers in float32 (models/glm4_moe.py:391, models/deepseek_v2.py:520), and a
# draft model is loaded from what is stored
_UNCAST = frozenset({"router", "draft"})
_OTHER_FORMAT = "take a checkpoint in another format"


class Asked(NamedTuple):
    """What a layer is to become, and what there is of it: `tensors`, by their suffixes.

    Attributes:
        scheme: None for what is never quantized.
        rule: the rule that decides; None where none matches.
        stored: the format of its weight in its source.
    """

    scheme: Scheme | None
    rule: Rule | None
    stored: StoredFormat | None
    tensors: Tensors
    kind: Kind


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What layers that are alike become, as `PlannedLayer` has it.

    Attributes:
        outputs: parameter suffix -> what is served.
        reasons: why it is impossible; empty if it is not.
    """

    action: Action
    outputs: Mapping[str, TensorSpec]
    bytes_before: int
    bytes_after: int
    reasons: tuple[Fault, ...] = ()


class Conversions:
    """What each layer of a model becomes; layers that are alike share it."""

    def __init__(self, target: Target, config: Config) -> None:
        self._target = target
        self._float32 = re.compile(family_of(config).float32)
        self._is_half = is_half_precision(config)
        self._known: dict[object, Conversion] = {}

    def of(self, asked: Asked) -> Conversion:
        """What a layer becomes."""
        # layers share a format only where their tensors have the same dtypes and shapes
        alike: object = id(asked.stored)
        if asked.stored is None:
            alike = tuple([(suffix, t.dtype, t.shape) for suffix, t in asked.tensors.items()])
        kept = self._kept(asked)
        suffixes, rule = tuple(asked.tensors), asked.rule
        key = suffixes, id(asked.scheme), alike, asked.kind, rule is None, is_auto(rule), kept
        if key not in self._known:
            self._known[key] = self._decide(asked, kept)
        return self._known[key]

    def _kept(self, asked: Asked) -> frozenset[str]:
        """The tensors that are not cast, which those of matrices and usual norms always are.

        What else is float32 in a checkpoint of 16 bits is meant to be, and weight loaders cast it
        where SGLang's parameter is narrower.
        """
        if asked.kind in _UNCAST:
            return frozenset(asked.tensors)
        if asked.kind in ("linear", "expert"):
            return KV_SUFFIXES
        is_bare = asked.stored is None and self._is_half
        return KV_SUFFIXES | frozenset(
            suffix
            for suffix, tensor in asked.tensors.items()
            if self._float32.search(tensor.name)
            or (is_bare and tensor.dtype == "F32" and not tensor.name.endswith("norm.weight"))
        )

    def _decide(self, asked: Asked, kept: frozenset[str]) -> Conversion:
        scheme, _, stored, tensors, kind = asked
        action: Action = "as stored"
        reasons: tuple[Fault, ...] = ()
        if stored is not None and kind != "draft":
            if scheme is not None:
                action = action_of(scheme, stored, tensors, self._target.dtype)
            reason = _why_impossible(action, asked, stored, self._target)
            reasons = (reason,) if reason else ()
        outputs = self._outputs(action, asked, kept)
        if not reasons and action == "as stored" and scheme is not None and stored is not None:
            reasons = tuple(_misfits(scheme, stored, tensors, outputs))
        return Conversion(
            "impossible" if reasons else action,
            MappingProxyType(outputs),
            sum(tensor.num_bytes for tensor in tensors.values()),
            sum(spec.num_bytes for spec in outputs.values()) if kind != "draft" else 0,
            reasons,
        )

    def _outputs(self, action: Action, asked: Asked, kept: frozenset[str]) -> dict[str, TensorSpec]:
        """The method's tensors, then those beside the matrix (biases)."""
        scheme, _, stored, tensors, _ = asked
        dtype = self._target.dtype
        outputs: dict[str, TensorSpec] = {}
        replaced: frozenset[str] = frozenset()
        if scheme is not None and stored is not None:
            if stored.N:
                method = METHODS[scheme.method]
                outputs |= method.stored(scheme.arguments, stored.N, stored.K, dtype)
            if action != "as stored":
                replaced = stored.suffixes
            elif scheme.method == AUTO:
                own = {s: t for s, t in tensors.items() if s in stored.suffixes}
                outputs |= {s: TensorSpec(t.dtype, t.shape) for s, t in own.items()}
                outputs |= stored.filled
        for suffix, tensor in tensors.items():
            if suffix not in replaced and suffix not in outputs:
                is_cast = tensor.dtype in _FLOATS and suffix not in kept
                outputs[suffix] = TensorSpec(dtype if is_cast else tensor.dtype, tensor.shape)
        return outputs


def is_auto(rule: Rule | None) -> bool:
    """Whether a rule says `auto` of a layer, whatever it runs in."""
    return rule is not None and rule.scheme.method == AUTO


def action_of(scheme: Scheme, stored: StoredFormat, tensors: Tensors, dtype: str) -> Action:
    """Tell how a layer becomes what its scheme runs, in a model of a dtype, `BF16` or `F16`."""
    if scheme.method == UNQUANTIZED:
        if not stored.is_float:
            return "dequantize"
        is_served = stored.arguments["dtype"] == FLOAT_DTYPES.get(dtype) and not stored.is_composed
        return "as stored" if is_served else "cast"
    if scheme.method == AUTO:
        return "as stored"
    if stored.is_float:
        return "quantize"
    if stored.method == scheme.method and not _different_arguments(stored, scheme):
        return "as stored"
    if _why_not_repack(scheme, stored, tensors) == "":
        return "repack"
    return "requantize" if scheme.requantize and stored.is_readable else "impossible"


def _why_not_repack(scheme: Scheme, stored: StoredFormat, tensors: Tensors) -> str | None:
    if stored.is_composed:
        return f"no method multiplies by {stored.factor or 'the matrices of transform_config'}"
    method = METHODS[scheme.method]
    return method.why_not_repack(stored, scheme.arguments, tensors, scheme.requantize)


def _different_arguments(stored: StoredFormat, scheme: Scheme) -> Mapping[str, Any]:
    """Arguments on which a layer of the right method is stored otherwise -> how it is stored."""
    asked = METHODS[scheme.method].complete(scheme.arguments, stored)

    def plain(value: Any) -> Any:
        # a group of all of K is K
        return stored.K if value == -1 else value

    return {
        key: value
        for key, value in stored.arguments.items()
        if plain(asked.get(key)) != plain(value)
    }


def _why_impossible(
    action: Action, asked: Asked, stored: StoredFormat, target: Target
) -> Fault | None:
    scheme, rule, _, tensors, kind = asked
    described = f"is stored as {stored.description}"
    bf16 = f"{to_dequantize(target.dtype)} to dequantize it"
    if stored.obstacle:
        text = f"{described}, and {stored.obstacle}"
        return Fault("stored-format", text, "take it from another source")
    if scheme is None:
        remedy = f"match it with {bf16}" if stored.is_readable else _OTHER_FORMAT
        text = f"{described}: {NEVER_QUANTIZED[kind]}"
        return None if stored.is_float else Fault("stored-format", text, remedy)
    why_not_auto = None if stored.is_float else _why_not_auto(stored, target, described)
    if is_auto(rule) and not stored.is_float:
        return why_not_auto
    auto = "" if why_not_auto else "match it with method: auto to serve it as it is, "
    served = FLOAT_DTYPES[target.dtype]
    wanted = scheme.arguments.get("dtype")
    if scheme.method == UNQUANTIZED and wanted not in (None, served):
        gpu = target.gpu
        has_it = gpu is None or wanted == "float16" or served_dtype("BF16", gpu.capability) != "F16"
        remedy = f"start with --dtype {wanted}, or " if has_it else ""
        text = f"the model runs in {served}, not in {scheme.label}"
        return Fault("dtype", text, f"{remedy}write method: unquantized")
    if not stored.is_readable:
        text = f"{described}, which this release does not read"
        return Fault("stored-format", text, f"{auto}{'or ' if auto else ''}{_OTHER_FORMAT}")
    if not stored.method and (action == "impossible" or rule is None):
        reason = _why_not_repack(scheme, stored, tensors)
        text = f"{described}, which no method serves as it is{f': {reason}' if reason else ''}"
        again = "" if rule is None else ", or write requantize: true"
        ways = (auto or "match it with ") + f"{'or ' if auto and not again else ''}{bf16}"
        return Fault("stored-format", text, f"{ways}{again}")
    if action == "impossible":
        return _mismatch(scheme, stored, tensors, described, bf16)
    return _why_not_quantize(scheme) if action in ("quantize", "requantize") else None


def _why_not_quantize(scheme: Scheme) -> Fault | None:
    spec = METHODS[scheme.method]
    if not spec.codec:
        return Fault("conversion", f"{scheme.method} cannot quantize at load", "use another method")
    reason = spec.why_not_quantize(scheme.arguments)
    text = f"cannot be quantized at load: {reason}"
    return Fault("conversion", text, "change that argument") if reason else None


def _why_not_auto(stored: StoredFormat, target: Target, described: str) -> Fault | None:
    """Why a layer cannot run as it is stored; what SGLang's class says is found at load."""
    if target.device == "cpu":
        remedy = "name another method or source for it to try the rest"
        text = f"{described}, which the CPU platform does not read"
        return None if stored.is_readable else Fault("stored-format", text, remedy)
    bf16 = f"match it with {to_dequantize(target.dtype)} to dequantize it"
    if stored.no_class:
        remedy = bf16 if stored.is_readable else _OTHER_FORMAT
        if stored.method:
            remedy = f"write {_as_written(stored)}"
        return Fault("stored-format", f"{described}, and {stored.no_class}", remedy)
    if stored.format and stored.disagreements:
        text = f"{stored.disagreements[0]}, which method: auto would go by"
        return Fault("auto-config", text, "correct config.json, or name the layer's method")
    if stored.is_composed:
        text = f"{described}, which SGLang's class would leave out"
        return Fault("auto-config", text, bf16)
    return None


def _mismatch(
    scheme: Scheme, stored: StoredFormat, tensors: Tensors, described: str, bf16: str
) -> Fault:
    if stored.method != scheme.method:
        reason = _why_not_repack(scheme, stored, tensors)
        text = f"{described}, not as {scheme.label} asks ({scheme.method})"
        remedy = (
            f"write {_as_written(stored)}, {bf16.removeprefix('method: ')}, or requantize: true to "
            f"have it in {scheme.label} with a second rounding"
        )
        return Fault("stored-format", f"{text}: {reason}" if reason else text, remedy)
    different = _different_arguments(stored, scheme)
    asked = ", ".join(f"{key}: {scheme.arguments[key]}" for key in different)
    # a name such as fp8_block would contradict what it implies
    implied = {key for given in METHODS[scheme.method].aliases.values() for key in given}
    remedy = f"write {_as_written(stored) if implied & different.keys() else _settings(different)}"
    return Fault("stored-format", f"{described}, not with {asked}", remedy)


def _as_written(stored: StoredFormat) -> str:
    """The method that takes a layer as it is, with the arguments that its defaults are not."""
    defaults = METHODS[stored.method].defaults
    given = _settings({k: v for k, v in stored.arguments.items() if v != defaults[k]})
    return f"method: {stored.method}" + (f" with {given}" if given else "")


def _settings(arguments: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key}: {value if isinstance(value, str) else json.dumps(value)}"
        for key, value in arguments.items()
    )


def _misfits(
    scheme: Scheme, stored: StoredFormat, tensors: Tensors, outputs: Mapping[str, TensorSpec]
) -> Iterator[Fault]:
    if scheme.method == UNQUANTIZED:
        return
    for suffix, expected in outputs.items():
        tensor = tensors.get(suffix)
        if tensor is None:
            if suffix not in stored.filled:
                text = f"lacks {suffix}, which {scheme.method} needs"
                yield Fault("stored-tensor", text, "the checkpoint is incomplete")
            continue
        shapes = {expected.shape} | ({(), (1,)} if expected.shape in ((), (1,)) else set())
        fits_dtype = tensor.dtype == expected.dtype or (
            {tensor.dtype, expected.dtype} <= FLOAT_DTYPES.keys()
        )
        if tensor.shape not in shapes or not fits_dtype:
            text = (
                f"{suffix} is stored as {tensor.dtype} {list(tensor.shape)} "
                f"(expected {expected.dtype} {list(expected.shape)})"
            )
            yield Fault("stored-tensor", text, "the checkpoint is damaged")
